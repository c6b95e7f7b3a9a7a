"""MobileBERT: a thin student with bottlenecks learns a teacher layer by layer, then its answers.

Source: Sun et al. 2020, "MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices", arXiv:2004.02984.

The student (§3.1, §3.2) keeps a narrow feature map between layers and works in a narrower bottleneck inside them,
with several small feed-forward networks in a row; its operators are those a phone runs fast (NoNorm, ReLU); word
embeddings are small and joined with their neighbours' (trigrams).

Knowledge transfer (§3.3, §3.4): feature maps and attention layer by layer (:mod:`pipeline.learning.knowledge_transfer`), then
the outputs, with all weights.

Word embeddings start as the teacher's, projected on their principal directions.

What this file does not do: pre-training. The student learns one task.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.flow.stage import Context, Stage
from pipeline.learning.distillation import Distillation
from pipeline.learning.evaluation import subject
from pipeline.learning.knowledge_transfer import KnowledgeTransfer
from pipeline.models.config import EncoderConfig, layer_shape
from pipeline.models.encoder import Encoder
from pipeline.tasks.base import Task


class DistillMobilebert(Stage):
    """Distil the teacher into a MobileBERT-style student."""

    use: ClassVar[str] = "distill-mobilebert"
    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "Sun et al. 2020, MobileBERT, arXiv:2004.02984"
    effect: ClassVar[str] = "A smaller and faster dense model; the recipe says how much."

    layers: int = Field(4, ge=1)
    """Layers of the student."""
    hidden_size: int = Field(256, ge=4)
    """Width of the feature map between layers."""
    bottleneck_size: int = Field(128, ge=4)
    """Width inside a layer."""
    heads: int = Field(4, ge=1)
    """Attention heads per layer; they share the bottleneck's width."""
    ffn_size: int = Field(512, ge=1)
    """Width of each feed-forward network."""
    stacked_ffns: int = Field(2, ge=1)
    """Feed-forward networks per layer."""
    embedding_size: int = Field(128, ge=1)
    """Width of the word table."""
    trigram_input: bool = True
    """Join each token's embedding with its neighbours'."""
    norm: Literal["no_norm", "layer_norm"] = "no_norm"
    """``no_norm`` is the paper's affine map without statistics; ``layer_norm`` trains more easily and runs slower."""
    activation: Literal["relu", "gelu"] = "relu"
    """Of the feed-forward networks; ``relu`` is the paper's and runs faster."""
    transfer: KnowledgeTransfer = KnowledgeTransfer(epochs=12.0)
    """How feature maps and attention are learned."""
    logits: Distillation = Distillation()
    """How the teacher's outputs are learned after them."""

    @model_validator(mode="after")
    def _heads_fit(self) -> DistillMobilebert:
        if self.bottleneck_size % self.heads:
            raise ValueError(f"bottleneck_size {self.bottleneck_size} is not a multiple of heads {self.heads}")
        return self

    def run(self, context: Context) -> None:
        teacher = context.load("teacher")
        torch.manual_seed(context.seed)
        student = make_student(self, teacher.model, context.task)
        self.transfer.transfer(context, student, teacher, self.use)
        self.logits.distill(context, student, teacher, f"{self.use}: outputs")
        made = teacher.with_model(student.eval())
        made.save(context.output / "model", context.task.max_length)
        context.subjects.append(subject(context, made, "student"))


def make_student(options: DistillMobilebert, teacher: Encoder, task: Task) -> Encoder:
    """A student of the asked shape with random layers and heads and the teacher's word embeddings, reduced."""
    projection = "trigram" if options.trigram_input else "word"
    config = EncoderConfig(
        vocab_size=teacher.config.vocab_size, hidden_size=options.hidden_size, embedding_size=options.embedding_size,
        embedding_projection=projection,
        layers=[
            layer_shape(options.heads, options.bottleneck_size // options.heads, [options.ffn_size] * options.stacked_ffns)
            for _ in range(options.layers)
        ],
        bottleneck_size=options.bottleneck_size, norm=options.norm, activation=options.activation, pooler="none",
        max_position_embeddings=task.max_length,
        type_vocab_size=2 if task.segments == 2 and teacher.config.type_vocab_size > 1 else 0, heads=student_heads(teacher),
        pad_token_id=teacher.config.pad_token_id,
        hidden_dropout=0.0, attention_dropout=0.0, classifier_dropout=0.0, family="mobilebert",
        id2label=teacher.config.id2label, label2id=teacher.config.label2id,
    )  # fmt: skip
    student = Encoder(config)
    for module in student.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    table = principal_embeddings(teacher.embeddings.word.weight.detach(), options.embedding_size)
    table[config.pad_token_id] = 0.0  # so that padding behind a text changes nothing in a trigram
    student.embeddings.word.weight.data.copy_(table)
    return student


def student_heads(teacher: Encoder) -> list[dict[str, Any]]:
    """The teacher's heads; where it gives its feature map itself, a matrix makes the student's as wide, so that both can be compared."""
    return [head | {"pooler": False, "size": head["size"] or teacher.config.hidden_size} for head in teacher.config.heads]


def principal_embeddings(table: Tensor, size: int, scale: float = 0.5) -> Tensor:
    """Word table [V, E] on its first ``size`` principal directions [V, size], with standard deviation ``scale``.

    Directions beyond E are filled with noise of the same scale.
    """
    left, singular, _ = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    reduced = left[:, :size] * singular[:size]
    reduced = reduced * (scale / reduced.std())
    missing = size - reduced.shape[1]
    return reduced if missing <= 0 else torch.cat([reduced, torch.randn(len(table), missing) * scale], dim=1)
