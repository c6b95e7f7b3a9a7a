"""Low rank without training: every matrix becomes the product of two thin ones that serves the task's own inputs best.

Source: Eckart and Young 1936; weighting by the inputs as in data-aware low-rank approximation (Chen et al. 2021, DRONE;
Yuan et al. 2023, ASVD, arXiv:2312.05821). The error that counts is that of the outputs,

    E_x |W x - W_r x|^2 = |(W - W_r) L|^2          C = E[x x^T] = L L^T over training texts

so the SVD is taken of W L = U S V^T, and W_r = (U_r S_r^1/2) (S_r^1/2 V_r^T L^-1). Ranks are chosen for all matrices together:
singular components go in the order of how much output error each parameter saves, until the asked share of parameters is
gone. A matrix whose rank would need more parameters than it has stays dense.

This is the baseline that training the ranks (:mod:`pipeline.methods.factorize.flop`) must beat.

Example: MiniLM, ``removed = 0.35``: 10.6 M parameters of the layers become 6.9 M; a 384 x 384 matrix is worth factoring
below rank 192, a 384 x 1536 one below 307.

What this file does not do: touch the word table (``factorize-embeddings`` does).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.flow.stage import QUATERNIONS, THIN_MATRICES, Context, Stage
from pipeline.learning.healing import Healing, leave, train_texts
from pipeline.models.encoder import Encoder
from pipeline.models.inference import predict
from pipeline.models.surgery import break_even_rank, factor, layer_matrices, probe_texts, require_same
from pipeline.tasks.batches import EncodedTexts, in_order
from runtimes.errors import BadInput, GateFailed

RIDGE = 1e-3
"""Share of the mean input power that is added to every direction, so that directions never seen are not free."""
INPUT_BATCH = 64


class FactorizeSvd(Stage):
    """Replace matrices by products of two thin ones, chosen by what they do to the task's own inputs."""

    use: ClassVar[str] = "factorize-svd"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({THIN_MATRICES})
    refuses: ClassVar[dict[str, str]] = {
        QUATERNIONS: "they hold a quarter of the weights already, in a pattern that a product would break",
        THIN_MATRICES: "they are factored already",
    }
    paper: ClassVar[str] = "Eckart and Young 1936; weighted by inputs as in Chen et al. 2021, DRONE, NeurIPS"
    equations: ClassVar[str] = (
        "W L = U S V^T with L L^T the second moments of W's inputs; W becomes (U_r S_r^1/2)(S_r^1/2 V_r^T L^-1), the ranks r such that the "
        "output error per parameter saved is least."
    )
    effect: ClassVar[str] = "Two thin matrices for one: smaller, and faster where the rank is well below break-even; dense where it is not."

    removed: float = Field(0.35, gt=0, lt=1)
    """Share of the parameters of the layers' matrices that goes; ranks follow."""
    rank: int | None = Field(None, ge=1)
    """The same rank for every matrix instead; a matrix whose break-even rank is not above it stays dense."""
    input_texts: int = Field(1024, ge=1)
    """Training inputs that weigh the error."""
    heal: Healing = Healing(epochs=0.0)
    """How the model learns again after the cut."""

    def run(self, context: Context) -> None:
        unpruned = context.load("model")
        model = unpruned.model
        moments = input_moments(model, train_texts(context, unpruned, self.input_texts))
        parts = {name: Components(model.get_submodule(name).weight.detach(), moments[name]) for name in moments}
        if self.rank is None:
            ranks = ranks_for(parts, self.removed)
        else:
            ranks = {name: self.rank for name, part in parts.items() if self.rank <= part.break_even}
        if not ranks:
            raise BadInput(f"{self.use}: every matrix would stay dense; its break-even rank is at most {max(p.break_even for p in parts.values())}")
        factors = {name: parts[name].cut(rank) for name, rank in ranks.items()}
        cut = factor(model, factors)
        probes = probe_texts(context.encode(unpruned, "validation"))
        require_same(products_logits(model, factors, probes), cut, probes, self.use)
        describe_ranks(context, parts.keys() - ranks.keys(), ranks, len(parts))
        self.heal.heal(context, cut, unpruned, f"{self.use}: healing")
        size = f"{self.removed:.0%} removed" if self.rank is None else f"rank {self.rank}"
        leave(context, unpruned, cut, f"low rank by SVD, {size}")


