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
- Of an attention without heads, or an FFN of width 0, the bias is left.

A matrix of low rank stays two thin ones; of those of queries, keys and values the first ones, which read the feature map,
are rows of the one matrix. A quaternion matrix stays as its blocks, a quarter of the weights, which no scale per channel
may touch. Where layers share their attention or their FFNs alone, both of which lie between norms of each layer's own,
the norms stay in the file, and the shared matrices have the name that they have in the first of these layers.

Shapes as in the encoder: n tokens, H feature map, B width inside a layer, A heads of size d, C labels. Weights are
float32 [out, in].

What this file does not do: run anything (:mod:`exporters.forward`), or write files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MAX_SPREAD = 64.0
"""Largest ratio between two channels' scales that is folded into neighbours; int8 rows keep 7 bits above it."""
MASKED_SCORE = -1e4
"""Added to the scores of padding, as in the encoder."""
_HAMILTON = np.array([[1, -2, -3, -4], [2, 1, -4, 3], [3, 4, 1, -2], [4, -3, 2, 1]])
"""[c, a]: which of the blocks 1..4 (r, i, j, k) multiplies component a of x for component c of the Hamilton product, with its sign."""
QUATERNION_SIGNS = (np.sign(_HAMILTON)[:, :, None] * (np.abs(_HAMILTON)[:, :, None] == np.arange(1, 5))).reshape(4, 16).astype(np.float32)
"""[c, 4 a + b]: how much block b times component a of x counts in component c of the product."""


@dataclass(frozen=True)
class Linear:
    """W x + b, then ``activation``: ``weight`` [out, in], ``bias`` [out] or None.

    Args:
        inner: the thin matrix that runs first, where the map is a product of two; its ``in`` is that of the map.
        quaternion: ``weight`` [out, in/4] holds the four blocks of a quaternion matrix, one below the other.
    """

    name: str
    weight: np.ndarray
    bias: np.ndarray | None
    activation: str | None = None
    inner: Linear | None = None
    quaternion: bool = False

    @property
    def reader(self) -> Linear:
        """The matrix that reads the input."""
        return self if self.inner is None else self.inner

    @property
    def multiply_adds(self) -> int:
        """Of one token, without those of ``inner``."""
        return self.weight.size if not self.quaternion else 4 * self.weight.size + QUATERNION_SIGNS.size * len(self.weight) // 4

    def rows_scaled(self, scale: np.ndarray) -> Linear:
        """A writer: its output, before the activation, times ``scale`` [out]."""
        self._check_scale(scale)
        return replace(self, weight=self.weight * scale[:, None], bias=None if self.bias is None else self.bias * scale)

    def rows_divided(self, scale: np.ndarray) -> Linear:
        """A writer: its output, before the activation, divided by ``scale`` [out]."""
        self._check_scale(scale)
        return replace(self, weight=self.weight / scale[:, None], bias=None if self.bias is None else self.bias / scale)

    def columns_scaled(self, scale: np.ndarray) -> Linear:
        """A reader: its input times ``scale`` [in]."""
        if self.inner is not None:
            return replace(self, inner=self.inner.columns_scaled(scale))
        self._check_scale(scale)
        return replace(self, weight=self.weight * (scale[0] if self.quaternion else scale))

    def _check_scale(self, scale: np.ndarray) -> None:
        if self.quaternion and np.ptp(scale) != 0:
            raise ValueError(f"{self.name}: a scale per channel, which a quaternion matrix cannot hold")


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
    """norm(down(up(h)) + h); the activation is part of ``up``. Without ``up`` the bias of ``down`` is all there is."""

    up: Linear | None
    down: Linear
    norm: Norm | None


