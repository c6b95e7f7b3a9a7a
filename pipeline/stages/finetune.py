"""Fine-tune a pretrained encoder on the task. Its result is the teacher, and what everything is compared with.

Source: Devlin et al. 2018, arXiv:1810.04805 §4.1 (a classifier on the first token, all weights trained).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.flow.stage import Context, Stage
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder
from pipeline.tasks.batches import Batch
from runtimes.errors import BadInput


class Finetune(Stage):
    """Train all weights of the pretrained encoder, and a new classifier, on the labelled texts."""

    use: ClassVar[str] = "finetune"
    needs: ClassVar[tuple[str, ...]] = ("source",)
    gives: ClassVar[tuple[str, ...]] = ("model", "teacher", "baseline")
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "Devlin et al. 2018, BERT, arXiv:1810.04805"
    effect: ClassVar[str] = "Makes the teacher; size and speed are those of the pretrained model."

    epochs: float = Field(5.0, gt=0)
    """Passes over the training texts."""
    batch_size: int = Field(64, ge=1)
    """Texts per step."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW. 2e-4 suits small models (MiniLM); 2e-5 to 5e-5 suits BERT-base."""
    weight_decay: float = Field(0.01, ge=0)
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Matrix products; ``auto`` takes bf16 where the processor has it."""

    def run(self, context: Context) -> None:
        torch.manual_seed(context.seed)
        checkpoint = Checkpoint.load(context.folder("source"), context.data.labels)
        positions = checkpoint.model.config.max_position_embeddings - checkpoint.model.config.position_offset
        if context.task.max_length > positions:
            raise BadInput(f"task.max_length: {context.task.max_length}, but the model has {positions} positions")
        texts = checkpoint.encode(context.data.train, context.label_index, context.task.max_length)
        plan = TrainingPlan(
            self.epochs, self.batch_size, self.learning_rate, context.seed, self.warmup_fraction, self.weight_decay,
            precision=self.precision,
        )  # fmt: skip
        train(TrainingJob(checkpoint.model, texts, label_loss, plan, context.work / "checkpoint", context.progress, self.use))
        checkpoint.save(context.output / "model", context.task.max_length)
        context.aliases |= {"teacher": "model", "baseline": "model"}
        context.subjects.append(checkpoint.subject("teacher", context))


def label_loss(model: Encoder, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy against the labels, averaged over texts."""
    return model(batch.input_ids, batch.attention_mask, labels=batch.labels).loss, {}
