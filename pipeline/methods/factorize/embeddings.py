"""Factorized embeddings: the word table becomes the product of two thin matrices, then heals.

Source: Lan et al. 2020, ALBERT, arXiv:1909.11942 §3.1, applied to a trained model. The table W [V, H] is cut by its
singular value decomposition, W ~ (U_r S_r^1/2) (S_r^1/2 V_r^T): a table [V, r] and a map [r, H]. By Eckart and Young
no other product of rank r is nearer to W. At full rank nothing changes.

Where a map already follows the table (a factorized or trigram input), the new factor is multiplied into it, so that
no matrix is added. After the cut the model learns the teacher's outputs again for a while.

What this file does not do: factorize the tables of ALBERT and ELECTRA, which are factorized already and hold their
positions in the small space.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from pipeline.flow.stage import Context, Stage
from pipeline.learning.distillation import Distillation
from pipeline.learning.evaluation import describe, subject
from pipeline.models.config import EncoderConfig
from pipeline.models.encoder import Encoder
from runtimes.errors import BadInput


class FactorizeEmbeddings(Stage):
    """Cut the word table to a lower rank and heal by distillation."""

    use: ClassVar[str] = "factorize-embeddings"
    needs: ClassVar[tuple[str, ...]] = ("model", "teacher")
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "Lan et al. 2020, ALBERT, arXiv:1909.11942 (factorized embedding parameterization)"
    effect: ClassVar[str] = "A thinner word table: smaller files; speed about unchanged."

    rank: int = Field(64, ge=1)
    """Width of the new word table."""
    heal: Distillation = Distillation(epochs=2.0, learning_rate=5e-4)
    """How the model learns the teacher's outputs again after the cut."""

    def run(self, context: Context) -> None:
        checkpoint, teacher = context.load("model"), context.load("teacher")
        if checkpoint.tokenizer_json != teacher.tokenizer_json:
            raise BadInput("factorize-embeddings: model and teacher tokenize differently, so the teacher cannot heal the model")
        torch.manual_seed(context.seed)
        model = factorize(checkpoint.model, self.rank)
        if self.heal.epochs:
            cut = subject(context, checkpoint.with_model(model), "cut")
            context.note(f"cut to rank {self.rank}, before healing: {describe(context, cut.metrics['validation'])} on validation")
        self.heal.distill(context, model, teacher, f"{self.use}: healing")
        made = checkpoint.with_model(model.eval())
        made.save(context.output / "model", context.task.max_length)
        context.subjects.append(subject(context, made, f"embeddings of rank {self.rank}"))


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of rank ``rank``: [V, E] -> ([V, r], [r, E]), both factors of the same scale."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    root = singular[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def factorize(model: Encoder, rank: int) -> Encoder:
    """The model with a word table of width ``rank``.

    Raises:
        BadInput: a rank above the table's, or a model whose table is factorized already (ALBERT, ELECTRA).
    """
    config = model.config
    if config.embedding_projection == "sum":
        raise BadInput("factorize-embeddings: this model's word table is factorized already; leave the stage out")
    if rank > min(config.embedding_size, config.vocab_size):
        raise BadInput(f"factorize-embeddings.rank: {rank} is above the table's {min(config.embedding_size, config.vocab_size)}")
    table, factor = truncated_svd(model.embeddings.word.weight.detach(), rank)
    weights = model.state_dict()
    weights["embeddings.word.weight"] = table.contiguous()
    changes: dict[str, object] = {"embedding_size": rank}
    if config.embedding_projection == "none":
        weights["embeddings.projection.weight"] = factor.T.contiguous()
        changes |= {"embedding_projection": "word", "embedding_projection_bias": False}
    else:
        old = weights["embeddings.projection.weight"]  # [H, E] or, for trigrams, [H, 3 E]
        blocks = old.unflatten(1, (-1, config.embedding_size)) @ factor.T
        weights["embeddings.projection.weight"] = blocks.flatten(1).contiguous()
    made = Encoder(EncoderConfig(**config.to_dict() | changes))
    made.load_state_dict(weights)
    return made.eval()
