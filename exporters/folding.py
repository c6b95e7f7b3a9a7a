"""An encoder as it is exported: exactly the same function in fewer, larger steps.

What is folded, and why the function stays the same:

- Queries, keys and values (and, where a layer has a bottleneck, what is read through it) become rows of one matrix,
  because all of them read the same feature map x. 1/sqrt(d) goes into the rows of the queries.
- A bottleneck without statistics is a linear map, so W_q (g * (B x + b) + c) is one matrix times x. It is multiplied
  out only where the product is no larger than its factors.
- Position and token-type tables become one table, cut to the positions that the task can reach.
- NoNorm, h = g * (W a + b + y) + c, disappears. Along a chain of residual additions the exported file carries h/s
  instead of h, with s_k = g_k * s_(k-1): the addition then needs no scale. Whoever writes to the chain has its rows
  divided by s, whoever reads from it has its columns multiplied by s. s may start anywhere, which is the freedom that
  SmoothQuant (Xiao et al. 2022, arXiv:2211.10438) uses; here it starts so that s ends at 1. Where the spread of s
  would grow beyond ``MAX_SPREAD`` the affine map stays in the file, because 8-bit rows could not hold it.
- The last layer computes only the first token, the only one that the classifier reads.

Shapes as in the encoder: n tokens, H feature map, B width inside a layer, A heads of size d, C labels. Weights are
float32 [out, in].

What this file does not do: run anything (:mod:`exporters.forward`), or write files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MAX_SPREAD = 64.0
"""Largest ratio between two channels' scales that is folded into neighbours; int8 rows keep 7 bits above it."""
MASKED_SCORE = -1e4
"""Added to the scores of padding, as in the encoder."""


@dataclass(frozen=True)
class Linear:
    """W x + b, then ``activation``: ``weight`` [out, in], ``bias`` [out] or None."""

    name: str
    weight: np.ndarray
    bias: np.ndarray | None
    activation: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows that are looked up, [rows, width]."""

    name: str
    rows: np.ndarray


@dataclass(frozen=True)
class Norm:
    """``layer_norm`` over the last axis with ``eps``, or ``affine``: weight * h + bias."""

    name: str
    kind: str
    weight: np.ndarray
    bias: np.ndarray
    eps: float = 0.0


@dataclass(frozen=True)
class FeedForward:
    """norm(down(up(h)) + h); the activation is part of ``up``."""

    up: Linear
    down: Linear
    norm: Norm | None


@dataclass(frozen=True)
class Read:
    """A matrix that reads the part ``source`` and whose output consists of ``parts``, (name, width) side by side.

    ``first_only``: it runs on the first token alone. The layer's input is the part ``hidden``; the others are ``query``,
    ``key``, ``value`` [A d], ``inner`` [B] and ``shared`` [B], the bottleneck that queries and keys have in common.
    """

    source: str
    first_only: bool
    linear: Linear
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        first_only: only the first token's result is wanted.
        reads: matrices in the order in which they run.
        part_norms: norms of parts, where they could not be folded.
        output: from the attention's result to ``inner``.
        out: from ``inner`` back to H; None without a bottleneck, where ``inner`` is the layer's input itself.
    """

    heads: int
    head_size: int
    first_only: bool
    reads: tuple[Read, ...]
    part_norms: dict[str, Norm]
    output: Linear
    attention_norm: Norm | None
    ffns: tuple[FeedForward, ...]
    out: Linear | None
    out_norm: Norm | None


