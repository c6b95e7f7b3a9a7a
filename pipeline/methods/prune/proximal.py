"""Reweighted proximal pruning: weights that the loss does not defend shrink to exactly zero.

Source: Guo, Liu, Mungall, Lin, Wang 2019, "Reweighted Proximal Pruning for Large-Scale Language Representation" (RPP),
arXiv:1909.12486. Reweighting: Candes, Wakin, Boyd 2008.

The penalty gamma sum_i alpha_i |w_i| never enters Adam, whose division by the gradient's size would undo it. Each step is

    w~ = AdamW step on the loss alone
    w  = sign(w~) max(|w~| - tau_i, 0)          tau_i = gamma alpha_i                    (metric "plain")
                                                tau_i = gamma alpha_i eta/(sqrt(v_i) + eps_A)   (metric "adam": Adam's own)

and every ``reweight_steps`` steps alpha_i = 1/(|w_i| + eps), so that small weights are pushed hardest and large ones hardly:
majorise-minimise for gamma sum log(|w_i| + eps). In the first round alpha is 1, because with eps = 1e-9 a weight that
is zero stays zero. The last pattern of zeros is frozen, and the model heals.

``form`` says what shrinks as one. ``weights``: single weights, the paper's; zeros are exact but save download alone.
``blocks``: runs of four weights in a row. ``structures``: heads (their rows of Q, K, V and columns of the output) and FFN
units (a row up, a column down), by block soft-threshold w_g max(0, 1 - tau_g/|w_g|) on root mean squares; what became zero
is cut out, so shapes shrink.

with a ``sparsity``, gamma starts where a weight of that quantile would just vanish, w^2 = 2 gamma N over N steps, and is
adjusted at every reweighting to arrive there; without it, ``gamma`` stays as it is and sparsity is what comes of it.

What this file does not do: prune in pre-training, as the paper does; embeddings stay dense, as there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.flow.amounts import Epochs
from pipeline.flow.stage import QUATERNIONS, SHARED_LAYERS, UNEQUAL_LAYERS, ZEROS, Context, Stage
from pipeline.learning.distillation import steps_of
from pipeline.learning.healing import Healing, leave
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder
from pipeline.models.gated import gated
from pipeline.models.inference import predict
from pipeline.models.surgery import keep_ffn_units, keep_heads, layer_matrices, probe_texts, require_same
from pipeline.tasks.batches import Batch
from runtimes.errors import BadInput, GateFailed

EPS = 1e-9
"""In alpha = 1/(|w| + eps)."""
CHECK_STEPS = 3
"""Steps between two looks at the sparsity; groups of like size vanish together, so few."""
LATE = 1.3
"""Factor on gamma where sparsity is behind: w^2 shrinks evenly and most weights lie near the quantile, so half after 70 % is in time."""
REACHED = 0.01
"""How far below its target a sparsity may end."""
BLOCK = 4


class PruneProximal(Stage):
    """Shrink weights, blocks, or heads and units to zero by reweighted proximal steps, then heal."""

    use: ClassVar[str] = "prune-proximal"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    refuses: ClassVar[dict[str, str]] = {
        QUATERNIONS: "each of their weights serves in four places; prune before",
        SHARED_LAYERS: "cutting heads and units layer by layer would untie them; prune before sharing",
    }
    paper: ClassVar[str] = "Guo et al. 2019, Reweighted Proximal Pruning, arXiv:1909.12486"
    equations: ClassVar[str] = (
        "After each AdamW step on the loss alone, every weight is drawn towards zero by gamma/(|w| + eps), eps small, and stops exactly at zero; "
        "the weighting 1/(|w| + eps) is renewed every few steps."
    )
    effect: ClassVar[str] = "structures: smaller and faster in every runtime; weights and blocks: a smaller download, nothing else."

    form: Literal["weights", "blocks", "structures"] = "structures"
    """What shrinks as one: single weights, runs of four, or heads and FFN units."""
    sparsity: float = Field(0.4, ge=0, lt=1)
    """Share of the layers' matrices that is to become zero; gamma is adjusted to get there. 0 takes gamma as it is."""
    gamma: float = Field(1e-6, ge=0)
    """Strength of the penalty where no sparsity is asked for; 0 is AdamW."""
    prox_epochs: Epochs = Field(3.0, gt=0)
    """Passes over the transfer set with proximal steps."""
    reweight_steps: int = Field(25, ge=1)
    """Steps between two renewals of alpha."""
    metric: Literal["plain", "adam"] = "plain"
    """Size of a step: the same for all weights, or Adam's for each."""
    heal: Healing = Healing()
    """How the model learns with proximal steps, and after the zeros are frozen."""

    @property
    def leaves(self) -> frozenset[str]:
        return frozenset({UNEQUAL_LAYERS if self.form == "structures" else ZEROS})

    def run(self, context: Context) -> None:
        if self.metric == "adam" and self.form != "weights":
            raise BadInput(f"{self.use}.metric: Adam's metric belongs to single weights; form {self.form!r} takes 'plain'")
        unpruned = context.load("model")
        lesson = self.heal.whom(context, unpruned)
        total = steps_of(self.heal, lesson.texts, self.prox_epochs)
        shrinking = Shrinking(context.load("model").model, self.form)
        shrinking.start(self.gamma if not self.sparsity else shrinking.gamma_for(self.sparsity, total))

        def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
            return lesson.loss(module.model.outputs(batch), batch), {}

        def after_step(step: int, optimizer: Any) -> None:
            shrinking.prox(optimizer if self.metric == "adam" else None)
            if self.sparsity and step % CHECK_STEPS == 0 and shrinking.sparsity() >= self.sparsity:
                shrinking.freeze()
            if step % self.reweight_steps == 0:
                shrinking.reweight()
                if self.sparsity and shrinking.sparsity() < self.sparsity * (step / total) ** 2:
                    shrinking.gamma.mul_(LATE)

        plan = TrainingPlan(self.prox_epochs, self.heal.batch_size, self.heal.learning_rate, context.seed)
        job = TrainingJob(shrinking, lesson.texts, loss, plan, context.work / "prox", context.progress, self.use, after_step=after_step)
        train(job)
        reached = shrinking.sparsity()
        if reached < self.sparsity - REACHED:
            raise GateFailed(
                f"{self.use}: {reached:.1%} of the weights became zero, {self.sparsity:.1%} were asked for; the loss defends the rest. "
                f"More prox_epochs or a lower sparsity may help"
            )
        context.note(f"{reached:.1%} of the layers' weights became zero, gamma at the end {float(shrinking.gamma):.3g}")
        model = shrinking.model.eval()
        if self.form == "structures":
            model = self._cut(context, unpruned, model)
        self.heal.heal(context, model, unpruned, f"{self.use}: healing")
        leave(context, unpruned, model, f"{reached:.0%} of {self.form} shrunk to zero")

    def _cut(self, context: Context, unpruned: Checkpoint, model: Encoder) -> Encoder:
        """``model`` without the heads and units that are zero."""
        heads, units = zero_heads(model), zero_units(model)
        probes = probe_texts(context.encode(unpruned, "validation"))
        masks = [torch.tensor([0.0 if z else 1.0 for z in zero]) for zero in heads]
        with gated(model, masks, [[(~zero).float() for zero in zeros] for zeros in units]):
            expected = predict(model, probes)
        cut = keep_heads(model, [[h for h, z in enumerate(zero) if not z] for zero in heads])
        cut = keep_ffn_units(cut, [[(~zero).nonzero().flatten().tolist() for zero in zeros] for zeros in units])
        require_same(expected, cut, probes, self.use)
        left = "; ".join(f"{layer['heads']} heads, {'+'.join(map(str, layer['ffn_sizes']))} units" for layer in cut.config.layers)
        context.note(f"left per layer: {left}")
        return cut


