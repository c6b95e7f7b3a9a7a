"""The one encoder of pocketbert: a post-norm Transformer whose every width is free.

Source of the standard layer: Devlin et al. 2018, arXiv:1810.04805. Source of bottlenecks, stacked FFNs, NoNorm and
trigram input: Sun et al. 2020 (MobileBERT), arXiv:2004.02984. Factorized embeddings and shared layers: Lan et al.
2019 (ALBERT), arXiv:1909.11942.

Shapes: b batch, n tokens, H hidden, B width inside a layer, A heads, d head size, C labels.

A layer with a bottleneck computes, for its feature map x [b, n, H]::

    y = norm(W_in x)                                  H -> B
    a = attention(norm(W_qk x), norm(W_qk x), x)      queries and keys from a shared bottleneck, values from x
    h = norm(W_o a + y)
    h = norm(W_2 act(W_1 h) + h)                      once per stacked FFN
    x = norm(W_out h + x)                             B -> H

Without one, y = x and the last line falls away, which leaves the layer of BERT.

What this file does not do: load other libraries' checkpoints (:mod:`pipeline.models.hub`) or cut anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from pipeline.models.config import EncoderConfig
from pipeline.models.linear import Quaternion, make_linear
from pipeline.tasks.batches import Batch

MASKED_SCORE = -1e4
"""Added to the scores of padding: large enough for a softmax weight of exactly 0, small enough for fp16 and int8."""


class NoNorm(nn.Module):
    """gamma * h + beta: MobileBERT's stand-in for layer normalisation, free of statistics at run time."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            return torch.addcmul(self.bias, hidden, self.weight)  # the same in one pass; a tenth off a training step
        return hidden * self.weight + self.bias


def make_norm(config: EncoderConfig, size: int) -> nn.Module:
    return NoNorm(size) if config.norm == "no_norm" else nn.LayerNorm(size, eps=config.layer_norm_eps)


def _linears(config: EncoderConfig, shape: dict, part: str) -> Callable[[str, int, int], nn.Module]:
    """Makes the matrices of one part of a layer as its shape says: (name, in, out) -> module."""

    def made(name: str, in_features: int, out_features: int) -> nn.Module:
        return make_linear(in_features, out_features, shape.get("ranks", {}).get(f"{part}.{name}"), config.quaternion)

    return made


class Embeddings(nn.Module):
    """Token ids [b, n] -> feature map [b, n, H]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.kind = config.embedding_projection
        self.position_offset = config.position_offset
        inner = config.embedding_size if self.kind == "sum" else config.hidden_size
        self.word = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, inner)
        self.token_type = nn.Embedding(config.type_vocab_size, inner) if config.type_vocab_size else None
        self.projection = None
        if self.kind != "none":
            width = config.embedding_size * (3 if self.kind == "trigram" else 1)
            self.projection = nn.Linear(width, config.hidden_size, bias=config.embedding_projection_bias)
        self.norm = make_norm(config, inner)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        words = self.word(input_ids)
        if self.kind == "trigram":
            # next, this, previous: the order of the published checkpoints. Zeros stand beyond both ends.
            following = functional.pad(words[:, 1:], (0, 0, 0, 1))
            previous = functional.pad(words[:, :-1], (0, 0, 1, 0))
            words = torch.cat([following, words, previous], dim=-1)
        if self.kind in ("word", "trigram"):
            words = self.projection(words)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + self.position_offset
        total = words + self.position(positions)
        if self.token_type is not None:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            total = total + self.token_type(types)
        hidden = self.dropout(self.norm(total))
        return self.projection(hidden) if self.kind == "sum" else hidden


class Attention(nn.Module):
    """Multi-head self-attention whose pre-softmax scores can be read [b, A, n, n]."""

    def __init__(self, config: EncoderConfig, shape: dict, query_key_size: int, value_size: int) -> None:
        super().__init__()
        self.heads, self.head_size = shape["heads"], shape["head_size"]
        width = self.heads * self.head_size
        made = _linears(config, shape, "attention")
        if self.heads:
            self.query = made("query", query_key_size, width)
            self.key = made("key", query_key_size, width)
            self.value = made("value", value_size, width)
        self.output = made("output", width, config.inner_size)
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from ``queries`` [b, m, *] to ``keys`` [b, n, *] over ``values`` [b, n, *].

        ``mask`` [b, 1, 1, n] is added to the scores [b, A, m, n], which are returned beside the result [b, m, B].
        """
        if not self.heads:  # what is left is the bias
            b, m, n = len(queries), queries.shape[1], keys.shape[1]
            return self.output(queries[..., :0]), queries.new_zeros(b, 0, m, n)
        q, k, v = (
            part.reshape(part.shape[0], part.shape[1], self.heads, self.head_size).transpose(1, 2)
            for part in (self.query(queries), self.key(keys), self.value(values))
        )
        scores = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(self.head_size)) + mask
        weights = self.dropout(torch.softmax(scores, dim=-1))
        context = (weights @ v).transpose(1, 2)
        return self.output(context.reshape(context.shape[0], context.shape[1], self.heads * self.head_size)), scores