@dataclass(frozen=True)
class FoldedEncoder:
    """An encoder with its classification head, ready to be written.

    Args:
        trigram: each token is looked up with both neighbours, as previous, this and next side by side.
        projection: from the looked-up words to H; None where they are H wide already.
        positions: row ``type * max_length + position``.
        segments: 1: every text is one segment and the file takes no token types; 2: it does.
        embedding_norm: before ``late_projection``, which maps E to H after the norm (ALBERT, ELECTRA).
        probabilities: the result is softmax(logits).
    """

    words: Table
    trigram: bool
    projection: Linear | None
    positions: Table
    segments: int
    max_length: int
    embedding_norm: Norm | None
    late_projection: Linear | None
    layers: tuple[Layer, ...]
    pooler: Linear | None
    classifier: Linear
    probabilities: bool = False

    @property
    def output(self) -> str:
        """Name of the result in a file."""
        return "probabilities" if self.probabilities else "logits"

    def linears(self) -> Iterator[tuple[Linear, bool]]:
        """Every matrix in the order of use, with whether it runs on the first token only; a shared one at each use."""
        for linear in (self.projection, self.late_projection):
            if linear is not None:
                yield linear, False
        for layer in self.layers:
            yield from ((read.linear, read.first_only) for read in layer.reads)
            yield layer.output, layer.first_only
            for ffn in layer.ffns:
                yield ffn.up, layer.first_only
                yield ffn.down, layer.first_only
            if layer.out is not None:
                yield layer.out, layer.first_only
        for linear in (self.pooler, self.classifier):
            if linear is not None:
                yield linear, True

    def multiply_adds(self, tokens: int) -> int:
        """Multiplications with an addition that one text of ``tokens`` tokens takes, attention included."""
        total = sum(linear.weight.size * (1 if first_only else tokens) for linear, first_only in self.linears())
        return total + sum(2 * (1 if layer.first_only else tokens) * tokens * layer.heads * layer.head_size for layer in self.layers)


def fold(model: Any, max_length: int, segments: int = 1, probabilities: bool = False) -> FoldedEncoder:
    """Fold an encoder of :mod:`pipeline.models.encoder`; it is not changed.

    Args:
        model: the encoder; its modules' weights and its ``config`` are read.
        max_length: longest text in tokens; positions beyond it are left out.
        segments: 1 if every text is one segment, 2 if token types matter.
        probabilities: whether the result is softmax(logits) and not the logits.

    Raises:
        ValueError: the model has fewer positions than ``max_length``.
    """
    config = model.config
    positions = config.max_position_embeddings - config.position_offset
    if max_length > positions:
        raise ValueError(f"max_length is {max_length}, the model has {positions} positions")
    own, order = list(model.layers), model.order
    shared = len(set(order)) < len(order)
    norms = [(f"layers.{i}.{name}", norm) for i in order for name, norm in _hidden_norms(own[i])]
    hidden = _Chain(norms, config.hidden_size, fold=not shared)
    embeddings = _fold_embeddings(model, max_length, segments, hidden)
    layers: list[Layer] = []
    at = 0
    for position, index in enumerate(order):
        last = position == len(order) - 1
        layers.append(_fold_layer(own[index], f"layers.{index}", config, hidden, at, last, split=not shared))
        at += len(_hidden_norms(own[index]))
    pooler, classifier = None, _linear("classifier", model.classifier)
    if model.pooler is not None:
        pooler = replace(hidden.read(at, _linear("pooler", model.pooler)), activation=config.pooler)
    else:
        classifier = hidden.read(at, classifier)
    return FoldedEncoder(**embeddings, layers=tuple(layers), pooler=pooler, classifier=classifier, probabilities=probabilities)


class _Chain:
    """A stream h_0, h_1, ... with h_k = norm_k(delta_k + h_(k-1)), of which the file carries h_k / s_k.

    Args:
        norms: (name, module) of norm_1, norm_2, ...
        size: width of the stream.
        fold: False leaves every norm in the file and all s at 1.
    """

    def __init__(self, norms: Sequence[tuple[str, Any]], size: int, fold: bool = True) -> None:
        self.norms = [_norm(name, module) for name, module in norms]
        self.folded = [fold and norm.kind == "affine" for norm in self.norms]
        products = [np.ones(size, np.float32)]
        for k, norm in enumerate(self.norms):
            product = products[-1] * norm.weight
            if self.folded[k] and not _spread(product) <= MAX_SPREAD:
                self.folded[k] = False
            products.append(product if self.folded[k] else np.ones(size, np.float32))
        # Each stretch between norms that stay ends at 1.
        self.scales, end = [], np.ones(size, np.float32)
        for k in range(len(products) - 1, -1, -1):
            if k == len(products) - 1 or not self.folded[k]:
                end = products[k]
            self.scales.insert(0, products[k] / end)

    def start(self, linear: Linear) -> Linear:
        """``linear``, whose output is h_0, as a writer of the stream."""
        return _scale_rows(linear, 1 / self.scales[0])

    def read(self, k: int, linear: Linear) -> Linear:
        """``linear`` as a reader of h_k."""
        return replace(linear, weight=linear.weight * self.scales[k])

    def write(self, k: int, linear: Linear) -> tuple[Linear, Norm | None]:
        """``linear``, whose output is delta_(k+1), and the norm that remains after the addition."""
        norm, before, after = self.norms[k], self.scales[k], self.scales[k + 1]
        linear = _scale_rows(linear, 1 / before)
        if self.folded[k]:
            return replace(linear, bias=linear.bias + norm.bias / after), None
        if norm.kind == "affine":
            return linear, replace(norm, weight=norm.weight * before / after, bias=norm.bias / after)
        return linear, norm