@dataclass(frozen=True)
class Read:
    """A matrix that reads the part ``source`` and whose output consists of ``parts``, (name, width) side by side.

    ``first_only``: it runs on the first token alone. The layer's input is the part ``hidden``; the others are ``query``,
    ``key``, ``value`` [A d], or [rank] where the layer's ``part_linears`` make the part of it, ``inner`` [B] and ``shared``
    [B], the bottleneck that queries and keys have in common.
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
        heads: 0 for a layer without attention, of whose ``output`` the bias is left.
        reads: matrices in the order in which they run.
        part_linears: the second factor of parts whose matrix is a product of two.
        part_norms: norms of parts, where they could not be folded.
        output: from the attention's result to ``inner``.
        out: from ``inner`` back to H; None without a bottleneck, where ``inner`` is the layer's input itself.
    """

    heads: int
    head_size: int
    first_only: bool
    reads: tuple[Read, ...]
    part_linears: dict[str, Linear]
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

    @property
    def shares(self) -> bool:
        """Whether a matrix, or the bias that is left of one, is used more than once."""
        names = [linear.name for linear, _ in self._uses()]
        return len(set(names)) < len(names)

    def linears(self) -> Iterator[tuple[Linear, bool]]:
        """Every matrix in the order of use, with whether it runs on the first token only; a shared one at each use."""
        return ((linear, first_only) for linear, first_only in self._uses() if linear.weight.size)

    def _uses(self) -> Iterator[tuple[Linear, bool]]:
        """:meth:`linears`, and those of which only the bias is left."""
        for linear in (self.projection, self.late_projection):
            if linear is not None:
                yield linear, False
        for layer in self.layers:
            for read in layer.reads:
                yield read.linear, read.first_only
                yield from ((layer.part_linears[part], read.first_only) for part, _ in read.parts if part in layer.part_linears)
            rest = [layer.output, *(linear for ffn in layer.ffns for linear in (ffn.up, ffn.down)), layer.out]
            for linear in filter(None, rest):
                if linear.inner is not None:
                    yield linear.inner, layer.first_only
                yield linear, layer.first_only
        for linear in (self.pooler, self.classifier):
            if linear is not None:
                yield linear, True

    def multiply_adds(self, tokens: int) -> int:
        """Multiplications with an addition that one text of ``tokens`` tokens takes, attention included."""
        total = sum(linear.multiply_adds * (1 if first_only else tokens) for linear, first_only in self.linears())
        return total + sum(2 * (1 if layer.first_only else tokens) * tokens * layer.heads * layer.head_size for layer in self.layers)


def fold(model: Any, max_length: int, segments: int = 1, probabilities: bool = False) -> FoldedEncoder:
    """Fold an encoder of :mod:`pipeline.models.encoder`; it is not changed.

    Args:
        model: the encoder; its modules' weights and its ``config`` are read.
        max_length: longest text in tokens; positions beyond it are left out.
        segments: 1 if every text is one segment, 2 if token types matter.
        probabilities: whether the result is softmax(logits) and not the logits.

    Raises:
        ValueError: the model has fewer positions than ``max_length``, or two different matrices would have one name.
    """
    config = model.config
    positions = config.max_position_embeddings - config.position_offset
    if max_length > positions:
        raise ValueError(f"max_length is {max_length}, the model has {positions} positions")
    own, order = list(model.layers), model.order
    repeated = len(set(order)) < len(order)
    owners = _Owners(own)
    rigid = owners.shared or config.quaternion  # matrices that no scale of one layer's channels may touch
    norms = [(f"layers.{i}.{name}", norm) for i in order for name, norm in _hidden_norms(own[i])]
    hidden = _Chain(norms, config.hidden_size, fold=not (repeated or rigid))
    embeddings = _fold_embeddings(model, max_length, segments, hidden)
    layers: list[Layer] = []
    at = 0
    for position, index in enumerate(order):
        last = position == len(order) - 1
        split = last and not repeated and not owners.shares(own[index].attention.output)
        layers.append(_fold_layer(own[index], f"layers.{index}", config, hidden, at, last, split, owners, rigid))
        at += len(_hidden_norms(own[index]))
    pooler, classifier = None, _linear("classifier", model.classifier)
    if model.pooler is not None:
        pooler = replace(hidden.read(at, _linear("pooler", model.pooler)), activation=config.pooler)
    else:
        classifier = hidden.read(at, classifier)
    folded = FoldedEncoder(**embeddings, layers=tuple(layers), pooler=pooler, classifier=classifier, probabilities=probabilities)
    _check_names(folded)
    return folded


class _Owners:
    """Which layer's name a part has: that of the first layer in which the same matrices stand."""

    def __init__(self, layers: Sequence[Any]) -> None:
        named = [(f"layers.{i}", layer) for i, layer in enumerate(layers)]
        parts = [(name, layer.attention.output) for name, layer in named]
        parts += [(f"{name}.ffns.{k}", ffn.down) for name, layer in named for k, ffn in enumerate(layer.ffns)]
        self._uses = Counter(id(module) for _, module in parts)
        self._names: dict[int, str] = {}
        for name, module in parts:
            self._names.setdefault(id(module), name)
        self.shared = len(self._names) < len(parts)

    def shares(self, module: Any) -> bool:
        """Whether several layers use ``module``, the last matrix of a part."""
        return self._uses[id(module)] > 1

    def name(self, module: Any) -> str:
        """Name of the part of which ``module`` is the last matrix."""
        return self._names[id(module)]


