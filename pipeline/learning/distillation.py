"""Distillation from logits: the student's answers to many texts are drawn to the teacher's.

Source: Hinton et al. 2015, arXiv:1503.02531 (temperature); Tang et al. 2019, arXiv:1903.12136 (a transfer set of
altered copies that only the teacher labels). The teacher runs once per text; its logits lie on disk.

:class:`LogitDistillation` carries the options and is the part that other methods share: MobileBERT's last phase, the
healing after a factorization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pipeline.flow.cache import digest
from pipeline.learning.losses import logit_loss
from pipeline.learning.teacher import TeacherOutputs, collect
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.learning.transfer_texts import altered_copies
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder
from pipeline.tasks.batches import Batch, EncodedTexts
from runtimes.errors import BadInput

if TYPE_CHECKING:
    from pipeline.flow.stage import Context


class LogitDistillation(BaseModel):
    """Options of a distillation from logits."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    epochs: float = Field(8.0, ge=0)
    """Passes over the transfer set (texts and their copies) that learn from the teacher's logits."""
    batch_size: int = Field(128, ge=1)
    """Texts per step; a small student spends less per text on a larger batch."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    temperature: float = Field(2.0, gt=0)
    """Softens both distributions."""
    copies: int = Field(4, ge=0)
    """Altered copies of every training text; 0 for none."""
    mask_probability: float = Field(0.1, ge=0, le=1)
    """Chance of a token of a copy to be masked."""
    replace_probability: float = Field(0.3, ge=0, le=1)
    """Chance of a token of a copy to be exchanged for one of its nearest words in the teacher's word table."""
    neighbours: int = Field(15, ge=1)
    """How many nearest words a token may be exchanged for (TinyBERT: 15)."""

    def transfer_texts(self, context: Context, teacher: Checkpoint) -> EncodedTexts:
        """The training texts, then their altered copies, as the teacher tokenizes them."""
        texts = teacher.encode(context.data.train, context.label_index, context.task.max_length)
        if not self.copies:
            return texts
        mask_id = teacher.special_id("mask_token")
        if mask_id is None:
            raise BadInput("copies: the tokenizer has no mask token; set copies = 0")
        copies = altered_copies(
            texts, self.copies, self.mask_probability, self.replace_probability, teacher.model.embeddings.word.weight,
            min(self.neighbours, teacher.model.config.vocab_size - len(teacher.special_ids) - 1), teacher.special_ids, mask_id, context.seed,
        )  # fmt: skip
        return texts.joined(copies)

    def lesson(self, context: Context, teacher: Checkpoint, role: str = "teacher") -> Lesson:
        """The transfer set with what ``teacher``, the artifact ``role``, says of it."""
        texts = self.transfer_texts(context, teacher)
        logits = teacher_outputs(context, teacher, texts, role=role).logits
        return Lesson(texts, lambda given, batch: logit_loss(given, logits[torch.from_numpy(batch.rows)], self.temperature))

    def distill_logits(self, context: Context, student: Encoder, teacher: Checkpoint, title: str) -> None:
        """Train ``student`` in place on the teacher's logits."""
        if self.epochs:
            self.learn(context, student, self.lesson(context, teacher), title)

    def learn(self, context: Context, student: Encoder, lesson: Lesson, title: str, epochs: float | None = None, phase: str = "logits") -> None:
        """Train ``student`` in place on ``lesson``; ``phase`` tells one call's checkpoints from another's.

        A weight that is zero stays zero: earlier stages may have pruned it.
        """

        def loss(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
            return lesson.loss(model(batch.input_ids, batch.attention_mask).logits, batch), {}

        plan = TrainingPlan(self.epochs if epochs is None else epochs, self.batch_size, self.learning_rate, context.seed + 1)
        job = TrainingJob(student, lesson.texts, loss, plan, context.work / phase, context.progress, title, after_step=zeros_stay(student))
        train(job)


@dataclass(frozen=True)
class Lesson:
    """``texts`` to learn from, and ``loss(logits [b, C], batch)``, a mean over the batch."""

    texts: EncodedTexts
    loss: Callable[[Tensor, Batch], Tensor]


def zeros_stay(model: nn.Module) -> Callable[[int, Any], None] | None:
    """What keeps the zeros of ``model``'s matrices as they are while it learns; None where there are none.

    Which weights are zero is a property of the weights, so a run that goes on from a checkpoint knows it too.
    """
    zeros = [(p, p == 0) for p in model.parameters() if p.ndim == 2 and p.requires_grad]
    zeros = [(p, mask) for p, mask in zeros if mask.any()]

    def after_step(step: int, optimizer: Any) -> None:
        for parameter, mask in zeros:
            parameter.masked_fill_(mask, 0.0)

    return after_step if zeros else None


def teacher_outputs(
    context: Context, teacher: Checkpoint, texts: EncodedTexts, layers: tuple[int, ...] = (), heads: int = 1, role: str = "teacher"
) -> TeacherOutputs:
    """The outputs of ``teacher``, the artifact ``role``, for ``texts``, from the cache where an earlier stage or run has left them."""
    key = digest([context.inputs[role].sha256, texts.fingerprint, layers, heads])
    with context.cache.lock(key):
        return collect(teacher.model, texts, context.cache.shared(key), context.progress, layers, heads)