def _hidden_norms(layer: Any) -> list[tuple[str, Any]]:
    """The norms on the stream of feature maps within a layer, in order."""
    if layer.has_bottleneck:
        return [("out_norm", layer.out_norm)]
    return _inner_norms(layer)


def _inner_norms(layer: Any) -> list[tuple[str, Any]]:
    return [("attention_norm", layer.attention_norm), *((f"ffns.{i}.norm", ffn.norm) for i, ffn in enumerate(layer.ffns))]


def _fold_embeddings(model: Any, max_length: int, segments: int, hidden: _Chain) -> dict[str, Any]:
    config, part = model.config, model.embeddings
    rows = _array(part.word.weight)
    position = _array(part.position.weight)[config.position_offset : config.position_offset + max_length]
    segments = max(1, min(segments, config.type_vocab_size))
    if config.type_vocab_size:
        types = _array(part.token_type.weight)[:segments]
        position = (types[:, None, :] + position).reshape(segments * max_length, -1)
    kind = config.embedding_projection
    projection = late = None
    if kind in ("word", "trigram"):
        projection = _linear("embeddings.projection", part.projection)
        position = position + projection.bias  # every token gets one position row, so the bias may live there
        projection = replace(projection, bias=None)
    if kind == "trigram":
        rows[config.pad_token_id] = 0  # beyond a text lie zeros, whether or not it is padded there
        # The checkpoints' order is next, this, previous; a file slides a window from left to right
        projection = replace(projection, weight=np.concatenate(np.split(projection.weight, 3, axis=1)[::-1], axis=1))
    norm: Norm | None = _norm("embeddings.norm", part.norm)
    if kind == "sum":
        late = _linear("embeddings.projection", part.projection)
        if norm.kind == "affine":  # the projection is its only reader
            late, norm = replace(late, weight=late.weight * norm.weight, bias=late.bias + late.weight @ norm.bias), None
        late = hidden.start(late)
    elif norm.kind == "affine":
        scale = norm.weight / hidden.scales[0]
        position = position * scale + norm.bias / hidden.scales[0]
        if projection is None:
            rows = rows * scale
        else:
            projection = _scale_rows(projection, scale)
        norm = None
    return {
        "words": Table("embeddings.words", rows), "trigram": kind == "trigram", "projection": projection,
        "positions": Table("embeddings.positions", position), "segments": segments, "max_length": max_length,
        "embedding_norm": norm, "late_projection": late,
    }  # fmt: skip


def _fold_layer(layer: Any, name: str, config: Any, hidden: _Chain, at: int, last: bool, split: bool) -> Layer:
    """``at``: which h of ``hidden`` the layer starts from. ``split``: whether the last layer may have matrices of its own."""
    attention = layer.attention
    root = np.float32(1.0 / np.sqrt(attention.head_size))
    query = _scale_rows(_linear("query", attention.query), np.full(len(attention.query.weight), root))
    key, value = _linear("key", attention.key), _linear("value", attention.value)
    inner, inner_at = hidden, at
    part_norms: dict[str, Norm] = {}
    if layer.has_bottleneck:
        inner, inner_at = _Chain([(f"{name}.{n}", norm) for n, norm in _inner_norms(layer)], config.inner_size), 0
        first, second = _bottleneck_reads(layer, name, query, key, value, inner, part_norms)
        first = {n: hidden.read(at, linear) for n, linear in first.items()}
    else:
        first, second = {n: hidden.read(at, linear) for n, linear in (("query", query), ("key", key), ("value", value))}, {}
    reads = _group(name, "hidden", first, last and split, layer.reads == "all")
    reads += _group(name, "inner" if layer.reads == "all" else "shared", second, last and split, False)
    output, attention_norm = inner.write(inner_at, _linear(f"{name}.output", attention.output))
    ffns = []
    for number, ffn in enumerate(layer.ffns):
        up = inner.read(inner_at + 1 + number, _linear(f"{name}.ffns.{number}.up", ffn.up))
        down, norm = inner.write(inner_at + 1 + number, _linear(f"{name}.ffns.{number}.down", ffn.down))
        ffns.append(FeedForward(replace(up, activation=config.activation), down, norm))
    out = out_norm = None
    if layer.has_bottleneck:
        out, out_norm = hidden.write(at, inner.read(len(ffns) + 1, _linear(f"{name}.out", layer.bottleneck_out)))
    return Layer(attention.heads, attention.head_size, last, tuple(reads), part_norms, output, attention_norm, tuple(ffns), out, out_norm)


