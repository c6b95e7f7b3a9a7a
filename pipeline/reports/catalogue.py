"""What ``pocketbert methods`` and ``pocketbert tasks`` show: every stage and every kind of task as its class describes itself.

Options are the fields of a class, with the text below each as its help. An option that is a table, such as ``heal``, has options of
its own, with the defaults that this stage gives them.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipeline.flow.recipe import nested_table
from pipeline.flow.stage import Stage
from pipeline.tasks.base import Task

WIDTH = 120
INDENT = "    "


def describe_stage(stage: type[Stage]) -> dict[str, Any]:
    """Name, summary, paper, equations, effect, roles and options of a stage class; its own options come before those that all have."""
    return {
        "name": stage.use, "summary": _one_line(stage.__doc__), "paper": stage.paper, "equations": stage.equations, "effect": stage.effect,
        "needs": list(stage.needs), "uses": list(stage.uses), "gives": list(stage.gives), "options": own_first(options(stage), Stage),
    }  # fmt: skip


def describe_task(task: type[Task]) -> dict[str, Any]:
    """Name, summary, what ``predict`` takes, metrics (the primary one first) and options of a task class."""
    usual = task.model_construct()  # defaults alone: a recipe must also name its data
    metrics = [usual.primary, *(metric for metric in task.metrics if metric != usual.primary)]
    return {
        "name": task.kind, "summary": _one_line(task.__doc__), "predict": list(usual.columns), "metrics": [metric._asdict() for metric in metrics],
        "options": own_first(options(task), Task),
    }  # fmt: skip


def own_first(listed: list[dict[str, Any]], base: type[BaseModel]) -> list[dict[str, Any]]:
    """``listed`` with the options of ``base`` last."""
    return sorted(listed, key=lambda option: option["name"] in base.model_fields)


def options(owner: type[BaseModel], default: BaseModel | None = None) -> list[dict[str, Any]]:
    """Fields of a class.

    Args:
        default: the instance whose values are the defaults; those of the class if None.

    Returns:
        name, default (JSON), required, choices (None where there is no fixed list), help, and options of a nested table ([] for others).
    """
    found = []
    for name, field in owner.model_fields.items():
        value = field.get_default(call_default_factory=True) if default is None else getattr(default, name)
        table = nested_table(field.annotation)
        found.append({
            "name": name, "default": None if value is PydanticUndefined else _as_json(value), "required": value is PydanticUndefined,
            "choices": _choices(field.annotation), "help": _one_line(field.description),
            "options": [] if table is None else options(table, value if isinstance(value, table) else None),
        })  # fmt: skip
    return found


def stage_text(shown: dict[str, Any]) -> str:
    """A stage of :func:`describe_stage` for a terminal."""
    facts = [(key, shown[key]) for key in ("paper", "equations", "effect")]
    roles = [(key, ", ".join(shown[key])) for key in ("needs", "uses", "gives")]
    return _text(shown, [*facts, *roles])


def task_text(shown: dict[str, Any]) -> str:
    """A task of :func:`describe_task` for a terminal."""
    metrics = [f"{m['title']} {m['unit']}".rstrip() + ("" if m["higher_is_better"] else " (lower is better)") for m in shown["metrics"]]
    named = [f"{metric['name']}: {told}" for metric, told in zip(shown["metrics"], metrics, strict=True)]
    return _text(shown, [("predict", " and ".join(shown["predict"])), ("metrics", "; ".join([f"{named[0]} (primary)", *named[1:]]))])


def _text(shown: dict[str, Any], facts: list[tuple[str, str]]) -> str:
    lines = [shown["name"], _filled(shown["summary"], "  ")]
    lines += [textwrap.fill(value, WIDTH, initial_indent=f"  {key:<11}", subsequent_indent=" " * 13) for key, value in facts if value]
    return "\n".join([*lines, "", "options", *_option_lines(shown["options"], "  ")])


def _option_lines(listed: list[dict[str, Any]], indent: str) -> list[str]:
    lines = []
    for option in listed:
        value = "{ ... }" if option["options"] else json.dumps(option["default"], ensure_ascii=False)
        choices = f"   one of {', '.join(map(str, option['choices']))}" if option["choices"] else ""
        lines.append(f"{indent}{option['name']}" + ("   (required)" if option["required"] else f" = {value}") + choices)
        if option["help"]:
            lines.append(_filled(option["help"], indent + INDENT))
        lines += _option_lines(option["options"], indent + INDENT)
    return lines


def _choices(annotation: Any) -> list[Any] | None:
    """The values of a Literal, of a list of them, or of one that may be missing; None where other values may stand too."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    inner = [kind for kind in get_args(annotation) if kind is not type(None)]
    return _choices(inner[0]) if len(inner) == 1 else None


def _as_json(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else json.loads(json.dumps(value, default=list))


def _filled(text: str, indent: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
