"""Head pruning by gradient importance: remove the attention heads that the loss would miss least.

Source: Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", NeurIPS, arXiv:1905.10650.

Every head h gets a gate, MHAtt(x) = sum_h xi_h Att_h(x) (eq. 2). Its importance is the expected size of the loss's
gradient at xi = 1 (eq. 5)::

    I_h = E_x |dL(x) / dxi_h|

over labelled training texts, in evaluation mode. Scores are divided by their l2 norm within each layer, all heads are
ranked together, and the lowest go. The authors' code takes the absolute value per token before it sums over the text,
which is larger and not the gradient of a gate; ``importance = "token"`` does that.

With ``rounds`` above 1 the importance is estimated again after each part of the cut ("exact" pruning in the authors' code).
A layer may lose all its heads; the bias behind them is what stays.

Example: 6 layers of 12 heads, ``fraction = 0.5``: 36 heads go, from some layers three, from others ten. In MiniLM a head
holds 4 * 32 * 384 + 3 * 32 = 49,248 parameters.

What this file does not do: prune below head level (:mod:`pipeline.methods.prune.neurons`), or learn gates
(:mod:`pipeline.methods.prune.gates`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.flow.stage import UNEQUAL_LAYERS, Context, Stage, not_on_shared_or_quaternions
from pipeline.learning.healing import Healing, leave, train_texts
from pipeline.models.encoder import Encoder
from pipeline.models.gated import gated
from pipeline.models.inference import predict
from pipeline.models.surgery import keep_heads, probe_texts, require_same
from pipeline.tasks.batches import Batch, EncodedTexts, in_order
from runtimes.errors import BadInput, GateFailed

IMPORTANCE_BATCH = 64
Loss = Callable[[Mapping[str, Tensor], Batch], Tensor]


class PruneHeads(Stage):
    """Remove the attention heads whose gates the loss feels least, and heal."""

    use: ClassVar[str] = "prune-heads"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({UNEQUAL_LAYERS})
    refuses: ClassVar[dict[str, str]] = not_on_shared_or_quaternions("heads")
    paper: ClassVar[str] = "Michel et al. 2019, Are Sixteen Heads Really Better than One?, arXiv:1905.10650"
    equations: ClassVar[str] = (
        "Each head's output is multiplied by a gate of 1; a head's importance is the mean absolute gradient of the loss with respect to its "
        "gate (eq. 5), divided by the l2 norm of its layer's scores; the lowest of all layers go."
    )
    effect: ClassVar[str] = "Smaller dense attention matrices: smaller and faster in every runtime; half the heads are about a sixth of a BERT layer."

    fraction: float = Field(0.5, ge=0, lt=1)
    """Share of all heads that go (paper: 20 to 40 % without loss)."""
    rounds: int = Field(1, ge=1)
    """In so many equal parts, with the importance estimated before each."""
    importance: Literal["gate", "token"] = "gate"
    """``gate``: eq. 5, absolute value per text; ``token``: absolute value per token, as the authors' code has it."""
    min_heads_per_layer: int = Field(0, ge=0)
    """Heads that every layer keeps at least."""
    importance_texts: int = Field(4096, ge=1)
    """Training inputs over which importance is estimated."""
    heal: Healing = Healing()
    """How the model learns again after the cut."""

    @property
    def without_labels(self) -> str:
        return 'take prune-gates with heads and select = "l0", which learns from the unpruned model'

    def run(self, context: Context) -> None:
        unpruned = context.load("model")
        shapes = [layer["heads"] for layer in unpruned.model.config.layers]
        if self.min_heads_per_layer > min(shapes):
            raise BadInput(f"{self.use}.min_heads_per_layer: {self.min_heads_per_layer}, but a layer has {min(shapes)} heads")
        texts = train_texts(context, unpruned, self.importance_texts)
        probes = probe_texts(context.encode(unpruned, "validation"))
        wanted = round(self.fraction * sum(shapes))
        model, gone = unpruned.model, 0
        for number in range(1, self.rounds + 1):
            now = round(wanted * number / self.rounds) - gone
            scores = head_importance(model, texts, context.task.loss, per_token=self.importance == "token")
            kept = heads_to_keep(scores, now, self.min_heads_per_layer)
            model = cut_heads(model, kept, probes, self.use)
            gone = sum(shapes) - sum(map(len, kept))
        if gone < wanted:
            raise GateFailed(f"{self.use}: {wanted} of {sum(shapes)} heads are to go, but min_heads_per_layer lets only {gone} go")
        context.note(f"heads left per layer: {', '.join(str(layer['heads']) for layer in model.config.layers)} of {shapes[0]}")
        self.heal.heal(context, model, unpruned, f"{self.use}: healing")
        leave(context, unpruned, model, f"{gone} of {sum(shapes)} heads pruned")


def head_importance(model: Encoder, texts: EncodedTexts, loss: Loss, per_token: bool = False) -> list[Tensor]:
    """I_h of eq. 5 for every layer, each [A], not normalised.

    Args:
        loss: of outputs and a batch, a mean over the batch.
        per_token: take the absolute value of each token's part before summing over the text.
    """
    model.eval()
    layers = [layer.attention.heads for layer in model.layers]
    sums = [torch.zeros(heads) for heads in layers]
    for batch in in_order(texts, IMPORTANCE_BATCH):
        shape = batch.input_ids.shape if per_token else batch.input_ids.shape[:1]
        gates = [torch.ones(*shape, heads, requires_grad=True) for heads in layers]
        with gated(model, gates):
            total = loss(model.outputs(batch), batch) * len(batch.rows)
        gradients = torch.autograd.grad(total, [g for g in gates if g.shape[-1]])
        found = iter(gradients)
        for importance, heads in zip(sums, layers, strict=True):
            if heads:
                importance += next(found).abs().flatten(0, -2).sum(0)
    return [importance / len(texts) for importance in sums]


def heads_to_keep(scores: list[Tensor], count: int, min_per_layer: int = 0) -> list[list[int]]:
    """The heads that stay when the ``count`` lowest go, by score over the layer's l2 norm (eps 1e-20, as the authors have it)."""
    ranked = sorted(
        (float(score), layer, head)
        for layer, layer_scores in enumerate(scores)
        for head, score in enumerate(layer_scores / (layer_scores.square().sum().sqrt() + 1e-20))
    )
    kept = [set(range(len(layer_scores))) for layer_scores in scores]
    for _, layer, head in ranked:
        if count and len(kept[layer]) > min_per_layer:
            kept[layer].remove(head)
            count -= 1
    return [sorted(heads) for heads in kept]


def cut_heads(model: Encoder, kept: list[list[int]], probes: EncodedTexts, what: str) -> Encoder:
    """``model`` with the heads ``kept``, held against the same model with the others' gates closed."""
    masks = [torch.zeros(layer.attention.heads) for layer in model.layers]
    for mask, heads in zip(masks, kept, strict=True):
        mask[heads] = 1.0
    with gated(model, masks):
        expected = predict(model, probes)
    cut = keep_heads(model, kept)
    require_same(expected, cut, probes, what)
    return cut
