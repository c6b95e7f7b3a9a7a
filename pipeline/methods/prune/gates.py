"""Structured pruning with learned gates on heads, FFN units and the hidden width.

Source: McCarley 2019 (v1: "Pruning a BERT-based Question Answering Model"), McCarley, Chakravarti, Sil 2020 (v3:
"Structured Pruning of a BERT-based Question Answering Model"), arXiv:1910.06360.

Every head, every unit between the two matrices of an FFN, and (v1) every channel of the feature map has a gate. Which
gates close is decided in one of three ways:

- ``l0``: hard-concrete gates (:mod:`pipeline.learning.hard_concrete`) learn for ``gate_epochs``, the weights standing still,
  to keep the loss low while the expected number of open gates goes to the target;
- ``gain``: by |dL/d gate| at 1, averaged over texts (as Michel et al. rank heads), without learning;
- ``random``: a control.

The gates that are open least are cut until exactly the asked share is gone, over all layers together (FFN widths to
multiples of ``multiple_of``), what the others learned to multiply by is folded into the matrix behind them, and the model is
trained again ("retrained"), by default from the answers of the model as it was (v3).

Two things differ from the paper: the number of open gates is held by a Lagrangian at the target from the recipe, where the
paper sets a penalty and takes what comes; and gates close in exactly that number.

Example: 6 layers of 12 heads and 1536 units, ``heads = 0.5``, ``ffn = 0.5``: 36 heads and about 4608 units are left.

What this file does not do: gate queries and keys within a head (:mod:`pipeline.methods.prune.neurons`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.flow.amounts import Epochs, LearningRate
from pipeline.flow.stage import UNEQUAL_LAYERS, Context, Stage, not_on_shared_or_quaternions
from pipeline.learning.distillation import Lesson, steps_of
from pipeline.learning.hard_concrete import SizeConstraint, decided, probability_open, sample
from pipeline.learning.healing import Healing, leave, train_texts
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.encoder import Encoder
from pipeline.models.gated import gated
from pipeline.models.inference import predict
from pipeline.models.surgery import keep_ffn_units, keep_heads, keep_hidden, probe_texts, require_same
from pipeline.tasks.batches import Batch, EncodedTexts, in_order
from runtimes.errors import BadInput

BETA = 2 / 3
"""Temperature of the gates (Louizos et al.)."""
GAIN_BATCH = 64
WARMUP = 0.3
"""Share of the gate phase in which the target rises from 0."""
START = 2.0
"""First log_alpha, plus noise: nearly open."""


class PruneGates(Stage):
    """Learn which heads, FFN units and channels can go, cut them out, and retrain."""

    use: ClassVar[str] = "prune-gates"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({UNEQUAL_LAYERS})
    refuses: ClassVar[dict[str, str]] = not_on_shared_or_quaternions("heads and units")
    paper: ClassVar[str] = "McCarley et al. 2019, Structured Pruning of a BERT-based Question Answering Model, arXiv:1910.06360"
    equations: ClassVar[str] = (
        "Gates on heads, FFN units and channels are drawn from the hard-concrete distribution, whose probability of being open is "
        "differentiable; loss plus a Lagrangian of the expected number of open gates is minimised over the gates alone."
    )
    effect: ClassVar[str] = "Smaller dense matrices: smaller and faster in every runtime, in proportion to what goes."

    heads: float = Field(0.0, ge=0, lt=1)
    """Share of all heads that go."""
    ffn: float = Field(0.5, ge=0, lt=1)
    """Share of all FFN units that go."""
    hidden: float = Field(0.0, ge=0, lt=1)
    """Share of the channels of the feature map that go (v1 of the paper)."""
    select: Literal["l0", "gain", "random"] = "l0"
    """How the gates that close are found; ``random`` is a control."""
    gate_epochs: Epochs = Field(2.0, gt=0)
    """Passes over the training texts in which gates learn (``l0``)."""
    gate_learning_rate: LearningRate = 0.05
    """Learning rate of gates and multipliers, much larger than that of weights."""
    multiple_of: int = Field(16, ge=1)
    """FFN and hidden widths are rounded to multiples of this (see README: which widths the kernels like)."""
    gain_texts: int = Field(4096, ge=1)
    """Training inputs over which ``gain`` is averaged."""
    heal: Healing = Healing()
    """How the model learns again after the cut."""

    @property
    def without_labels(self) -> str:
        return 'set select = "l0", which learns from the unpruned model' if self.select == "gain" else super().without_labels

    def run(self, context: Context) -> None:
        if not (self.heads or self.ffn or self.hidden):
            raise BadInput(f"{self.use}: heads, ffn and hidden are all 0, so nothing would go")
        unpruned = context.load("model")
        if self.hidden and not unpruned.model.config.hidden_can_shrink:
            raise BadInput(
                f"{self.use}.hidden: a BERT-like encoder is needed: layer norms, no bottlenecks, embeddings as wide as the layers; set hidden = 0"
            )
        torch.manual_seed(context.seed)
        gates = Gates(unpruned.model, bool(self.heads), bool(self.ffn), bool(self.hidden))
        lesson = self.heal.whom(context, unpruned)
        if self.select == "l0":
            self._learn_gates(context, unpruned.model, gates, lesson)
        elif self.select == "gain":
            gates.set(gains(unpruned.model, gates, train_texts(context, unpruned, self.gain_texts), context.task.loss))
        else:
            gates.set([torch.rand_like(g) for g in gates.log_alphas])
        closed = gates.close(self.heads, self.ffn, self.hidden, self.multiple_of, soft=self.select == "l0")
        probes = probe_texts(context.encode(unpruned, "validation"))
        cut = cut_closed(unpruned.model, closed, probes, self.use)
        heads = ", ".join(str(layer["heads"]) for layer in cut.config.layers)
        widths = ", ".join("+".join(map(str, layer["ffn_sizes"])) for layer in cut.config.layers)
        context.note(f"left per layer: heads {heads}; FFN units {widths}; channels {cut.config.hidden_size}")
        self.heal.heal(context, cut, unpruned, f"{self.use}: retraining")
        leave(context, unpruned, cut, f"gates by {self.select}: {self.heads:.0%} heads, {self.ffn:.0%} FFN, {self.hidden:.0%} channels pruned")

    def _learn_gates(self, context: Context, model: Encoder, gates: Gates, lesson: Lesson) -> None:
        """Train log_alpha while the weights stand still."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        targets = {"heads": self.heads, "units": self.ffn, "hidden": self.hidden}
        module = nn.ModuleDict({"gates": gates, **{f"size_{kind}": SizeConstraint() for kind in targets}})
        plan = TrainingPlan(self.gate_epochs, self.heal.batch_size, self.gate_learning_rate, context.seed, weight_decay=0.0)
        steps = steps_of(self.heal, lesson.texts, self.gate_epochs)

        def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
            with module["gates"].drawn(model):
                total = lesson.loss(model.outputs(batch), batch)
            parts = {}
            for kind, target in targets.items():
                expected = module["gates"].expected_sparsity(kind)
                if expected is not None:
                    total = total + module[f"size_{kind}"](expected, target * min(1.0, step / (WARMUP * steps)))
                    parts[kind] = expected.item()
            return total, parts

        history = train(TrainingJob(module, lesson.texts, loss, plan, context.work / "gates", context.progress, f"{self.use}: gates"))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        told = ", ".join(f"{kind} {value:.1%}" for kind, value in history[-1].items() if kind in targets)
        context.note(f"expected to be closed in the last epoch of the gate phase: {told}")