class FeedForward(nn.Module):
    """norm(W_2 act(W_1 h) + h)."""

    def __init__(self, config: EncoderConfig, shape: dict, number: int) -> None:
        super().__init__()
        size = shape["ffn_sizes"][number]
        made = _linears(config, shape, f"ffns.{number}")
        self.up = made("up", config.inner_size, size) if size else None
        self.down = made("down", size, config.inner_size)
        self.activation = ACT2FN[config.activation]
        self.norm = make_norm(config, config.inner_size)
        # MobileBERT drops out only where a layer writes back to H.
        self.dropout = nn.Dropout(config.hidden_dropout if config.bottleneck_size is None else 0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        inside = hidden[..., :0] if self.up is None else self.activation(self.up(hidden))
        return self.norm(self.dropout(self.down(inside)) + hidden)


class Bottleneck(nn.Module):
    """norm(W x): a linear map between H and B."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.inner_size)
        self.norm = make_norm(config, config.inner_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.linear(hidden))


class Layer(nn.Module):
    """One encoder layer, [b, n, H] -> [b, n, H]; the equations stand in the module docstring."""

    def __init__(self, config: EncoderConfig, shape: dict) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.inner_size
        self.has_bottleneck = config.bottleneck_size is not None
        self.reads = config.bottleneck_attention if self.has_bottleneck else "none"
        query_key_size = inner if self.reads in ("query_key", "all") else hidden
        self.attention = Attention(config, shape, query_key_size, inner if self.reads == "all" else hidden)
        self.attention_norm = make_norm(config, inner)
        self.attention_dropout = nn.Dropout(0.0 if self.has_bottleneck else config.hidden_dropout)
        self.ffns = nn.ModuleList(FeedForward(config, shape, i) for i in range(len(shape["ffn_sizes"])))
        if self.has_bottleneck:
            self.bottleneck_in = Bottleneck(config)
            self.bottleneck_attention = Bottleneck(config) if self.reads == "query_key" else None
            self.bottleneck_out = nn.Linear(inner, hidden)
            self.out_norm = make_norm(config, hidden)
            self.out_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor, mask: Tensor, first_only: bool = False) -> tuple[Tensor, Tensor]:
        """The next feature map and the attention scores; of the first token alone, [b, 1, H], if ``first_only``."""
        read = keys = values = hidden
        if self.reads == "query_key":
            keys = self.bottleneck_attention(hidden)
        elif self.reads == "all":
            read = keys = values = self.bottleneck_in(hidden)
        queries = keys
        if first_only:
            hidden, queries, read = hidden[:, :1], queries[:, :1], read[:, :1]
        inner = self.bottleneck_in(hidden) if self.reads in ("query_key", "none") and self.has_bottleneck else read
        attended, scores = self.attention(queries, keys, values, mask)
        inner = self.attention_norm(self.attention_dropout(attended) + inner)
        for ffn in self.ffns:
            inner = ffn(inner)
        if not self.has_bottleneck:
            return inner, scores
        return self.out_norm(self.out_dropout(self.bottleneck_out(inner)) + hidden), scores


def _with_own_norms(ffns: nn.ModuleList, owners: nn.ModuleList) -> nn.ModuleList:
    """``ffns`` with the matrices of ``owners``."""
    for ffn, owner in zip(ffns, owners, strict=True):
        ffn.up, ffn.down = owner.up, owner.down
    return ffns


@dataclass
class EncoderOutput:
    """What a forward pass gives.

    ``outputs``: by name, [b, C] per text, [b, n, T] or [b, n] per token, [b, H] pooled. ``hidden_states`` L+1 feature maps [b, n, H], the
    embeddings first; ``attention_scores`` L score tensors [b, A, n, n] before the softmax, padding at about :data:`MASKED_SCORE`.
    """

    outputs: dict[str, Tensor]
    hidden_states: tuple[Tensor, ...] | None = None
    attention_scores: tuple[Tensor, ...] | None = None

    @property
    def logits(self) -> Tensor | None:
        return self.outputs.get("logits")


class Encoder(PreTrainedModel):
    """Encoder with the heads of its task (:attr:`EncoderConfig.heads`)."""

    config_class = EncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    _no_split_modules = ["Layer"]
    micro_batch: int | None = None
    """While it learns, :meth:`outputs` computes so many inputs at a time, and again for their gradient; what the loss reads is whole."""
    activation_checkpointing: bool = False
    """While it learns, a layer keeps what enters it alone and is computed again for its gradient."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        # A layer that shares weights is the same module object, so its tensors exist once.
        owners: dict[int, Layer] = {}
        for index, owner in enumerate(config.shared_with):
            if owner == index:
                owners[index] = Layer(config, config.layers[index])
        for index, layer in owners.items():
            layer.attention = owners[config.shared_attention[index]].attention
            layer.ffns = _with_own_norms(layer.ffns, owners[config.shared_ffn[index]].ffns)
        self.layers = nn.ModuleList(owners.values())
        self.order = [list(owners).index(owner) for owner in config.shared_with]
        pooled = config.pooler != "none" and any(head["pooler"] for head in config.heads)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooled else None
        self.pooler_activation = ACT2FN[config.pooler] if pooled else None
        self.dropout = nn.Dropout(config.classifier_dropout)
        sized = {head["name"]: head["size"] for head in config.heads if head["size"] is not None}
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, size) for name, size in sized.items()})
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
            if getattr(module, "padding_idx", None) is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, Quaternion):
            module.blocks.data.normal_(0.0, self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attention_scores: bool = False,
        stop_after: int | None = None,
        skip: Sequence[int] = (),
        **_: object,
    ) -> EncoderOutput:
        """Ids, mask and types [b, n] -> :class:`EncoderOutput`; after ``stop_after`` layers, without outputs, if that is given.

        Layers in ``skip`` pass their input on as it is, and have no attention scores.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.embeddings(input_ids, token_type_ids)
        mask = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * MASKED_SCORE
        hidden_states, attention_scores = [hidden] if output_hidden_states else [], []
        # Nobody reads the other tokens of the last feature map when only outputs of the first one are asked for.
        taken = [position for position in range(len(self.order)) if position not in skip]
        whole = output_hidden_states or output_attention_scores or not self.config.reads_first_only
        last = None if whole or not taken else taken[-1]
        for position, index in enumerate(self.order[:stop_after]):
            if position in skip:
                if output_hidden_states:
                    hidden_states.append(hidden)
                continue
            layer = self.layers[index]
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                hidden, scores = checkpoint(layer, hidden, mask, position == last, use_reentrant=False)
            else:
                hidden, scores = layer(hidden, mask, first_only=position == last)
            # What nobody reads is not held: the scores of long texts are most of the memory.
            if output_hidden_states:
                hidden_states.append(hidden)
            if output_attention_scores:
                attention_scores.append(scores)
            del scores
        return EncoderOutput(
            outputs=self.answers(hidden, attention_mask) if stop_after is None else {},
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attention_scores=tuple(attention_scores) if output_attention_scores else None,
        )

    def outputs(self, batch: Batch, **options: object) -> dict[str, Tensor]:
        """Outputs of a batch by name; those per token flat, [t, ...] over its real tokens."""
        parts = batch.parts(self.micro_batch if self.training and torch.is_grad_enabled() else None)
        if len(parts) == 1:
            return self._outputs(batch, options)
        found = [checkpoint(self._outputs, part, options, use_reentrant=False) for part in parts]
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _outputs(self, batch: Batch, options: dict[str, object]) -> dict[str, Tensor]:
        found = self(**batch.inputs, **options).outputs
        per_token = self.config.per_token_outputs
        return {name: batch.flat(value) if name in per_token else value for name, value in found.items()}

    def answers(self, hidden: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Last feature map [b, n, H] -> outputs by name; see :class:`EncoderOutput`."""
        made: dict[str, Tensor] = {}
        for head in self.config.heads:
            read = hidden[:, 0] if head["tokens"] == "first" else hidden
            if head["tokens"] == "mean":
                weights = attention_mask[..., None].to(hidden.dtype)
                read = (hidden * weights).sum(1) / weights.sum(1)
            if head["pooler"] and self.pooler is not None:
                read = self.pooler_activation(self.pooler(read))
            value = self.heads[head["name"]](self.dropout(read)) if head["name"] in self.heads else read
            if head["normalized"]:
                value = functional.normalize(value.float(), dim=-1)
            parts = [value] if len(head["outputs"]) == 1 else value.unbind(-1)
            made |= dict(zip(head["outputs"], parts, strict=True))
        return made


def count_unique_parameters(model: nn.Module) -> int:
    """Scalars in distinct tensors: what a file has to store, shared weights counted once."""
    return sum({parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}.values())
