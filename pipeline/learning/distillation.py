"""Distillation: the student's outputs for many inputs are drawn to the teacher's.

Source: Hinton et al. 2015, arXiv:1503.02531 (temperature); Tang et al. 2019, arXiv:1903.12136 (a transfer set of
altered copies that only the teacher labels). What two outputs differ by is the task's soft loss. The teacher runs once per
input; its outputs lie on disk, up to ``[train] cache_gb``.

:class:`Distillation` carries the options; :func:`learn` is the part that healing and other methods share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pipeline.flow import processes
from pipeline.flow.amounts import BatchSize, Epochs, LearningRate
from pipeline.flow.cache import digest
from pipeline.flow.code import code_digest
from pipeline.flow.stage import Context
from pipeline.learning.teacher import LiveTeacher, TeacherOutputs, cached_bytes, collect
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.learning.transfer_texts import TransferSet
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.device import choose, hardware
from pipeline.models.encoder import Encoder
from pipeline.tasks.batches import Batch, EncodedTexts, batches_per_epoch


@dataclass(frozen=True)
class Lesson:
    """``texts`` to learn from, and ``loss(outputs, batch)``, a mean over the batch."""

    texts: EncodedTexts
    loss: Callable[[Mapping[str, Tensor], Batch], Tensor]


class Pace(Protocol):
    """How long and how fast something learns."""

    epochs: float
    batch_size: int
    learning_rate: float


class Distillation(BaseModel):
    """Options of a distillation from the teacher's outputs."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    epochs: Epochs = Field(8.0, ge=0)
    """Passes over the transfer set (inputs and their copies) in which the student learns the teacher's outputs."""
    batch_size: BatchSize = 128
    """Inputs per step; a small student spends less per input on a larger batch."""
    learning_rate: LearningRate = 2e-3
    """Peak learning rate of AdamW."""
    temperature: float = Field(2.0, gt=0)
    """Softens both distributions, where outputs are distributions."""
    texts: TransferSet = TransferSet()
    """The transfer set."""

    def distill(self, context: Context, student: Encoder, teacher: Checkpoint, title: str) -> None:
        """Train ``student`` in place on the outputs of ``teacher``, the artifact ``teacher``."""
        if self.epochs:
            learn(context, student, lesson_of(context, teacher, "teacher", self.texts, self.temperature), self, title)


def lesson_of(context: Context, teacher: Checkpoint, role: str, transfer_set: TransferSet, temperature: float) -> Lesson:
    """The transfer set with what ``teacher``, the artifact ``role``, says of it."""
    texts = transfer_set.inputs(context, teacher)
    known = teacher_outputs(context, teacher, texts, role=role)
    return Lesson(texts, lambda given, batch: context.task.soft_loss(given, known.outputs(batch), batch, temperature))


def learn(
    context: Context, student: Encoder, lesson: Lesson, pace: Pace, title: str, epochs: float | None = None, phase: str = "logits"
) -> None:
    """Train ``student`` in place on ``lesson``; ``phase`` tells one call's checkpoints from another's.

    A weight that is zero stays zero: earlier stages may have pruned it.
    """

    def loss(model: Encoder, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        return lesson.loss(model.outputs(batch), batch), {}

    plan = TrainingPlan(pace.epochs if epochs is None else epochs, pace.batch_size, pace.learning_rate, context.seed + 1, machine=context.train)
    job = TrainingJob(student, lesson.texts, loss, plan, context.work / phase, context.progress, title, after_step=zeros_stay(student))
    train(job)


def steps_of(pace: Pace, texts: EncodedTexts, epochs: float) -> int:
    """Steps that so many passes over ``texts`` take, one at least."""
    return max(1, round(epochs * batches_per_epoch(texts, pace.batch_size)))


def zeros_stay(model: nn.Module) -> Callable[[int, Any], None] | None:
    """What keeps the zeros of ``model``'s matrices as they are while it learns; None where there are none.

    Which weights are zero is a property of the weights, so a run that goes on from a checkpoint knows it too.
    """
    zeros = [(p, p == 0) for p in model.parameters() if p.ndim == 2 and p.requires_grad]
    zeros = [(p, mask) for p, mask in zeros if mask.any()]
    there: dict[int, Tensor] = {}  # masks where their parameters train

    def after_step(step: int, optimizer: Any) -> None:
        for number, (parameter, mask) in enumerate(zeros):
            if number not in there:
                there[number] = mask.to(parameter.device)
            parameter.masked_fill_(there[number], 0.0)

    return after_step if zeros else None


def teacher_outputs(
    context: Context, teacher: Checkpoint, texts: EncodedTexts, layers: tuple[int, ...] = (), heads: int = 1, role: str = "teacher"
) -> TeacherOutputs | LiveTeacher:
    """The outputs of ``teacher``, the artifact ``role``, for ``texts``: from the cache where an earlier stage or run has left them, or as
    they are asked for where all of them would take more than ``[train] cache_gb``."""
    device = choose(context.train.device, processes.count())
    needed = cached_bytes(teacher.model, texts, layers, heads)
    if needed > context.train.cache_gb * 1e9:
        context.note(
            f"the teacher runs at every step: its outputs would take {needed / 1e9:.3g} GB, [train] cache_gb allows {context.train.cache_gb:g}"
        )
        return LiveTeacher(teacher.model, layers, heads, device)
    key = digest([context.inputs[role].sha256, texts.fingerprint, layers, heads, code_digest(collect.__module__), *filter(None, [hardware(device)])])

    def make(folder: Path) -> None:
        collect(teacher.model, texts, folder, context.progress, layers, heads, device)

    return TeacherOutputs(context.cache.shared(key, "teacher outputs", make), texts)
