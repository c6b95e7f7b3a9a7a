"""Take the source as it is: the teacher, and what everything is compared with.

For a model that is trained for the task already, such as a sentence encoder that is to be compressed itself.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.flow.stage import Context, Stage
from pipeline.stages.finetune import leave_as_teacher, load_source
from runtimes.errors import BadInput


class Adopt(Stage):
    """Take the source model as teacher and baseline without training; it must have the heads of the task already."""

    use: ClassVar[str] = "adopt"
    needs: ClassVar[tuple[str, ...]] = ("source",)
    gives: ClassVar[tuple[str, ...]] = ("model", "teacher", "baseline")
    effect: ClassVar[str] = "Size and speed are those of the source."

    def run(self, context: Context) -> None:
        checkpoint = load_source(context)
        untrained = checkpoint.model.fresh_heads
        if untrained:
            raise BadInput(f"adopt: the source has no trained {', '.join(untrained)} for this task and its classes; use finetune in its place")
        leave_as_teacher(context, checkpoint)
