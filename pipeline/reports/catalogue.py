"""What ``pocketbert methods`` and ``pocketbert tasks`` show: every stage and every task as its class describes itself.

Options are the fields of the class with their help; a nested table of options is listed with its own.
"""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

if TYPE_CHECKING:
    from pipeline.flow.stage import Stage
    from pipeline.tasks.base import Task

WIDTH = 120
COMMON = ("reads", "writes")
"""Options that all stages have; listed last."""


def describe_stage(stage: type[Stage]) -> dict[str, Any]:
    """Name, summary, paper, equations, effect, roles and options of a stage; those that all stages have come last."""
    found = options_of(stage)
    return {
        "name": stage.use, "summary": _summary(stage), "paper": stage.paper, "equations": stage.equations, "effect": stage.effect,
        "needs": list(stage.needs), "gives": list(stage.gives), "options": sorted(found, key=lambda option: option["name"] in COMMON),
    }  # fmt: skip


def describe_task(task: type[Task]) -> dict[str, Any]:
    """Name, summary, metrics and options of a kind of task; its own options come before those that all tasks have."""
    own = [name for name in task.model_fields if name in task.__annotations__]
    found = options_of(task)
    return {
        "name": task.kind, "summary": _summary(task), "metrics": [metric._asdict() for metric in task.metrics],
        "options": sorted(found, key=lambda option: option["name"] not in own),
    }  # fmt: skip


def options_of(owner: type[BaseModel], defaults: BaseModel | None = None) -> list[dict[str, Any]]:
    """Fields as name, default, help, and the ``options`` of a nested table, with the defaults that its owner gives them."""
    found = []
    for name, field in owner.model_fields.items():
        default = field.get_default(call_default_factory=True) if defaults is None else getattr(defaults, name)
        known = None if field.is_required() and defaults is None else default
        option = {"name": name, "default": known, "help": " ".join((field.description or "").split())}
        nested = _nested(field.annotation)
        if nested is not None:
            option |= {"default": None, "options": options_of(nested, default)}
        found.append(option)
    return found


def stage_text(described: dict[str, Any]) -> str:
    """A stage in full."""
    lines = [described["name"], f"  {described['summary']}"]
    for key in ("paper", "equations", "effect"):
        if described[key]:
            lines.append(textwrap.fill(described[key], WIDTH, initial_indent=f"  {key:<11}", subsequent_indent=" " * 13))
    return "\n".join([*lines, "", "options", *_option_lines(described["options"], "  ")])


def task_text(described: dict[str, Any]) -> str:
    """A kind of task in full."""
    titles = ", ".join(f"{metric['name']} ({metric['title']})" for metric in described["metrics"])
    metrics = textwrap.fill(titles, WIDTH, initial_indent=f"  {'metrics':<11}", subsequent_indent=" " * 13)
    return "\n".join([described["name"], f"  {described['summary']}", metrics, "", "options", *_option_lines(described["options"], "  ")])


def _option_lines(options: list[dict[str, Any]], indent: str) -> list[str]:
    lines = []
    for option in options:
        nested = option.get("options")
        lines.append(f"{indent}{option['name']}" + (" = { ... }" if nested else f" = {json.dumps(option['default'])}"))
        if option["help"]:
            lines.append(textwrap.fill(option["help"], WIDTH, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    "))
        if nested:
            lines += _option_lines(nested, f"{indent}      ")
    return lines


def _nested(annotation: Any) -> type[BaseModel] | None:
    return next((kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _summary(owner: type[BaseModel]) -> str:
    return " ".join((owner.__doc__ or "").split())