def _check_names(model: FoldedEncoder) -> None:
    """Raise ValueError where one name stands for two contents: a file stores each name once."""
    first: dict[str, Linear] = {}
    for linear, _ in model._uses():
        known = first.setdefault(linear.name, linear)
        same = known.activation == linear.activation and known.quaternion == linear.quaternion and np.array_equal(known.weight, linear.weight)
        if not same or (known.bias is None) != (linear.bias is None) or not (known.bias is None or np.array_equal(known.bias, linear.bias)):
            raise ValueError(f"{linear.name}: two different matrices of this name; layers that share one must use it alike")


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
        return linear.rows_scaled(1 / self.scales[0])

    def read(self, k: int, linear: Linear) -> Linear:
        """``linear`` as a reader of h_k."""
        return linear.columns_scaled(self.scales[k])

    def write(self, k: int, linear: Linear) -> tuple[Linear, Norm | None]:
        """``linear``, whose output is delta_(k+1), and the norm that remains after the addition."""
        norm, before, after = self.norms[k], self.scales[k], self.scales[k + 1]
        linear = linear.rows_scaled(1 / before)
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
            projection = projection.rows_scaled(scale)
        norm = None
    return {
        "words": Table("embeddings.words", rows), "trigram": kind == "trigram", "projection": projection,
        "positions": Table("embeddings.positions", position), "segments": segments, "max_length": max_length,
        "embedding_norm": norm, "late_projection": late,
    }  # fmt: skip


def _fold_layer(layer: Any, name: str, config: Any, hidden: _Chain, at: int, last: bool, split: bool, owners: _Owners, rigid: bool) -> Layer:
    """``at``: which h of ``hidden`` the layer starts from. ``split``: only the first token is wanted, and may have matrices of its own.

    ``rigid``: no norm may be folded into the layer's matrices.
    """
    attention = layer.attention
    owner = owners.name(attention.output)
    heads = {part: _linear(f"{owner}.{part}", getattr(attention, part)) for part in ("query", "key", "value") if attention.heads}
    if heads:
        query = heads["query"]
        heads["query"] = query.rows_scaled(np.full(len(query.weight), np.float32(1.0 / np.sqrt(attention.head_size))))
    inner, inner_at = hidden, at
    part_norms: dict[str, Norm] = {}
    common = owners.shares(attention.output)  # and can then be no rows of a matrix that one layer has for itself
    if layer.has_bottleneck:
        inner, inner_at = _Chain([(f"{name}.{n}", norm) for n, norm in _inner_norms(layer)], config.inner_size, fold=not rigid), 0
        first, second = _bottleneck_reads(layer, name, heads, inner, part_norms, fixed=common)
    else:
        first, second = heads, {}
    first = {n: hidden.read(at, linear) for n, linear in first.items()}
    reads = _group(name, "hidden", first, split, layer.reads == "all" and bool(heads), owner if common else None)
    reads += _group(name, "inner" if layer.reads == "all" else "shared", second, split, False, owner if common else None)
    part_linears = {n: replace(linear, inner=None) for n, linear in (first | second).items() if linear.inner is not None}
    output, attention_norm = inner.write(inner_at, _linear(f"{owner}.output", attention.output))
    ffns = []
    for number, ffn in enumerate(layer.ffns):
        ffn_owner, up = owners.name(ffn.down), None
        if ffn.up is not None:
            up = replace(inner.read(inner_at + 1 + number, _linear(f"{ffn_owner}.up", ffn.up)), activation=config.activation)
        down, norm = inner.write(inner_at + 1 + number, _linear(f"{ffn_owner}.down", ffn.down))
        ffns.append(FeedForward(up, down, norm))
    out = out_norm = None
    if layer.has_bottleneck:
        out, out_norm = hidden.write(at, inner.read(len(ffns) + 1, _linear(f"{name}.out", layer.bottleneck_out)))
    return Layer(
        attention.heads, attention.head_size, last, tuple(reads), part_linears, part_norms, output, attention_norm, tuple(ffns), out, out_norm
    )


