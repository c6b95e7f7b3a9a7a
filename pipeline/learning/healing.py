"""What a stage does after it has cut a model: learn again, from whom the recipe says, and leave the result.

Pruning papers recover with the labels; since McCarley et al. (arXiv:1910.06360v3) also from the answers of the model as it
was, which tell more of each text. Both are here, once for all methods that cut.

What this file does not do: cut.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field
from torch.nn import functional

from pipeline.flow.stage import Context
from pipeline.learning.distillation import Lesson, LogitDistillation
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.surgery import encoder_parameters
from pipeline.tasks.batches import EncodedTexts
from runtimes.errors import BadInput


class Healing(LogitDistillation):
    """Options of the recovery."""

    epochs: float = Field(2.0, ge=0)
    """Passes over the transfer set after the cut; 0 for none."""
    batch_size: int = Field(128, ge=1)
    """Texts per step; on a CPU a text costs less in a larger batch."""
    learning_rate: float = Field(1.5e-4, gt=0)
    """Peak learning rate of AdamW."""
    copies: int = Field(0, ge=0)
    """Altered copies of every training text; 0 for none."""
    learn_from: Literal["unpruned", "teacher", "labels"] = "unpruned"
    """Whose answers heal the cut: those of the model as it came in, of the fine-tuned teacher, or the labels themselves."""

    def whom(self, context: Context, unpruned: Checkpoint) -> Lesson:
        """What the cut model is to learn.

        Raises:
            BadInput: the teacher tokenizes otherwise, or labels are asked for altered copies, which have none.
        """
        if self.learn_from == "labels":
            if self.copies:
                raise BadInput("copies: altered copies have no labels; learn from unpruned or teacher, or set copies = 0")
            texts = unpruned.encode(context.data.train, context.label_index, context.task.max_length)
            return Lesson(texts, lambda logits, batch: functional.cross_entropy(logits.float(), batch.labels))
        if self.learn_from == "unpruned":
            return self.lesson(context, unpruned, "model")
        teacher = Checkpoint.load(context.folder("teacher"))
        if teacher.tokenizer_json != unpruned.tokenizer_json:
            raise BadInput("learn_from: model and teacher tokenize differently; learn from unpruned or labels")
        return self.lesson(context, teacher)

    def heal(self, context: Context, cut: Encoder, unpruned: Checkpoint, title: str) -> None:
        """Train ``cut`` in place, and say what it was worth before."""
        if self.epochs:
            before = unpruned.with_model(cut).subject("cut", context)
            context.note(f"before healing: {before.accuracy['validation']:.2f} % on validation")
            self.learn(context, cut, self.whom(context, unpruned), title)


def leave(context: Context, unpruned: Checkpoint, model: Encoder, name: str) -> None:
    """Write ``model`` as the stage's result, with its row in the ledger and what became of the parameters."""
    made = unpruned.with_model(model.eval())
    made.save(context.output / "model", context.task.max_length)
    context.subjects.append(made.subject(name, context))
    told = [
        f"{what} {count(model) / 1e6:.3g} M of {count(unpruned.model) / 1e6:.3g} M"
        for what, count in (("in all", count_unique_parameters), ("in the layers", encoder_parameters))
    ]
    context.note("parameters: " + ", ".join(told))


def train_texts(context: Context, checkpoint: Checkpoint, count: int | None = None) -> EncodedTexts:
    """The labelled training texts, or ``count`` of them drawn by the seed."""
    texts = checkpoint.encode(context.data.train, context.label_index, context.task.max_length)
    if count is None or count >= len(texts):
        return texts
    return texts.take(np.sort(np.random.default_rng(context.seed).permutation(len(texts))[:count]))
