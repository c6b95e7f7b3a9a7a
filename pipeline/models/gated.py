"""Gates on heads, FFN units and hidden channels, for as long as one needs them.

:func:`gated` multiplies what a head or a unit gives by a number, without touching the model: for importance (the gradient
of the loss with respect to the gate), for learned gates, and as the mask that a cut is held against.

Source: Michel et al. 2019, arXiv:1905.10650 eq. 2 (heads); McCarley et al. 2019, arXiv:1910.06360 §3 (heads, FFN units
and the hidden width).

What this file does not do: cut anything (:mod:`pipeline.models.surgery`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.models.encoder import Encoder
from runtimes.errors import BadInput


@contextmanager
def gated(
    model: Encoder, heads: Sequence[Tensor] = (), units: Sequence[Sequence[Tensor]] = (), hidden: Tensor | None = None,
    query_key: Sequence[Tensor] = (), value: Sequence[Tensor] = (),
) -> Iterator[None]:  # fmt: skip
    """Run ``model`` with gates, within the block.

    Args:
        heads: for each own layer the gates of its heads, [A]; or per text [b, A], or per token [b, n, A].
        units: for each own layer and FFN the gates of its units, [F]; or [b, F], or [b, n, F].
        query_key, value: for each own layer gates of the dimensions of queries, and of values, heads side by side [A d].
        hidden: gates of the channels of the feature map, [H] or [b, H]. Layer norms then weigh their statistics by the gates, so that a
            gate of 0 is a channel that is not there.

    Raises:
        BadInput: hidden gates for a model whose feature map is not normalised by layer norms throughout.
    """
    handles = []
    try:
        for layer, gates in zip(model.layers, heads, strict=False):
            if layer.attention.heads:
                handles.append(layer.attention.output.register_forward_pre_hook(_times(gates, layer.attention.head_size)))
        for layer, gates in zip(model.layers, query_key, strict=False):
            if layer.attention.heads:
                handles.append(layer.attention.query.register_forward_hook(_output_times(gates)))
        for layer, gates in zip(model.layers, value, strict=False):
            if layer.attention.heads:
                handles.append(layer.attention.output.register_forward_pre_hook(_times(gates, 1)))
        for layer, per_ffn in zip(model.layers, units, strict=False):
            for ffn, gates in zip(layer.ffns, per_ffn, strict=True):
                if ffn.up is not None:
                    handles.append(ffn.down.register_forward_pre_hook(_times(gates, 1)))
        if hidden is not None:
            handles += _gate_hidden(model, hidden)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _times(gates: Tensor, width: int):
    """Multiply the input [b, n, G width] by gates [G], [b, G] or [b, n, G], each for ``width`` neighbours."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        factor = gates.repeat_interleave(width, dim=-1) if width > 1 else gates
        if factor.ndim == 2:
            factor = factor[:, None, :]
        elif factor.ndim == 3:  # the last layer may compute the first token alone
            factor = factor[:, : inputs[0].shape[1]]
        return (inputs[0] * factor.to(inputs[0].dtype),)

    return hook


def _output_times(gates: Tensor):
    return lambda module, inputs, output: output * gates.to(output.dtype)


def _gate_hidden(model: Encoder, gates: Tensor) -> list:
    norms = [model.embeddings.norm]
    norms += [norm for layer in model.layers for norm in (layer.attention_norm, *(ffn.norm for ffn in layer.ffns))]
    if not model.config.hidden_can_shrink:
        raise BadInput(
            "hidden gates: a BERT-like encoder is needed: layer norms, no bottlenecks, embeddings as wide as the layers, "
            "no output that is as wide as the model"
        )

    def norm_of_open_channels(norm: nn.LayerNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].float()
        open_ = gates if gates.ndim == 1 else gates[:, None, :]
        total = open_.sum(-1, keepdim=True)
        mean = (x * open_).sum(-1, keepdim=True) / total
        variance = ((x - mean).square() * open_).sum(-1, keepdim=True) / total
        return open_ * ((x - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias)

    handles = [norm.register_forward_hook(norm_of_open_channels) for norm in norms]
    pooled = [head["name"] for head in model.config.heads if head["pooler"] and model.pooler is not None]
    handles += [model.heads[name].register_forward_pre_hook(lambda module, inputs: (inputs[0] * gates,)) for name in pooled]
    return handles
