"""Magnitude pruning: the smallest weights of every matrix become zero.

Source: Gordon, Duh, Andrews 2020, "Compressing BERT: Studying the Effects of Weight Pruning on Transfer Learning",
RepL4NLP, arXiv:2002.08307; the schedule is that of Zhu and Gupta 2017, arXiv:1710.01878 eq. 1.

Each matrix W of the layers, the pooler and the word table has a mask of its own, M = 1[|W| > tau], tau being the
floor(s numel)-th smallest |W| of that very matrix. Biases, norms, positions, token types and the classifier are spared.

    s_t = s_f (1 - (1 - t/T)^3)                  gradual: from 0 to s_f over the first part of the training

``one-shot`` prunes at once and trains afterwards; ``random`` is the control: as many weights, drawn by lot. A weight that was
pruned never returns. With ``block = [1, 4]`` whole runs of four weights along a row go together, by the sum of their |W|,
which a sparse kernel can use where one exists.

What it brings: a smaller download, because zeros compress. Not a smaller file, not a faster one: ONNX Runtime and TFLite
multiply by zero as by any number.

What this file does not do: prune in pre-training, where the paper does it; the task is what this package has data for.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.flow.stage import QUATERNIONS, ZEROS, Context, Stage
from pipeline.learning.distillation import steps_of
from pipeline.learning.download import download_bytes
from pipeline.learning.healing import Healing, leave
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder
from pipeline.models.inference import predict
from pipeline.models.surgery import probe_texts, require_same
from pipeline.tasks.batches import Batch, EncodedTexts
from runtimes.errors import GateFailed

RAMP = 0.7
"""Share of the steps in which a gradual schedule reaches its end."""
UPDATE_STEPS = 10


class PruneMagnitude(Stage):
    """Set the smallest weights of every matrix to zero, gradually, while the model learns."""

    use: ClassVar[str] = "prune-magnitude"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({ZEROS})
    refuses: ClassVar[dict[str, str]] = {QUATERNIONS: "their signed blocks are no ordinary matrices; prune before"}
    paper: ClassVar[str] = "Gordon et al. 2020, Compressing BERT, arXiv:2002.08307"
    equations: ClassVar[str] = (
        "In every matrix the floor(s numel) weights of smallest magnitude are zero; s rises from 0 to its final value by s_f (1 - (1 - t/T)^3)."
    )
    effect: ClassVar[str] = "A smaller download after compression; file size, memory and speed as before (zeros are stored and multiplied)."

    sparsity: float = Field(0.4, ge=0, lt=1)
    """Share of zeros in every pruned matrix (paper: 30 to 40 % without loss)."""
    schedule: Literal["gradual", "one-shot", "random"] = "gradual"
    """``gradual`` prunes while the model learns, ``one-shot`` before, ``random`` before and by lot."""
    embeddings: bool = True
    """Prune the word table too."""
    block: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Rows and columns of the blocks that are zero together; a matrix must divide into them, or is pruned weight by weight."""
    heal: Healing = Healing(epochs=3.0)
    """How the model learns while and after it is pruned; ``epochs = 0`` prunes at once and trains nothing."""

    def run(self, context: Context) -> None:
        unpruned = context.load("model")
        masked = Masked(context.load("model").model, self.embeddings, self.block)
        torch.manual_seed(context.seed)
        if self.schedule == "random":
            masked.draw(self.sparsity)
        elif self.schedule == "one-shot" or not self.heal.epochs:
            masked.update(self.sparsity)
        masked.apply_masks()
        if self.heal.epochs:
            self._train(context, masked, unpruned)
        model = masked.model.eval()
        probes = probe_texts(context.encode(unpruned, "validation"))
        require_same(masked_outputs(unpruned.model, model, masked.named_masks(), probes), model, probes, self.use)
        wrong = [name for name, mask in masked.named_masks().items() if int((model.get_parameter(name) == 0).sum()) != int((~mask).sum())]
        if wrong:
            raise GateFailed(f"{self.use}: {len(wrong)} matrices have other zeros than their masks say, first {wrong[0]}")
        shares = [float((~mask).float().mean()) for mask in masked.named_masks().values()]
        context.note(f"zeros in {len(shares)} matrices: {min(shares):.3%} to {max(shares):.3%}")
        before, after = download_bytes(unpruned.model), download_bytes(model)
        context.note(f"int8 weights after zstd -19: {after / 1e6:.2f} MB, {before / 1e6:.2f} MB unpruned; files and speed are as before")
        leave(context, unpruned, model, f"{self.sparsity:.0%} of weights zero ({self.schedule})")

    def _train(self, context: Context, masked: Masked, unpruned: Checkpoint) -> None:
        lesson = self.heal.whom(context, unpruned)
        total = steps_of(self.heal, lesson.texts, self.heal.epochs)

        def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
            return lesson.loss(module.model.outputs(batch), batch), {}

        def after_step(step: int, optimizer: Any) -> None:
            if self.schedule == "gradual" and (step % UPDATE_STEPS == 0 or step == total):
                masked.update(cubic(step, RAMP * total, self.sparsity))
            masked.apply_masks()

        plan = TrainingPlan(self.heal.epochs, self.heal.batch_size, self.heal.learning_rate, context.seed + 1)
        train(TrainingJob(masked, lesson.texts, loss, plan, context.work / "pruning", context.progress, self.use, after_step=after_step))


