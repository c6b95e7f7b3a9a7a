"""Neuron pruning: remove single units of the FFNs and single dimensions of the attention, a few at a time.

Source: S. Sucik, "Compressing BERT for faster prediction" (8 August 2019) and "Pruning BERT to accelerate inference" (5
September 2019), Rasa blog: zeroing weights does not make BERT faster, removing neurons does.

A neuron is a unit between the two matrices of an FFN, a dimension that a head's queries and keys have in common, or a
dimension of its values. Queries and keys meet in a product, so they lose the same dimensions; values meet the output's
columns. Scores:

    ``activation``   mean |what the neuron gives| over training texts (for queries and keys: product of both means)
    ``magnitude``    norm of the row that makes it times norm of the column that reads it

In each of ``rounds`` rounds the lowest go, up to their share of the target, and the model heals a while. FFN units compete
over all layers; each head of a layer keeps equally many dimensions, so that matrices stay rectangular. The queries are
scaled so that scores are divided by the root of the old head size, as they were trained.

Example: ``ffn = 0.5, attention = 0.25`` in 4 rounds of MiniLM: 4608 of 9216 units, 24 of 32 dimensions of each head.

What this file does not do: remove whole heads (:mod:`pipeline.methods.prune.heads`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.flow.stage import UNEQUAL_LAYERS, Context, Stage, not_on_shared_or_quaternions
from pipeline.learning.distillation import learn
from pipeline.learning.healing import Healing, leave, train_texts
from pipeline.methods.prune.gates import rounded
from pipeline.models.encoder import Encoder
from pipeline.models.gated import gated
from pipeline.models.inference import predict
from pipeline.models.surgery import keep_ffn_units, keep_head_dimensions, probe_texts, require_same
from pipeline.tasks.batches import EncodedTexts, in_order
from runtimes.errors import BadInput

SCORE_BATCH = 64
SCORE_TEXTS = 2048


class PruneNeurons(Stage):
    """Remove FFN units and head dimensions that do least, in rounds with healing between."""

    use: ClassVar[str] = "prune-neurons"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({UNEQUAL_LAYERS})
    refuses: ClassVar[dict[str, str]] = not_on_shared_or_quaternions("neurons")
    paper: ClassVar[str] = "Sucik 2019, Pruning BERT to accelerate inference (Rasa blog)"
    equations: ClassVar[str] = (
        "A neuron's score is its mean absolute activation over texts, or the norm of the weights that make it times that of those that read it; "
        "the lowest of all layers go, round after round."
    )
    effect: ClassVar[str] = "Smaller dense matrices: smaller and faster in every runtime, in proportion to what goes."

    ffn: float = Field(0.5, ge=0, lt=1)
    """Share of all FFN units that go."""
    attention: float = Field(0.0, ge=0, lt=1)
    """Share of the dimensions of every head that go."""
    score: Literal["activation", "magnitude"] = "activation"
    """What a neuron is judged by."""
    rounds: int = Field(4, ge=1)
    """Cuts on the way to the target."""
    multiple_of: int = Field(16, ge=1)
    """FFN widths are rounded to multiples of this."""
    heal: Healing = Healing(epochs=4.0)
    """How the model learns again; its epochs are spread over the rounds."""

    def run(self, context: Context) -> None:
        if not (self.ffn or self.attention):
            raise BadInput(f"{self.use}: ffn and attention are both 0, so nothing would go")
        unpruned = context.load("model")
        texts = train_texts(context, unpruned, SCORE_TEXTS)
        probes = probe_texts(context.encode(unpruned, "validation"))
        lesson = self.heal.whom(context, unpruned) if self.heal.epochs else None
        sizes = [[list(layer["ffn_sizes"]), layer["head_size"]] for layer in unpruned.model.config.layers]
        model = unpruned.model
        for number in range(1, self.rounds + 1):
            part = number / self.rounds
            scores = neuron_scores(model, texts, self.score)
            model = self._cut(model, scores, sizes, part, probes)
            if lesson is not None:
                phase = f"{self.use}: round {number}"
                learn(context, model, lesson, self.heal, phase, self.heal.epochs / self.rounds, f"round{number}")
                model.eval()
        widths = ", ".join("+".join(map(str, layer["ffn_sizes"])) for layer in model.config.layers)
        context.note(f"left per layer: {widths} FFN units; {', '.join(str(layer['head_size']) for layer in model.config.layers)} dimensions per head")
        leave(context, unpruned, model, f"{self.ffn:.0%} of FFN units, {self.attention:.0%} of head dimensions pruned")

    def _cut(self, model: Encoder, scores: NeuronScores, sizes: list, part: float, probes: EncodedTexts) -> Encoder:
        """``model`` with the share ``part`` of the target gone, counted from the original ``sizes``."""
        flat = torch.cat([s for layer in scores.units for s in layer]) if self.ffn else torch.zeros(0)
        total = sum(size for ffns, _ in sizes for size in ffns)
        gone_already = total - len(flat)
        stays = torch.ones(len(flat), dtype=torch.bool)
        stays[flat.argsort(stable=True)[: max(0, round(self.ffn * part * total) - gone_already)]] = False
        masks = iter(stays.split([len(s) for layer in scores.units for s in layer]) if self.ffn else ())
        units = [
            [rounded(next(masks), s, self.multiple_of) if self.ffn else torch.ones(len(s), dtype=torch.bool) for s in layer] for layer in scores.units
        ]
        query_key, value = [], []
        for layer, ((_, head_size), qk, v) in enumerate(zip(sizes, scores.query_key, scores.value, strict=True)):
            keep = max(1, head_size - round(self.attention * part * head_size)) if len(qk) else 0
            now = model.config.layers[layer]["head_size"]
            query_key.append([top(head, min(keep, now)) for head in qk])
            value.append([top(head, min(keep, now)) for head in v])
        with gated(model, units=[[m.float() for m in layer] for layer in units], query_key=ones_at(model, query_key), value=ones_at(model, value)):
            expected = predict(model, probes)
        cut = keep_ffn_units(model, [[m.nonzero().flatten().tolist() for m in layer] for layer in units])
        cut = keep_head_dimensions(cut, query_key, value)
        require_same(expected, cut, probes, self.use)
        return cut


class NeuronScores:
    """Scores per layer: ``units`` a tensor [F] per FFN, ``query_key`` and ``value`` [A, d]."""

    def __init__(self, units: list[list[Tensor]], query_key: list[Tensor], value: list[Tensor]) -> None:
        self.units, self.query_key, self.value = units, query_key, value


def neuron_scores(model: Encoder, texts: EncodedTexts, kind: str) -> NeuronScores:
    """Scores by ``kind``, as the module docstring defines them."""
    if kind == "magnitude":
        made, reads = (lambda m: m.weight.detach().norm(dim=1)), (lambda m: m.weight.detach().norm(dim=0))
    else:
        means = mean_activations(model, texts)
        made, reads = (lambda m: means[m]), (lambda m: 1.0)
    units, query_key, value = [], [], []
    for layer in model.layers:
        attention = layer.attention
        makers = [ffn.down if kind == "activation" else ffn.up for ffn in layer.ffns]
        units.append([torch.zeros(0) if ffn.up is None else made(m) * reads(ffn.down) for m, ffn in zip(makers, layer.ffns, strict=True)])
        if not attention.heads:
            query_key.append(torch.zeros(0, 0)), value.append(torch.zeros(0, 0))
            continue
        heads = (attention.heads, attention.head_size)
        query_key.append((made(attention.query) * made(attention.key)).view(heads))
        value.append((made(attention.output if kind == "activation" else attention.value) * reads(attention.output)).view(heads))
    return NeuronScores(units, query_key, value)


@torch.no_grad()
def mean_activations(model: Encoder, texts: EncodedTexts) -> dict[nn.Module, Tensor]:
    """Mean absolute value over all real tokens: of what queries and keys give, and of what FFN downs and attention outputs read."""
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, Tensor] = {}
    state = {"mask": None}

    def add(module: nn.Module, value: Tensor) -> None:
        mask = state["mask"][:, : value.shape[1], None]  # the last layer computes the first token alone
        sums[module] = sums.get(module, 0) + (value.float().abs() * mask).sum((0, 1))
        counts[module] = counts.get(module, 0) + mask.sum()

    handles = []
    for layer in model.layers:
        if layer.attention.heads:
            for module in (layer.attention.query, layer.attention.key):
                handles.append(module.register_forward_hook(lambda m, _, y: add(m, y)))
            handles.append(layer.attention.output.register_forward_pre_hook(lambda m, x: add(m, x[0])))
        handles += [ffn.down.register_forward_pre_hook(lambda m, x: add(m, x[0])) for ffn in layer.ffns if ffn.up is not None]
    try:
        model.eval()
        for batch in in_order(texts, SCORE_BATCH):
            state["mask"] = batch.attention_mask
            model.outputs(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {module: total / counts[module] for module, total in sums.items()}


def top(scores: Tensor, count: int) -> list[int]:
    """The ``count`` highest, in their old order."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def ones_at(model: Encoder, kept: list[list[list[int]]]) -> list[Tensor]:
    """Gates [A d] per layer: 1 at the kept dimensions of each head."""
    gates = []
    for layer, heads in zip(model.layers, kept, strict=True):
        mask = torch.zeros(layer.attention.heads, layer.attention.head_size)
        for head, dims in enumerate(heads):
            mask[head, dims] = 1.0
        gates.append(mask.flatten())
    return gates
