"""Fine-tune a pretrained encoder on the task. Its result is the teacher, and what everything is compared with.

Source: Devlin et al. 2018, arXiv:1810.04805 §4.1 (a new head, all weights trained).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.flow.amounts import BatchSize, Epochs, LearningRate
from pipeline.flow.stage import Context, Stage
from pipeline.learning.evaluation import subject
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder
from pipeline.tasks.batches import Batch
from runtimes.errors import BadInput


class Finetune(Stage):
    """Train all weights of the pretrained encoder, and the heads of the task, on the labelled rows."""

    use: ClassVar[str] = "finetune"
    needs: ClassVar[tuple[str, ...]] = ("source",)
    gives: ClassVar[tuple[str, ...]] = ("model", "teacher", "baseline")
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "Devlin et al. 2018, BERT, arXiv:1810.04805"
    effect: ClassVar[str] = "Makes the teacher; size and speed are those of the pretrained model."

    epochs: Epochs = Field(5.0, gt=0)
    """Passes over the training rows."""
    batch_size: BatchSize = 64
    """Inputs per step."""
    learning_rate: LearningRate = 2e-4
    """Peak learning rate of AdamW. 2e-4 suits small models (MiniLM); 2e-5 to 5e-5 suits BERT-base."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of the matrices; biases and norms do not decay."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Matrix products; ``auto`` takes bf16 where the processor has it."""

    @property
    def without_labels(self) -> str:
        return "take the source as it is: adopt in its place"

    def run(self, context: Context) -> None:
        torch.manual_seed(context.seed)
        checkpoint = load_source(context)
        plan = TrainingPlan(
            self.epochs, self.batch_size, self.learning_rate, context.seed, self.warmup_fraction, self.weight_decay,
            precision=self.precision, machine=context.train,
        )  # fmt: skip

        def loss(model: Encoder, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
            return context.task.loss(model.outputs(batch), batch), {}

        texts = context.encode(checkpoint, "train")
        if told := context.task.untaught(texts, context.data.train):
            context.note(told)
        texts = context.task.trainable(texts)
        train(TrainingJob(checkpoint.model, texts, loss, plan, context.work / "checkpoint", context.progress, self.use))
        leave_as_teacher(context, checkpoint)


def load_source(context: Context) -> Checkpoint:
    """The source model with the heads of the task. What later work reads is encoded once: faults that the tokenizer finds are told before training.

    Raises:
        BadInput: it has fewer positions than the task's inputs; a row that makes no input.
    """
    labels = context.data.labels.get("logits")
    checkpoint = Checkpoint.load(context.folder("source"), context.task.heads(context.data), labels)
    config = checkpoint.model.config
    positions = config.max_position_embeddings - config.position_offset
    if context.task.max_length > positions:
        raise BadInput(f"task.max_length: {context.task.max_length}, but the model has {positions} positions")
    for split in ("validation", "test", "unlabeled"):
        if context.data.split(split):
            context.encode(checkpoint, split)
    if checkpoint.model.dropped_head is not None:
        context.note(f"the source's head is that of another task or of pre-training and is left out: {checkpoint.model.dropped_head}")
    return checkpoint


def leave_as_teacher(context: Context, checkpoint: Checkpoint) -> None:
    """Write the model that everything is compared with."""
    checkpoint.save(context.output / "model", context.task.max_length)
    context.aliases |= {"teacher": "model", "baseline": "model"}
    context.subjects.append(subject(context, checkpoint, "teacher"))