class Components:
    """A matrix [out, in] cut into components in the order of what they do to its outputs; ``moments`` [in, in] is E[x x^T]."""

    def __init__(self, weight: Tensor, moments: Tensor) -> None:
        self.shape = weight.shape
        power = moments.double()
        power = power + RIDGE * power.diagonal().mean() * torch.eye(len(power), dtype=torch.float64)
        self._root = torch.linalg.cholesky(power)
        self._left, self.singular, self._right = torch.linalg.svd(weight.double() @ self._root, full_matrices=False)

    @property
    def break_even(self) -> int:
        return break_even_rank(self.shape[1], self.shape[0])

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """(outer [out, r], inner [r, in]), both of the same scale."""
        root = self.singular[:rank].sqrt()
        inner = torch.linalg.solve_triangular(self._root, root[:, None] * self._right[:rank], upper=False, left=False)
        return (self._left[:, :rank] * root).float().contiguous(), inner.float().contiguous()


@torch.no_grad()
def input_moments(model: Encoder, texts: EncodedTexts) -> dict[str, Tensor]:
    """E[x x^T] over the real tokens of ``texts`` for every matrix of the layers, by name, in float64."""
    names = layer_matrices(model)
    sums: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def add(module, inputs, name=name) -> None:
            x = inputs[0]
            real = x[state["mask"][:, : x.shape[1]].bool()].float()
            sums[name] = sums.get(name, 0) + (real.T @ real).double()

        handles.append(model.get_submodule(name).register_forward_pre_hook(add))
    try:
        model.eval()
        for batch in in_order(texts, INPUT_BATCH):
            state["mask"] = batch.attention_mask
            model(batch.input_ids, batch.attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return {name: sums[name] / len(texts.ids) for name in names}


def ranks_for(parts: dict[str, Components], removed: float) -> dict[str, int]:
    """Ranks of the matrices that are factored when ``removed`` of all parameters are to go.

    Components go by the output error that each saves per parameter, s^2/(in + out) relative to the matrix' whole output.
    A matrix left above its break-even rank stays dense, and the others give more, until the share is reached.

    Raises:
        GateFailed: even rank 1 everywhere removes less, with the share that does.
    """
    total = sum(p.shape[0] * p.shape[1] for p in parts.values())
    least = sum(min(sum(p.shape), p.shape[0] * p.shape[1]) for p in parts.values())
    if total - least < removed * total:
        raise GateFailed(f"factorize-svd: rank 1 everywhere would remove {1 - least / total:.1%}, {removed:.1%} is asked for")
    values = torch.cat([p.singular**2 / (p.singular**2).sum() / sum(p.shape) for p in parts.values()])
    low, high = 0.0, float(values.max())
    for _ in range(60):  # bisection on the price of a parameter
        price = (low + high) / 2
        ranks = _ranks_at(parts, price)
        size = sum(ranks[n] * sum(p.shape) if n in ranks else p.shape[0] * p.shape[1] for n, p in parts.items())
        if size > (1 - removed) * total:
            low = price
        else:
            high = price
    return _ranks_at(parts, high)


def _ranks_at(parts: dict[str, Components], price: float) -> dict[str, int]:
    ranks = {}
    for name, part in parts.items():
        kept = int((part.singular**2 / (part.singular**2).sum() / sum(part.shape) > price).sum())
        if kept <= part.break_even:
            ranks[name] = max(1, kept)
    return ranks


def products_logits(model: Encoder, factors: dict[str, tuple[Tensor, Tensor]], texts: EncodedTexts) -> Tensor:
    """Logits of the dense model whose matrices are the products of ``factors``."""
    dense = Encoder(model.config)
    weights = model.state_dict() | {f"{name}.weight": outer @ inner for name, (outer, inner) in factors.items()}
    dense.load_state_dict(weights)
    return predict(dense, texts)


def describe_ranks(context: Context, dense: set[str], ranks: dict[str, int], count: int) -> None:
    """Note what was factored and what stays dense."""
    told = f"{len(ranks)} of {count} matrices factored, ranks {min(ranks.values())} to {max(ranks.values())}" if ranks else "no matrix factored"
    if dense:
        told += f"; {len(dense)} stay dense, their rank being above break-even: {', '.join(sorted(dense)[:4])}{', ...' if len(dense) > 4 else ''}"
    context.note(told)
