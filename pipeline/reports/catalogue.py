"""What ``pocketbert methods`` shows: every stage as its class describes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.flow.stage import Stage


def describe(stage: type[Stage]) -> dict[str, Any]:
    """Name, summary, paper, equations, effect, roles and options of a stage class; its own options come before those it inherits."""
    own = [name for name in stage.model_fields if name in stage.__annotations__]
    fields = {name: stage.model_fields[name] for name in (*own, *stage.model_fields)}
    options = [
        {"name": name, "default": field.get_default(call_default_factory=True), "help": " ".join((field.description or "").split())}
        for name, field in fields.items()
    ]
    return {
        "use": stage.use, "summary": " ".join((stage.__doc__ or "").split()), "paper": stage.paper, "equations": stage.equations,
        "effect": stage.effect,
        "needs": list(stage.needs), "gives": list(stage.gives), "options": options,
    }  # fmt: skip


def one_line(stage: type[Stage]) -> str:
    return f"{stage.use:<22} {' '.join((stage.__doc__ or '').split())}"
