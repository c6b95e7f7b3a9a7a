"""MobileBERT: a thin student with bottlenecks learns a teacher layer by layer, then its answers.

Source: Sun et al. 2020, "MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices", arXiv:2004.02984.

The student (§3.1, §3.2) keeps a narrow feature map between layers and works in a narrower bottleneck inside them,
with several small feed-forward networks in a row; its operators are those a phone runs fast (NoNorm, ReLU); word
embeddings are small and joined with their neighbours' (trigrams).

Knowledge transfer (§3.3, §3.4):

- feature maps: the mean squared difference of normalised feature maps, layer for layer;
- attention: the divergence of attention distributions, head for head;
- progressive: one layer after another, the layers below learning ten times slower, those above not at all;
  ``joint``: all layers at once;
- then the logits, with all weights.

Two things differ from the paper, because any BERT may be the teacher here and not only the inverted-bottleneck one:
where widths differ a linear map per layer, thrown away afterwards, takes the student's feature map to the teacher's
(as TinyBERT does, arXiv:1909.10351), and where the teacher has more layers or heads, every layer of the student
follows one of the teacher's, and every head the mean of a group of heads.

Word embeddings start as the teacher's, projected on their principal directions.

What this file does not do: pre-training. The student learns one task.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.checkpoint import Checkpoint
from pipeline.methods.distill.logits import LogitDistillation, teacher_outputs
from pipeline.methods.distill.losses import attention_loss, feature_map_loss
from pipeline.methods.distill.teacher import TeacherOutputs, valid_pairs
from pipeline.models.config import EncoderConfig, layer_shape
from pipeline.models.encoder import Encoder
from pipeline.stage import Context, Stage
from pipeline.tasks.batches import Batch, EncodedTexts
from pipeline.training import TrainingJob, TrainingPlan, train

PAST_RATE = 0.1
"""Learning-rate factor of the layers below the one that is learning (released code of the paper)."""


class DistillMobilebert(LogitDistillation, Stage):
    """Distil the teacher into a MobileBERT-style student."""

    use: ClassVar[str] = "distill-mobilebert"
    needs: ClassVar[tuple[str, ...]] = ("teacher",)
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
    transfer: Literal["progressive", "joint", "none"] = "progressive"
    """How feature maps and attention are learned before the logits."""
    transfer_epochs: float = Field(12.0, ge=0)
    """Passes over the training texts for that."""
    feature_weight: float = Field(1.0, ge=0)
    attention_weight: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _heads_fit(self) -> DistillMobilebert:
        if self.bottleneck_size % self.heads:
            raise ValueError(f"bottleneck_size {self.bottleneck_size} is not a multiple of heads {self.heads}")
        return self

    def run(self, context: Context) -> None:
        teacher = Checkpoint.load(context.folder("teacher"))
        torch.manual_seed(context.seed)
        student = make_student(self, teacher.model, context.task.max_length)
        layers = layer_map(teacher.model.config.num_hidden_layers, self.layers)
        if self.transfer != "none" and self.transfer_epochs:
            texts = teacher.encode(context.data.train, context.label_index, context.task.max_length)
            outputs = teacher_outputs(context, teacher, texts, layers, self.heads)
            transfer_knowledge(self, context, student, teacher.model.config.hidden_size, texts, outputs)
        self.distill_logits(context, student, teacher, f"{self.use}: logits")
        made = Checkpoint(student.eval(), teacher.tokenizer_json, teacher.tokenizer_config)
        made.save(context.output / "model", context.task.max_length)
        context.subjects.append(made.subject("student", context))


def layer_map(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """For each student layer the 1-based teacher layer it follows: evenly spaced, the last one the last.

    TinyBERT's g(m) = m N / M (arXiv:1909.10351 eq. 6), rounded up where M does not divide N.
    """
    return tuple(math.ceil(m * teacher_layers / student_layers) for m in range(1, student_layers + 1))


def make_student(options: DistillMobilebert, teacher: Encoder, max_length: int) -> Encoder:
    """A student of the asked shape with random layers and the teacher's word embeddings, reduced."""
    projection = "trigram" if options.trigram_input else "word"
    config = EncoderConfig(
        vocab_size=teacher.config.vocab_size, hidden_size=options.hidden_size, embedding_size=options.embedding_size,
        embedding_projection=projection,
        layers=[
            layer_shape(options.heads, options.bottleneck_size // options.heads, [options.ffn_size] * options.stacked_ffns)
            for _ in range(options.layers)
        ],
        bottleneck_size=options.bottleneck_size, norm=options.norm, activation=options.activation, pooler="none",
        max_position_embeddings=max_length, type_vocab_size=0, pad_token_id=teacher.config.pad_token_id,
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


def principal_embeddings(table: Tensor, size: int, scale: float = 0.5) -> Tensor:
    """Word table [V, E] on its first ``size`` principal directions [V, size], with standard deviation ``scale``.

    Directions beyond E are filled with noise of the same scale.
    """
    left, singular, _ = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    reduced = left[:, :size] * singular[:size]
    reduced = reduced * (scale / reduced.std())
    missing = size - reduced.shape[1]
    return reduced if missing <= 0 else torch.cat([reduced, torch.randn(len(table), missing) * scale], dim=1)


def transfer_knowledge(
    options: DistillMobilebert, context: Context, student: Encoder, teacher_width: int, texts: EncodedTexts, outputs: TeacherOutputs
) -> None:
    """Draw the student's feature maps and attention to the teacher's, in place."""
    count = options.layers
    same_width = teacher_width == options.hidden_size
    maps = nn.ModuleList(nn.Identity() if same_width else nn.Linear(options.hidden_size, teacher_width) for _ in range(count))
    module = nn.ModuleDict({"student": student, "maps": maps})
    steps = round(options.transfer_epochs * math.ceil(len(texts) / options.batch_size))
    progressive = options.transfer == "progressive"

    def phase(step: int) -> int:
        return min(count - 1, step * count // max(1, steps))

    def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
        active = [phase(step)] if progressive else list(range(count))
        out = module["student"](
            batch.input_ids, batch.attention_mask, output_hidden_states=True, output_attention_scores=True, stop_after=active[-1] + 1
        )
        wanted = outputs.features(batch)
        real, pairs = batch.attention_mask.bool(), valid_pairs(batch.attention_mask)
        feature = attention = torch.zeros(())
        for layer in active:
            mapped = module["maps"][layer](out.hidden_states[layer + 1][real])
            feature = feature + feature_map_loss(mapped, wanted.hidden[:, layer]) / len(active)
            scores = functional.log_softmax(out.attention_scores[layer].float(), -1).permute(0, 2, 3, 1)[pairs]
            attention = attention + attention_loss(scores, wanted.attention[:, layer], real.sum()) / len(active)
        total = options.feature_weight * feature + options.attention_weight * attention
        return total, {"feature_maps": feature.item(), "attention": attention.item()}

    def rate(step: int, group: str) -> float:
        layer, now = int(group), phase(step)
        return 1.0 if layer == now else PAST_RATE if layer < now else 0.0

    # The embeddings learn with the first layer: unlike the paper's, they are not the teacher's own.
    groups = {
        str(i): [*student.layers[i].parameters(), *maps[i].parameters(), *(student.embeddings.parameters() if i == 0 else ())]
        for i in range(count)
    }
    plan = TrainingPlan(
        options.transfer_epochs, options.batch_size, options.learning_rate, context.seed, rate_rule=rate if progressive else None
    )
    train(TrainingJob(module, texts, loss, plan, context.work / "transfer", context.progress, f"{options.use}: {options.transfer}", groups))