class Family:
    """Groups of weights of one kind and size. ``parts`` view the weights as [groups, weights each]; all are scaled as one."""

    def __init__(self, parts: list[tuple[nn.Parameter, Any]], size: int) -> None:
        self.parts = parts
        self.size = size

    def magnitudes(self) -> Tensor:
        """Root mean square of every group [G]; for single weights that is |w|."""
        if self.size == 1:
            return self.parts[0][0].detach().abs().flatten()
        return (sum(view(p.detach()).square().sum(-1) for p, view in self.parts) / self.size).sqrt()

    def scale(self, factors: Tensor) -> None:
        for parameter, view in self.parts:
            viewed = view(parameter.data)
            viewed.mul_(factors.unsqueeze(-1) if self.size > 1 else factors.view_as(viewed))


def families(model: Encoder, form: str) -> list[Family]:
    """What shrinks as one, by ``form``; every weight of the layers' matrices at most once."""
    if form != "structures":
        made = []
        for name in layer_matrices(model):
            module = model.get_submodule(name)
            for weight in (module.inner.weight, module.outer.weight) if hasattr(module, "inner") else (module.weight,):
                blocks = form == "blocks" and weight.shape[1] % BLOCK == 0
                made.append(Family([(weight, lambda w: w.view(-1, BLOCK))], BLOCK) if blocks else Family([(weight, lambda w: w)], 1))
        return made
    made = []
    for layer in model.layers:
        attention = layer.attention
        if attention.heads:
            d, heads = attention.head_size, attention.heads
            rows = [_outer(getattr(attention, part)) for part in ("query", "key", "value")]
            columns = _inner(attention.output)
            parts = [(w, lambda w, h=heads: w.view(h, -1)) for w in rows]
            parts.append((columns, lambda w, h=heads, d=d: w.view(-1, h, d).transpose(0, 1)))
            # The output's columns are [B, heads, d]; seen per head they cannot be flattened in place, so they scale as [heads, B, d].
            made.append(_Heads(parts, sum(w.numel() for w in (*rows, columns)) // heads))
        for ffn in layer.ffns:
            if ffn.up is not None:
                up, down = _outer(ffn.up), _inner(ffn.down)
                made.append(Family([(up, lambda w: w), (down, lambda w: w.t())], up.shape[1] + down.shape[0]))
    return made


class _Heads(Family):
    def magnitudes(self) -> Tensor:
        return (sum(view(p.detach()).square().flatten(1).sum(-1) for p, view in self.parts) / self.size).sqrt()

    def scale(self, factors: Tensor) -> None:
        for parameter, view in self.parts:
            viewed = view(parameter.data)
            viewed.mul_(factors.view(-1, *[1] * (viewed.ndim - 1)))


def _outer(module: nn.Module) -> nn.Parameter:
    return getattr(module, "outer", module).weight


def _inner(module: nn.Module) -> nn.Parameter:
    return getattr(module, "inner", module).weight


class Shrinking(nn.Module):
    """A model with the state of its proximal steps, all of it in buffers: gamma, and alpha of every group."""

    def __init__(self, model: Encoder, form: str) -> None:
        super().__init__()
        self.model = model
        self.families = families(model, form)
        self.register_buffer("gamma", torch.zeros((), dtype=torch.float64))
        for number, family in enumerate(self.families):
            self.register_buffer(f"alpha_{number}", torch.ones_like(family.magnitudes()))

    def start(self, gamma: float) -> None:
        self.gamma.fill_(gamma)

    def gamma_for(self, sparsity: float, steps: int) -> float:
        """gamma at which a group of this quantile would vanish within ``steps``: w shrinks by gamma/w a step, w^2 by 2 gamma."""
        sizes = torch.cat([torch.full((len(f.magnitudes()),), float(f.size)) for f in self.families])
        magnitudes, order = torch.cat([f.magnitudes() for f in self.families]).sort()
        at = int(torch.searchsorted(sizes[order].cumsum(0), sparsity * sizes.sum()))
        return float(magnitudes[min(at, len(magnitudes) - 1)]) ** 2 / (2 * steps)

    def prox(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """One proximal step on every group. Where gamma has come to 0, what was zero at the last reweighting stays so."""
        if not self.gamma:
            for number, family in enumerate(self.families):
                family.scale((self.get_buffer(f"alpha_{number}") < 0.5 / EPS).float())
            return
        for number, family in enumerate(self.families):
            thresholds = float(self.gamma) * self.get_buffer(f"alpha_{number}")
            if optimizer is not None:
                thresholds = thresholds * _adam_step(optimizer, family.parts[0][0])
            magnitudes = family.magnitudes()
            family.scale(shrunk(magnitudes, thresholds) / magnitudes.clamp(min=torch.finfo(torch.float32).tiny))

    def reweight(self) -> None:
        for number, family in enumerate(self.families):
            self.get_buffer(f"alpha_{number}").copy_(1 / (family.magnitudes() + EPS))

    def freeze(self) -> None:
        """Draw no more; what is zero stays so."""
        self.reweight()
        self.gamma.zero_()

    def sparsity(self) -> float:
        """Share of the groups' weights that are zero."""
        zeros = sum(int((f.magnitudes() == 0).sum()) * f.size for f in self.families)
        return zeros / sum(len(f.magnitudes()) * f.size for f in self.families)


def shrunk(magnitudes: Tensor, thresholds: Tensor) -> Tensor:
    """max(|w| - tau, 0): the size of the proximal point of tau |w|."""
    return (magnitudes - thresholds).clamp(min=0)


def _adam_step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """eta/(sqrt(v) + eps_A) of every weight: how far Adam goes for a gradient of 1."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    state = optimizer.state[parameter]
    corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    return (group["lr"] / (corrected.sqrt() + group["eps"])).flatten()


def zero_heads(model: Encoder) -> list[list[bool]]:
    """For every head whether all it writes through is zero."""
    found = []
    for layer in model.layers:
        columns = _inner(layer.attention.output).detach().abs().sum(0).unflatten(0, (layer.attention.heads, -1)) if layer.attention.heads else []
        found.append([bool((part == 0).all()) for part in columns])
    return found


def zero_units(model: Encoder) -> list[list[Tensor]]:
    """For every FFN unit whether its column is zero."""
    return [[(_inner(ffn.down).detach() == 0).all(0) for ffn in layer.ffns] for layer in model.layers]
