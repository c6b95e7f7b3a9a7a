"""Knowledge transfer: a student's feature maps and attention are drawn to its teacher's, layer by layer.

Source: Sun et al. 2020, MobileBERT, arXiv:2004.02984 §3.3 and §3.4.

- feature maps: the mean squared difference of normalised feature maps, layer for layer;
- attention: the divergence of attention distributions, head for head;
- ``progressive``: one layer after another, the layers below learning ten times slower, those above not at all;
  ``joint``: all layers at once.

Two things differ from the paper, because any BERT may be the teacher here and not only the inverted-bottleneck one:
where widths differ a linear map per layer, thrown away afterwards, takes the student's feature map to the teacher's
(as TinyBERT does, arXiv:1909.10351), and where the teacher has more layers or heads, every layer of the student
follows one of the teacher's, and every head the mean of a group of heads.

What this file does not do: make students, or teach the logits (:mod:`pipeline.learning.distillation`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.flow.amounts import BatchSize, Epochs, LearningRate
from pipeline.flow.stage import Context
from pipeline.learning.distillation import steps_of, teacher_outputs
from pipeline.learning.losses import attention_loss, feature_map_loss
from pipeline.learning.teacher import valid_pairs
from pipeline.learning.training import TrainingJob, TrainingPlan, train
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder
from pipeline.tasks.batches import Batch

PAST_RATE = 0.1
"""Learning-rate factor of the layers below the one that is learning (released code of the paper)."""


class KnowledgeTransfer(BaseModel):
    """Options of the transfer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    order: Literal["progressive", "joint", "none"] = "progressive"
    """How feature maps and attention are learned before the outputs: one layer after another, all layers at once, or not at all."""
    epochs: Epochs = Field(4.0, ge=0)
    """Passes over the training inputs in which feature maps and attention are learned."""
    batch_size: BatchSize = 128
    """Inputs per step."""
    learning_rate: LearningRate = 2e-3
    """Peak learning rate of AdamW."""
    feature_weight: float = Field(1.0, ge=0)
    """Weight of the feature maps in the transfer's loss."""
    attention_weight: float = Field(1.0, ge=0)
    """Weight of the attention in the transfer's loss."""

    def transfer(self, context: Context, student: Encoder, teacher: Checkpoint, title: str, role: str = "teacher") -> None:
        """Draw the student's feature maps and attention to those of ``teacher``, the artifact ``role``, in place."""
        if self.order == "none" or not self.epochs:
            return
        count, heads = len(student.config.layers), student.config.layers[0]["heads"]
        texts = replace(context.encode(teacher, "train"), group=1)
        layers = layer_map(teacher.model.config.num_hidden_layers, count)
        outputs = teacher_outputs(context, teacher, texts, layers, heads, role)
        widths = student.config.hidden_size, teacher.model.config.hidden_size
        maps = nn.ModuleList(nn.Identity() if widths[0] == widths[1] else nn.Linear(*widths) for _ in range(count))
        module = nn.ModuleDict({"student": student, "maps": maps})
        steps = steps_of(self, texts, self.epochs)
        progressive = self.order == "progressive"

        def phase(step: int) -> int:
            return min(count - 1, step * count // max(1, steps))

        def differences(module: nn.Module, batch: Batch, active: list[int]) -> tuple[Tensor, Tensor]:
            """Of feature maps and of attention, each a mean over the tokens of ``batch``."""
            out = module["student"](**batch.inputs, output_hidden_states=True, output_attention_scores=True, stop_after=active[-1] + 1)
            wanted = outputs.features(batch)
            real, pairs = batch.attention_mask.bool(), valid_pairs(batch.attention_mask)
            feature = attention = torch.zeros((), device=batch.input_ids.device)
            for layer in active:
                mapped = module["maps"][layer](out.hidden_states[layer + 1][real])
                feature = feature + feature_map_loss(mapped, wanted.hidden[:, layer]) / len(active)
                scores = functional.log_softmax(out.attention_scores[layer].float(), -1).permute(0, 2, 3, 1)[pairs]
                attention = attention + attention_loss(scores, wanted.attention[:, layer], real.sum()) / len(active)
            return feature, attention

        def loss(module: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, float]]:
            active = [phase(step)] if progressive else list(range(count))
            pieces, tokens = batch.parts(context.train.micro_batch), batch.attention_mask.sum()
            if len(pieces) == 1:
                feature, attention = differences(module, batch, active)
            else:  # both are means over tokens, so a piece counts by its share of them
                shared = [checkpoint(differences, module, piece, active, use_reentrant=False) for piece in pieces]
                shares = [piece.attention_mask.sum() / tokens for piece in pieces]
                feature, attention = (sum(pair[i] * share for pair, share in zip(shared, shares, strict=True)) for i in range(2))
            total = self.feature_weight * feature + self.attention_weight * attention
            return total, {"feature_maps": feature.item(), "attention": attention.item()}

        def rate(step: int, group: str) -> float:
            layer, now = int(group), phase(step)
            return 1.0 if layer == now else PAST_RATE if layer < now else 0.0

        schedule = rate if progressive else None
        plan = TrainingPlan(self.epochs, self.batch_size, self.learning_rate, context.seed, rate_rule=schedule, machine=context.train)
        groups = layer_groups(student, maps)
        train(TrainingJob(module, texts, loss, plan, context.work / "transfer", context.progress, f"{title}: {self.order}", groups))


def layer_groups(student: Encoder, maps: nn.ModuleList) -> dict[str, list[nn.Parameter]]:
    """Parameters by the layer position with which they learn first; embeddings with layer 0: unlike the paper's they are not the teacher's."""
    groups: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for position, index in enumerate(student.order):
        parameters = [*student.layers[index].parameters(), *maps[position].parameters()]
        if position == 0:
            parameters += student.embeddings.parameters()
        groups[str(position)] = [p for p in parameters if id(p) not in seen]
        seen |= {id(p) for p in parameters}
    return {name: parameters for name, parameters in groups.items() if parameters}


def layer_map(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """For each student layer the 1-based teacher layer it follows: evenly spaced, the last one the last.

    TinyBERT's g(m) = m N / M (arXiv:1909.10351 eq. 6), rounded up where M does not divide N.
    """
    return tuple(math.ceil(m * teacher_layers / student_layers) for m in range(1, student_layers + 1))
