"""LayerDrop: train so that layers can be missing, then leave layers out.

Source: Fan, Grave, Joulin 2020, "Reducing Transformer Depth on Demand with Structured Dropout", ICLR,
arXiv:1909.11556.

Training: at each step every layer is skipped (its input passed on) with probability p, all texts of the batch alike, and
nothing is rescaled (§3.2). Pruning (§3.3): of N layers r stay, either every other one - those with d = 0 mod floor(1/p*),
p* = 1 - r/N, go - or the layers that serve the task best. Here that is a search over the validation texts: all choices of
r layers where they are few, else layers are left out one by one, the least missed first.

The authors warn that dropping layers in fine-tuning alone does not make a pretrained model robust, so the cut heals by
distillation afterwards. How much the dropping itself brings is measured by ``drop_epochs = 0``.

Example: N = 6, ``layers = 3``: p* = 1/2, layers 0, 2, 4 go and 1, 3, 5 stay.

What this file does not do: pre-train with LayerDrop, which is what the paper recommends and needs the pre-training data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.flow.amounts import Epochs
from pipeline.flow.stage import SHARED_LAYERS, Context, Stage
from pipeline.learning.distillation import Lesson, zeros_stay
from pipeline.learning.evaluation import score
from pipeline.learning.healing import Healing, leave
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.encoder import Encoder
from pipeline.models.inference import predict
from pipeline.models.surgery import keep_layers, probe_texts, require_same
from pipeline.tasks.base import better
from pipeline.tasks.batches import Batch, EncodedTexts
from runtimes.errors import BadInput

MOST_CHOICES = 30
"""So many choices are all tried; beyond, layers go one by one."""


class Layerdrop(Stage):
    """Train with layers dropped at random, keep those that serve best, and heal."""

    use: ClassVar[str] = "layerdrop"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    refuses: ClassVar[dict[str, str]] = {SHARED_LAYERS: "leaving out one use of a shared layer saves no weights; choose fewer layers before sharing"}
    paper: ClassVar[str] = "Fan et al. 2020, Reducing Transformer Depth on Demand with Structured Dropout, arXiv:1909.11556"
    equations: ClassVar[str] = (
        "Each layer is skipped with probability p per training step, without rescaling; to keep r of N layers, those whose number is a multiple "
        "of floor(1/p*) go, p* = 1 - r/N, or those that the validation texts miss least."
    )
    effect: ClassVar[str] = "Fewer layers: size and time of the encoder fall in proportion; embeddings stay."

    layers: int = Field(3, ge=1)
    """How many layers stay."""
    choose: Literal["search", "every-other", "given"] = "search"
    """Which: those best on validation texts, evenly spaced ones, or ``kept``."""
    kept: list[int] | None = None
    """Layers that stay, counted from 0 (``choose = "given"``)."""
    drop_probability: float = Field(0.2, ge=0, lt=1)
    """Chance of a layer to be skipped in a step (paper: 0.2; 0.5 only if very few are to stay)."""
    drop_epochs: Epochs = Field(2.0, ge=0)
    """Passes over the transfer set in which layers are dropped at random, before the cut."""
    heal: Healing = Healing(epochs=3.0)
    """How the model learns again after the cut."""
    search_texts: int = Field(1000, ge=1)
    """Validation rows that a choice is judged by."""

    @model_validator(mode="after")
    def _kept_given(self) -> Layerdrop:
        if (self.kept is None) == (self.choose == "given"):
            raise ValueError("kept: the list of layers goes with choose = 'given', and only with it")
        if self.kept is not None and len(self.kept) != self.layers:
            raise ValueError(f"kept: names {len(self.kept)} layers, layers is {self.layers}")
        return self

    def run(self, context: Context) -> None:
        unpruned = context.load("model")
        count = len(unpruned.model.config.layers)
        if self.layers > count:
            raise BadInput(f"{self.use}.layers: {self.layers}, but the model has {count}")
        model = context.load("model").model
        if self.drop_epochs and self.drop_probability:
            self._train_dropping(context, model, self.heal.whom(context, unpruned))
        validation = context.encode(unpruned, "validation")
        kept = self._choose(context, model, probe_texts(validation, self.search_texts))
        context.note(f"layers kept: {', '.join(map(str, kept))} of 0 to {count - 1}")
        probes = probe_texts(validation)
        gone = [position for position in range(count) if position not in kept]
        expected = predict(model, probes, skip=gone)
        cut = keep_layers(model, kept)
        require_same(expected, cut, probes, self.use)
        self.heal.heal(context, cut, unpruned, f"{self.use}: healing")
        leave(context, unpruned, cut, f"{len(kept)} of {count} layers kept")

    def _train_dropping(self, context: Context, model: Encoder, lesson: Lesson) -> None:
        def loss(model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
            skip = drawn_layers(len(model.config.layers), self.drop_probability)
            return lesson.loss(model.outputs(batch, skip=skip), batch), {"skipped": float(len(skip))}

        plan = TrainingPlan(self.drop_epochs, self.heal.batch_size, self.heal.learning_rate, context.seed)
        title = f"{self.use}: dropping layers"
        train(TrainingJob(model, lesson.texts, loss, plan, context.work / "dropping", context.progress, title, after_step=zeros_stay(model)))

    def _choose(self, context: Context, model: Encoder, texts: EncodedTexts) -> list[int]:
        count = len(model.config.layers)
        if self.choose == "given":
            return sorted(self.kept or [])
        if self.choose == "every-other":
            return every_other(count, self.layers)
        scores = search(model, self.layers, lambda cut: score(context, cut, texts, "validation"))
        best = max(scores, key=lambda kept: (scores[kept], kept))
        spaced = tuple(every_other(count, self.layers))
        metric = context.task.primary
        told = f"; every other ({', '.join(map(str, spaced))}): {better(metric, scores[spaced]):.2f} {metric.unit}" if spaced in scores else ""
        context.note(
            f"{len(scores)} choices tried on {len(texts)} validation inputs, best {metric.title} {better(metric, scores[best]):.2f} {metric.unit} "
            f"before healing{told}"
        )
        return list(best)


def drawn_layers(count: int, probability: float) -> list[int]:
    """Layers to skip in one step, each with ``probability``; all may be."""
    return (torch.rand(count) < probability).nonzero().flatten().tolist()


def every_other(count: int, stay: int) -> list[int]:
    """The ``stay`` of ``count`` layers that are left when every floor(1/p*)-th goes, p* = 1 - stay/count, from layer 0 on.

    Where that rule does not give the asked number (it can only where 1/p* is whole), layers are spaced evenly, the last kept.
    """
    if stay == count:
        return list(range(count))
    period = math.floor(1 / (1 - stay / count))
    kept = [d for d in range(count) if d % period]
    return kept if len(kept) == stay else [math.ceil(k * count / stay) - 1 for k in range(1, stay + 1)]


def search(model: Encoder, stay: int, judge: Callable[[Encoder], float]) -> dict[tuple[int, ...], float]:
    """What ``judge`` says of the choices tried, more being better: all of ``stay`` layers, or those met when layers go one by one."""
    count = len(model.config.layers)
    if math.comb(count, stay) <= MOST_CHOICES:
        choices = itertools.combinations(range(count), stay)
        return {kept: judge(keep_layers(model, kept)) for kept in choices}
    kept = tuple(range(count))
    scores: dict[tuple[int, ...], float] = {}
    while len(kept) > stay:
        tried = {k: judge(keep_layers(model, k)) for k in itertools.combinations(kept, len(kept) - 1)}
        kept = max(tried, key=lambda k: (tried[k], k))
        scores = tried
    return scores
