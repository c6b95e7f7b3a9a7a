"""What a PyTorch model is worth: the task's metrics on validation and test rows."""

from __future__ import annotations

from pipeline.flow.stage import Context, Subject
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.inference import predict
from pipeline.tasks.base import AGREEMENT, DIVERGENCE, better
from pipeline.tasks.batches import EncodedTexts

REPORTED = ("validation", "test")


def evaluate(context: Context, model: Encoder, texts: EncodedTexts, split: str) -> dict[str, float]:
    """Every metric of the task; ``texts`` are inputs of rows of ``split``, all of them or some. Without labels, a model agrees with itself."""
    if not context.task.needs_labels:
        return {AGREEMENT.name: 100.0, DIVERGENCE.name: 0.0} if context.task.decides else {DIVERGENCE.name: 0.0}
    outputs = {name: value.numpy() for name, value in predict(model, texts).items()}
    found = context.task.evaluate(outputs, texts, context.data.split(split), context.data)
    return {name: round(value, 3) for name, value in found.items()}


def score(context: Context, model: Encoder, texts: EncodedTexts, split: str) -> float:
    """The primary metric, so that more is better."""
    primary = context.task.primary
    return better(primary, evaluate(context, model, texts, split)[primary.name])


def subject(context: Context, checkpoint: Checkpoint, name: str) -> Subject:
    """Ledger row of this model: parameters, bytes in float32, metrics on validation and test."""
    unique = count_unique_parameters(checkpoint.model)
    metrics = {split: evaluate(context, checkpoint.model, context.encode(checkpoint, split), split) for split in REPORTED}
    return Subject(name, unique, unique * 4, metrics)


def describe(context: Context, metrics: dict[str, float]) -> str:
    """The primary metric in words for a note: ``accuracy 93.10 %``."""
    primary = context.task.primary
    return f"{primary.title} {metrics[primary.name]:.2f} {primary.unit}".rstrip()