def cubic(step: float, ramp: float, final: float) -> float:
    """Sparsity after ``step`` of ``ramp`` steps: 0 at first, ``final`` from the end of the ramp on."""
    return final if step >= ramp else final * (1 - (1 - step / ramp) ** 3)


def smallest(weight: Tensor, sparsity: float, block: tuple[int, int] = (1, 1)) -> Tensor:
    """Mask [out, in], True for weights that stay: the floor(sparsity count) smallest go, of equal ones those that come first."""
    scores = block_sums(weight.detach().abs(), block)
    flat = scores.flatten().numpy()
    gone = int(sparsity * flat.size)
    if not gone:
        return torch.ones_like(weight, dtype=torch.bool)
    tau = np.partition(flat, gone - 1)[gone - 1]  # sorting a word table takes ten times as long
    stays = flat > tau
    equal = np.flatnonzero(flat == tau)
    stays[equal[gone - np.count_nonzero(flat < tau) :]] = True
    return spread(torch.from_numpy(stays).view_as(scores), block)


def block_sums(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Sums over blocks, [out / rows, in / columns]."""
    rows, columns = block
    return values.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).sum(dim=(1, 3))


def spread(mask: Tensor, block: tuple[int, int]) -> Tensor:
    """One entry per block as one per weight."""
    return mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


class Masked(nn.Module):
    """A model and the masks of its matrices, which lie in buffers and so in every checkpoint."""

    def __init__(self, model: Encoder, embeddings: bool, block: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.wanted = 0.0
        self.block = block
        names = {id(p): name for name, p in reversed(list(model.named_parameters())) if prunable(name, p, embeddings)}
        self.names = sorted(names.values())
        for number, name in enumerate(self.names):
            self.register_buffer(f"mask_{number}", model.get_parameter(name) != 0)

    def named_masks(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"mask_{number}") for number, name in enumerate(self.names)}

    @torch.no_grad()
    def update(self, sparsity: float) -> None:
        """Prune to ``sparsity``. Weights that are zero are the smallest, so none returns."""
        for name, mask in self.named_masks().items():
            weight = self.model.get_parameter(name)
            mask.copy_(smallest(weight * mask, sparsity, self._block(weight)))

    @torch.no_grad()
    def draw(self, sparsity: float) -> None:
        """Masks by lot."""
        for name, mask in self.named_masks().items():
            weight = self.model.get_parameter(name)
            mask.copy_(smallest(torch.rand_like(weight) * (weight != 0), sparsity, self._block(weight)))  # what is zero counts

    @torch.no_grad()
    def apply_masks(self) -> None:
        for name, mask in self.named_masks().items():
            self.model.get_parameter(name).mul_(mask)

    def _block(self, weight: Tensor) -> tuple[int, int]:
        return self.block if not (weight.shape[0] % self.block[0] or weight.shape[1] % self.block[1]) else (1, 1)


def prunable(name: str, parameter: Tensor, embeddings: bool) -> bool:
    """Whether the paper prunes it: matrices of the layers and the pooler, and the word table."""
    if parameter.ndim != 2 or not parameter.numel():
        return False
    return name.startswith(("layers.", "pooler.")) or (embeddings and name == "embeddings.word.weight")


class _Times(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def masked_outputs(unpruned: Encoder, pruned: Encoder, masks: dict[str, Tensor], texts: EncodedTexts) -> dict[str, Tensor]:
    """Outputs of a model whose weights are those of ``pruned`` where they stay and of ``unpruned`` elsewhere, run as M * W."""
    mixed = Encoder(pruned.config)
    mixed.load_state_dict(pruned.state_dict())
    for name, mask in masks.items():
        owner, _, leaf = name.rpartition(".")
        module = mixed.get_submodule(owner)
        with torch.no_grad():
            getattr(module, leaf).copy_(torch.where(mask, pruned.get_parameter(name), unpruned.get_parameter(name)))
        parametrize.register_parametrization(module, leaf, _Times(mask))
    return predict(mixed, texts)