class Gates(nn.Module):
    """log_alpha of every gate of a model: one tensor per layer's heads and per FFN, and one for the hidden channels."""

    def __init__(self, model: Encoder, heads: bool, units: bool, hidden: bool) -> None:
        super().__init__()
        self.kinds: list[str] = []
        self.places: list[tuple[int, int]] = []
        log_alphas = []
        for index, layer in enumerate(model.layers):
            if heads and layer.attention.heads:
                log_alphas.append(layer.attention.heads)
                self.kinds.append("heads"), self.places.append((index, 0))
            for number, ffn in enumerate(layer.ffns if units else ()):
                if ffn.up is not None:
                    log_alphas.append(model.config.layers[index]["ffn_sizes"][number])
                    self.kinds.append("units"), self.places.append((index, number))
        if hidden:
            log_alphas.append(model.config.hidden_size)
            self.kinds.append("hidden"), self.places.append((0, 0))
        self.log_alphas = nn.ParameterList(nn.Parameter(START + 0.01 * torch.randn(size)) for size in log_alphas)
        self.shapes = [(layer.attention.heads, list(model.config.layers[i]["ffn_sizes"])) for i, layer in enumerate(model.layers)]

    def set(self, scores: Sequence[Tensor]) -> None:
        """Take scores, higher for what should stay, in place of what is learned."""
        for gate, score in zip(self.log_alphas, scores, strict=True):
            gate.data.copy_(score)

    def arranged(self, values: Sequence[Tensor]) -> dict:
        """Values in the order of ``log_alphas`` as the arguments of :func:`~pipeline.models.gated.gated`; ungated places get ones."""
        heads = [torch.ones(count) for count, _ in self.shapes]
        units = [[torch.ones(size) for size in sizes] for _, sizes in self.shapes]
        made = {"heads": heads, "units": units, "hidden": None}
        for kind, (layer, number), value in zip(self.kinds, self.places, values, strict=True):
            if kind == "heads":
                heads[layer] = value
            elif kind == "units":
                units[layer][number] = value
            else:
                made["hidden"] = value
        return made

    def drawn(self, model: Encoder):
        """``model`` under random gates, as a context."""
        return gated(model, **self.arranged([sample(log_alpha, BETA) for log_alpha in self.log_alphas]))

    def expected_sparsity(self, kind: str) -> Tensor | None:
        """Expected share of closed gates of a kind; None where there are no such gates."""
        own = [gate for gate, k in zip(self.log_alphas, self.kinds, strict=True) if k == kind]
        return None if not own else 1 - torch.cat([probability_open(gate, BETA) for gate in own]).mean()

    @torch.no_grad()
    def close(self, heads: float, units: float, hidden: float, multiple_of: int, soft: bool) -> dict:
        """Final gates, arranged: 0 for exactly the asked shares, over all layers together, else 1 or, if ``soft``, what was learned.

        A gate that stays is never 0: the least that one is multiplied by is 0.05.
        """
        values: list[Tensor] = [torch.ones_like(gate) for gate in self.log_alphas]
        for kind, share in (("heads", heads), ("units", units), ("hidden", hidden)):
            own = [i for i, k in enumerate(self.kinds) if k == kind]
            if not own:
                continue
            scores = torch.cat([self.log_alphas[i] for i in own])
            order = scores.argsort(stable=True)
            stays = torch.ones(len(scores), dtype=torch.bool)
            stays[order[: round(share * len(scores))]] = False
            for i, mask in zip(own, stays.split([len(self.log_alphas[i]) for i in own]), strict=True):
                if kind != "heads":
                    mask = rounded(mask, self.log_alphas[i], multiple_of)
                kept = decided(self.log_alphas[i]).clamp(min=0.05) if soft and kind != "hidden" else torch.ones_like(self.log_alphas[i])
                values[i] = torch.where(mask, kept, torch.zeros(()))
        return self.arranged(values)


