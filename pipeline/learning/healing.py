"""What a stage does after it has cut a model: learn again, from whom the recipe says, and leave the result.

Pruning papers recover with the labels; since McCarley et al. (arXiv:1910.06360v3) also from the answers of the model as it
was, which tell more of each text. Both are here, once for all methods that cut.

What this file does not do: cut.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.flow.amounts import BatchSize, Epochs, LearningRate
from pipeline.flow.stage import Context
from pipeline.learning.distillation import Lesson, learn, lesson_of
from pipeline.learning.evaluation import describe, subject
from pipeline.learning.transfer_texts import TransferSet
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.surgery import encoder_parameters
from pipeline.tasks.batches import EncodedTexts, with_neighbours
from runtimes.errors import BadInput


class Healing(BaseModel):
    """Options of the recovery after a cut."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    epochs: Epochs = Field(2.0, ge=0)
    """Passes over the transfer set after the cut; 0 for none."""
    batch_size: BatchSize = 128
    """Inputs per step; on a CPU an input costs less in a larger batch."""
    learning_rate: LearningRate = 1.5e-4
    """Peak learning rate of AdamW."""
    temperature: float = Field(2.0, gt=0)
    """Softens both distributions, where outputs are distributions and no labels are learned from."""
    learn_from: Literal["unpruned", "teacher", "labels"] = "unpruned"
    """Whose answers heal the cut: those of the model as it came in, of the fine-tuned teacher, or the labels themselves."""
    texts: TransferSet = TransferSet(copies=0)
    """The transfer set, where the answers are those of a model."""

    def whom(self, context: Context, unpruned: Checkpoint) -> Lesson:
        """What the cut model is to learn.

        Raises:
            BadInput: the teacher tokenizes otherwise, or labels are asked for altered copies, which have none.
        """
        if self.learn_from == "labels":
            if self.texts.copies:
                raise BadInput("copies: altered copies have no labels; learn from unpruned or teacher, or set copies = 0")
            return Lesson(context.task.trainable(context.encode(unpruned, "train")), context.task.loss)
        if self.learn_from == "unpruned":
            return lesson_of(context, unpruned, "model", self.texts, self.temperature)
        teacher = context.load("teacher")
        if teacher.tokenizer_json != unpruned.tokenizer_json:
            raise BadInput("learn_from: model and teacher tokenize differently; learn from unpruned or labels")
        return lesson_of(context, teacher, "teacher", self.texts, self.temperature)

    def heal(self, context: Context, cut: Encoder, unpruned: Checkpoint, title: str) -> None:
        """Train ``cut`` in place, and say what it was worth before."""
        if self.epochs:
            before = subject(context, unpruned.with_model(cut), "cut")
            context.note(f"before healing: {describe(context, before.metrics['validation'])} on validation")
            learn(context, cut, self.whom(context, unpruned), self, title)


def leave(context: Context, unpruned: Checkpoint, model: Encoder, name: str) -> None:
    """Write ``model`` as the stage's result, with its row in the ledger and what became of the parameters."""
    made = unpruned.with_model(model.eval())
    made.save(context.output / "model", context.task.max_length)
    context.subjects.append(subject(context, made, name))
    told = [
        f"{what} {count(model) / 1e6:.3g} M of {count(unpruned.model) / 1e6:.3g} M"
        for what, count in (("in all", count_unique_parameters), ("in the layers", encoder_parameters))
    ]
    context.note("parameters: " + ", ".join(told))


def train_texts(context: Context, checkpoint: Checkpoint, count: int | None = None) -> EncodedTexts:
    """The labelled training inputs, or ``count`` of them drawn by the seed, groups whole."""
    texts = context.task.trainable(context.encode(checkpoint, "train"))
    groups = len(texts) // texts.group
    if count is None or count >= groups:
        return texts
    return texts.take(with_neighbours(np.sort(np.random.default_rng(context.seed).permutation(groups)[:count]), texts.group))