def _bottleneck_reads(
    layer: Any, name: str, heads: Mapping[str, Linear], inner_chain: _Chain, part_norms: dict[str, Norm], fixed: bool
) -> tuple[dict[str, Linear], dict[str, Linear]]:
    """What reads the feature map, and what reads the bottleneck, each as part -> matrix.

    ``heads``: queries, keys and values, if there are any. ``fixed``: nothing may be multiplied into them.
    """

    def bottleneck(part: str, module: Any) -> Linear:
        linear, norm = _linear(f"{name}.{part}", module.linear), _norm(f"{name}.{part}_norm", module.norm)
        if norm.kind == "affine":
            return replace(linear.rows_scaled(norm.weight), bias=linear.bias * norm.weight + norm.bias)
        part_norms[part] = norm
        return linear

    inner = inner_chain.start(bottleneck("inner", layer.bottleneck_in))
    if layer.reads == "all":
        return {"inner": inner}, {part: inner_chain.read(0, linear) for part, linear in heads.items()}
    if layer.reads == "none" or not heads:
        return {**heads, "inner": inner}, {}
    shared = bottleneck("shared", layer.bottleneck_attention)
    query, key, value = heads.values()
    apart = shared.weight.size + query.weight.size + key.weight.size
    fixed = fixed or any(linear.quaternion or linear.inner is not None for linear in (query, key))
    if fixed or "shared" in part_norms or (len(query.weight) + len(key.weight)) * shared.weight.shape[1] > apart:
        return {"value": value, "inner": inner, "shared": shared}, {"query": query, "key": key}
    return {"query": _compose(query, shared), "key": _compose(key, shared), "value": value, "inner": inner}, {}


def _group(name: str, source: str, parts: Mapping[str, Linear], split: bool, keys_read_inner: bool, owner: str | None) -> list[Read]:
    """One matrix for all parts; in a layer of which only the first token is wanted, two.

    A quaternion matrix stays by itself, and so do queries, keys and values that have the name of an ``owner``.
    """
    needed = {"key", "value", "shared"} | ({"inner"} if keys_read_inner else set())
    groups: dict[tuple[bool, bool, str], dict[str, Linear]] = {}
    for part, linear in parts.items():
        common = owner is not None and part in ("query", "key", "value")
        groups.setdefault((split and part not in needed, common, part if linear.quaternion else ""), {})[part] = linear
    reads = []
    for (first_only, common, _), group in sorted(groups.items(), key=lambda item: item[0][0]):
        readers = [linear.reader for linear in group.values()]
        joined = readers[0] if len(group) == 1 else _join(f"{owner if common else name}.{'_'.join(group)}", readers)
        reads.append(Read(source, first_only, joined, tuple((part, len(m.weight)) for part, m in zip(group, readers, strict=True))))
    return reads


def _join(name: str, linears: Sequence[Linear]) -> Linear:
    biases = [np.zeros(len(m.weight), np.float32) if m.bias is None else m.bias for m in linears]
    bias = None if all(m.bias is None for m in linears) else np.concatenate(biases)
    return Linear(name, np.concatenate([m.weight for m in linears]), bias)


def _compose(outer: Linear, inner: Linear) -> Linear:
    """outer(inner(x)) as one matrix, multiplied out in float64."""
    weight = outer.weight.astype(np.float64) @ inner.weight
    bias = outer.weight.astype(np.float64) @ inner.bias + outer.bias
    return Linear(outer.name, weight.astype(np.float32), bias.astype(np.float32))


def _linear(name: str, module: Any) -> Linear:
    """A dense matrix, a product of two (``inner`` and ``outer``), or the ``blocks`` of a quaternion one."""
    if hasattr(module, "inner"):
        return replace(_linear(name, module.outer), inner=Linear(f"{name}.inner", _array(module.inner.weight), None))
    quaternion = hasattr(module, "blocks")
    weight = _array(module.blocks if quaternion else module.weight)
    bias = np.zeros(len(weight), np.float32) if module.bias is None else _array(module.bias)
    return Linear(name, weight, bias, quaternion=quaternion)


def _norm(name: str, module: Any) -> Norm:
    eps = getattr(module, "eps", None)
    return Norm(name, "affine" if eps is None else "layer_norm", _array(module.weight), _array(module.bias), eps or 0.0)


def _spread(scale: np.ndarray) -> float:
    """Largest |scale| over the smallest; infinite where one is 0."""
    size = np.abs(scale)
    return float(size.max() / size.min()) if size.min() > 0 else float("inf")


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().float().cpu().numpy().copy()