def rounded(stays: Tensor, scores: Tensor, multiple_of: int) -> Tensor:
    """The mask with a number of survivors that is the nearest multiple, at least one multiple where any survived."""
    count = int(stays.sum())
    wanted = min(len(stays), max(multiple_of, round(count / multiple_of) * multiple_of)) if count else 0
    made = torch.zeros_like(stays)
    made[scores.argsort(descending=True, stable=True)[:wanted]] = True
    return made


def gains(model: Encoder, gates: Gates, texts: EncodedTexts, loss: Callable[[Mapping[str, Tensor], Batch], Tensor]) -> list[Tensor]:
    """E_x |dL(x)/d gate| at 1 for every gate, in the order of ``gates.log_alphas``."""
    model.eval()
    sums = [torch.zeros_like(gate) for gate in gates.log_alphas]
    for batch in in_order(texts, GAIN_BATCH):
        ones = [torch.ones(len(batch.rows), len(gate), requires_grad=True) for gate in gates.log_alphas]
        with gated(model, **gates.arranged(ones)):
            summed = loss(model.outputs(batch), batch) * len(batch.rows)
        for total, gradient in zip(sums, torch.autograd.grad(summed, ones), strict=True):
            total += gradient.abs().sum(0)
    return [total.detach() / len(texts) for total in sums]


@torch.no_grad()
def cut_closed(model: Encoder, closed: dict, probes: EncodedTexts, what: str) -> Encoder:
    """``model`` without what is gated by 0, and with the other gates multiplied into the matrices behind them."""
    with gated(model, **closed):
        expected = predict(model, probes)
    folded = Encoder(model.config)
    folded.load_state_dict(model.state_dict())
    for layer, heads, units in zip(folded.layers, closed["heads"], closed["units"], strict=True):
        if layer.attention.heads:
            _reader(layer.attention.output).weight.mul_(heads.repeat_interleave(layer.attention.head_size))
        for ffn, gates in zip(layer.ffns, units, strict=True):
            if ffn.up is not None:
                _reader(ffn.down).weight.mul_(gates)
    cut = keep_heads(folded, [gates.nonzero().flatten().tolist() for gates in closed["heads"]])
    cut = keep_ffn_units(cut, [[gates.nonzero().flatten().tolist() for gates in units] for units in closed["units"]])
    if closed["hidden"] is not None:
        cut = keep_hidden(cut, closed["hidden"].nonzero().flatten().tolist())
    require_same(expected, cut, probes, what)
    return cut


def _reader(module: nn.Module) -> nn.Module:
    """The matrix that reads the input: the inner one of a product."""
    return getattr(module, "inner", module)
