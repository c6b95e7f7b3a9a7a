"""FLOP: matrices as products whose rank is learned by closing gates on their components.

Source: Wang, Wohlwend, Lei 2020, "Structured Pruning of Large Language Models", EMNLP, arXiv:1910.04732.

W = P G Q with G = diag(z) (eq. 3): each component p_k q_k^T has a hard-concrete gate z_k (:mod:`pipeline.learning.hard_concrete`,
temperature 1). The expected share of parameters that is gone,

    s = 1 - sum (in + out) E|z|_0 / sum in out

is held at a target t by an augmented Lagrangian lambda_1 (s - t) + lambda_2 (s - t)^2, minimised over weights and gates,
maximised over both lambdas; t rises linearly at first. At the end each matrix closes round(r - E|z|_0) of its gates, the
lowest; the others keep their value sigmoid(0.8 log_alpha), which is folded into P. Where that removes more than the target,
the closed gates that are most open come back until it does not.

Where a matrix keeps more components than its break-even rank in out/(in + out), one dense matrix is smaller and faster,
and the product is multiplied out.

Two things differ from the authors' code, whose factors start at random and gates half open: here the factors are the
truncated SVD weighted by the task's inputs (:mod:`pipeline.methods.factorize.svd`), with as many components as a dense matrix
has parameters for, and gates nearly open; and the model learns from the answers of the model as it was.

Example: MiniLM, ``removed = 0.35``: a 384 x 384 matrix starts with rank 192 and may end with 90 or 160, or dense.

What this file does not do: factor the word table (``factorize-embeddings`` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.flow.amounts import Epochs, LearningRate
from pipeline.flow.stage import QUATERNIONS, THIN_MATRICES, Context, Stage
from pipeline.learning.distillation import steps_of
from pipeline.learning.hard_concrete import SizeConstraint, probability_open, sample
from pipeline.learning.healing import Healing, leave, train_texts
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.methods.factorize.svd import Components, describe_ranks, input_moments
from pipeline.models.encoder import Encoder
from pipeline.models.inference import predict
from pipeline.models.linear import LowRank
from pipeline.models.surgery import factor, layer_matrices, multiply_out, probe_texts, require_same
from pipeline.tasks.batches import Batch
from runtimes.errors import GateFailed

BETA = 1.0
SHARPER = 0.8
"""The gate without chance is sigmoid(0.8 log_alpha) (authors' code)."""
WARMUP = 0.5
"""Share of the steps in which the target rises to its value."""
REACHED = 0.02
"""How far below its target the share of removed parameters may end."""
INPUT_TEXTS = 1024
START, NOISE = 2.0, 0.01
"""First log_alpha: nearly open, because the factors are those of a trained model (authors: 0, for random ones)."""


class FactorizeFlop(Stage):
    """Learn the rank of every matrix under a target for the size, and keep what is smaller: two thin matrices or one."""

    use: ClassVar[str] = "factorize-flop"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({THIN_MATRICES})
    refuses: ClassVar[dict[str, str]] = {
        QUATERNIONS: "they hold a quarter of the weights already, in a pattern that a product would break",
        THIN_MATRICES: "they are factored already",
    }
    paper: ClassVar[str] = "Wang et al. 2020, Structured Pruning of Large Language Models (FLOP), arXiv:1910.04732"
    equations: ClassVar[str] = (
        "W = P diag(z) Q with hard-concrete gates z; task loss plus an augmented Lagrangian that holds the expected size at its target; closed "
        "components are dropped, the gates of the others folded into P."
    )
    effect: ClassVar[str] = "Two thin matrices for one: smaller, and faster where the rank is well below break-even; dense where it is not."

    removed: float = Field(0.35, gt=0, lt=1)
    """Share of the parameters of the layers' matrices that goes."""
    gate_epochs: Epochs = Field(3.0, gt=0)
    """Passes over the transfer set in which weights and gates learn together."""
    gate_learning_rate: LearningRate = 0.05
    """Learning rate of gates and multipliers."""
    heal: Healing = Healing()
    """How the model learns again after the cut."""

    def run(self, context: Context) -> None:
        unpruned = context.load("model")
        torch.manual_seed(context.seed)
        moments = input_moments(unpruned.model, train_texts(context, unpruned, INPUT_TEXTS))
        module = Factored(unpruned.model, moments)
        lesson = self.heal.whom(context, unpruned)
        steps = steps_of(self.heal, lesson.texts, self.gate_epochs)

        def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
            removed = module.expected_removed()
            outputs = module(batch)
            constraint = module.constraint(removed, self.removed * min(1.0, step / (WARMUP * steps)))
            return lesson.loss(outputs, batch) + constraint, {"removed": removed.item()}

        plan = TrainingPlan(
            self.gate_epochs, self.heal.batch_size, self.heal.learning_rate, context.seed,
            rate_rule=lambda step, group: 1.0 if group == "weights" else self.gate_learning_rate / self.heal.learning_rate,
        )  # fmt: skip
        title = f"{self.use}: gates"
        train(TrainingJob(module, lesson.texts, loss, plan, context.work / "gates", context.progress, title, module.groups()))
        probes = probe_texts(context.encode(unpruned, "validation"))
        gates = module.final_gates(self.removed)
        cut, ranks, dense = module.cut(gates)
        with module.under(gates):
            expected = predict(module.model, probes)
        require_same(expected, cut, probes, self.use)
        share = module.removed_by(ranks)
        if share < self.removed - REACHED:
            raise GateFailed(
                f"{self.use}: {share:.1%} of the parameters went, {self.removed:.1%} were asked for; more gate_epochs or a larger "
                f"gate_learning_rate may help"
            )
        describe_ranks(context, dense, {n: r for n, r in ranks.items() if n not in dense}, len(ranks))
        context.note(f"{share:.1%} of the parameters of the layers' matrices removed")
        self.heal.heal(context, cut, unpruned, f"{self.use}: healing")
        leave(context, unpruned, cut, f"learned ranks, {self.removed:.0%} removed")


class Factored(nn.Module):
    """A model whose matrices are products with a gate on every component."""

    def __init__(self, model: Encoder, moments: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = layer_matrices(model)
        self.shapes = [tuple(model.get_submodule(name).weight.shape) for name in self.names]
        factors = {}
        for name, (rows, columns) in zip(self.names, self.shapes, strict=True):
            factors[name] = Components(model.get_submodule(name).weight.detach(), moments[name]).cut(rows * columns // (rows + columns))
        self.model = factor(model, factors)
        self.log_alphas = nn.ParameterList(nn.Parameter(START + NOISE * torch.randn(len(factors[name][1]))) for name in self.names)
        self.constraint = SizeConstraint()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"weights": list(self.model.parameters()), "gates": [*self.log_alphas, *self.constraint.parameters()]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs under gates drawn for this call."""
        with self.under([sample(log_alpha, BETA) for log_alpha in self.log_alphas]):
            return self.model.outputs(batch)

    def expected_removed(self) -> Tensor:
        """s of the module docstring."""
        left = sum(sum(shape) * probability_open(a, BETA).sum() for shape, a in zip(self.shapes, self.log_alphas, strict=True))
        return 1 - left / sum(rows * columns for rows, columns in self.shapes)

    def final_gates(self, target: float = 1.0) -> list[Tensor]:
        """Gates without chance: round(r - E|z|_0) of each matrix are 0, the lowest, at least one stays.

        Args:
            target: largest share of parameters that they may remove.
        """
        made, closed = [], []
        for number, log_alpha in enumerate(a.detach() for a in self.log_alphas):
            gate = torch.sigmoid(SHARPER * log_alpha / BETA)
            zeros = min(len(gate) - 1, round(len(gate) - float(probability_open(log_alpha, BETA).sum())))
            lowest = log_alpha.argsort(stable=True)[:zeros]
            closed += [(float(log_alpha[k]), number, int(k), float(gate[k])) for k in lowest]
            gate[lowest] = 0.0
            made.append(gate)
        ranks = {name: int((gate > 0).sum()) for name, gate in zip(self.names, made, strict=True)}
        for _, number, component, value in sorted(closed, reverse=True):
            if self.removed_by(ranks) <= target:
                break
            made[number][component] = value
            ranks[self.names[number]] += 1
        return made

    def removed_by(self, ranks: dict[str, int]) -> float:
        """Share of the parameters that is gone with ``ranks``, dense where that is smaller."""
        left = sum(min(ranks[n] * sum(shape), shape[0] * shape[1]) for n, shape in zip(self.names, self.shapes, strict=True))
        return 1 - left / sum(rows * columns for rows, columns in self.shapes)

    def under(self, gates: list[Tensor]):
        """The model with its components multiplied by ``gates``, as a context."""
        return _component_gates(self.model, dict(zip(self.names, gates, strict=True)))

    @torch.no_grad()
    def cut(self, gates: list[Tensor]) -> tuple[Encoder, dict[str, int], set[str]]:
        """(the model without the components whose gate is 0, the rank of every matrix, those that are dense again)."""
        factors, ranks, dense = {}, {}, set()
        for name, shape, gate in zip(self.names, self.shapes, gates, strict=True):
            module: LowRank = self.model.get_submodule(name)
            kept = gate.nonzero().flatten()
            factors[name] = ((module.outer.weight * gate)[:, kept].contiguous(), module.inner.weight[kept].contiguous())
            ranks[name] = len(kept)
            if len(kept) * sum(shape) >= shape[0] * shape[1]:
                dense.add(name)
        return multiply_out(factor(self.model, factors), sorted(dense)), ranks, dense


@contextmanager
def _component_gates(model: Encoder, gates: dict[str, Tensor]) -> Iterator[None]:
    """Multiply the components of the named products by their gates, within the block."""

    def times(gate: Tensor):
        return lambda module, inputs: (inputs[0] * gate.to(inputs[0].dtype),)

    handles = [model.get_submodule(name).outer.register_forward_pre_hook(times(gate)) for name, gate in gates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