def _bottleneck_reads(
    layer: Any, name: str, query: Linear, key: Linear, value: Linear, inner_chain: _Chain, part_norms: dict[str, Norm]
) -> tuple[dict[str, Linear], dict[str, Linear]]:
    """What reads the feature map, and what reads the bottleneck, each as part -> matrix."""

    def bottleneck(part: str, module: Any) -> Linear:
        linear, norm = _linear(part, module.linear), _norm(f"{name}.{part}_norm", module.norm)
        if norm.kind == "affine":
            return replace(_scale_rows(linear, norm.weight), bias=linear.bias * norm.weight + norm.bias)
        part_norms[part] = norm
        return linear

    inner = inner_chain.start(bottleneck("inner", layer.bottleneck_in))
    if layer.reads == "all":
        return {"inner": inner}, {n.name: inner_chain.read(0, n) for n in (query, key, value)}
    if layer.reads == "none":
        return {"query": query, "key": key, "value": value, "inner": inner}, {}
    shared = bottleneck("shared", layer.bottleneck_attention)
    apart = shared.weight.size + query.weight.size + key.weight.size
    if "shared" in part_norms or (len(query.weight) + len(key.weight)) * shared.weight.shape[1] > apart:
        return {"value": value, "inner": inner, "shared": shared}, {"query": query, "key": key}
    return {"query": _compose(query, shared), "key": _compose(key, shared), "value": value, "inner": inner}, {}


def _group(name: str, source: str, parts: dict[str, Linear], split: bool, keys_read_inner: bool) -> list[Read]:
    """One matrix for all parts; in a layer of which only the first token is wanted, two."""
    if not parts:
        return []
    needed = {"key", "value", "shared"} | ({"inner"} if keys_read_inner else set())
    everywhere = {n: linear for n, linear in parts.items() if not split or n in needed}
    groups = [(False, everywhere), (True, {n: linear for n, linear in parts.items() if n not in everywhere})]
    return [
        Read(source, first_only, _join(f"{name}.{'_'.join(group)}", list(group.values())), tuple((n, len(m.weight)) for n, m in group.items()))
        for first_only, group in groups
        if group
    ]  # fmt: skip


def _join(name: str, linears: Sequence[Linear]) -> Linear:
    return Linear(name, np.concatenate([m.weight for m in linears]), np.concatenate([m.bias for m in linears]))


def _compose(outer: Linear, inner: Linear) -> Linear:
    """outer(inner(x)) as one matrix, multiplied out in float64."""
    weight = outer.weight.astype(np.float64) @ inner.weight
    bias = outer.weight.astype(np.float64) @ inner.bias + outer.bias
    return Linear(outer.name, weight.astype(np.float32), bias.astype(np.float32))


def _scale_rows(linear: Linear, scale: np.ndarray) -> Linear:
    return replace(linear, weight=linear.weight * scale[:, None], bias=None if linear.bias is None else linear.bias * scale)


def _linear(name: str, module: Any) -> Linear:
    weight = _array(module.weight)
    return Linear(name, weight, np.zeros(len(weight), np.float32) if module.bias is None else _array(module.bias))


def _norm(name: str, module: Any) -> Norm:
    eps = getattr(module, "eps", None)
    return Norm(name, "affine" if eps is None else "layer_norm", _array(module.weight), _array(module.bias), eps or 0.0)


def _spread(scale: np.ndarray) -> float:
    """Largest |scale| over the smallest; infinite where one is 0."""
    size = np.abs(scale)
    return float(size.max() / size.min()) if size.min() > 0 else float("inf")


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy().copy()
