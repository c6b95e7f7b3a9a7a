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
- The last layer computes only the first token, where no head reads another.
- Of an attention without heads, or an FFN of width 0, the bias is left.

A matrix of low rank stays two thin ones; of those of queries, keys and values the first ones, which read the feature map,
are rows of the one matrix. A quaternion matrix stays as its blocks, a quarter of the weights, which no scale per channel
may touch. Where layers share their attention or their FFNs alone, both of which lie between norms of each layer's own,
the norms stay in the file, and the shared matrices have the name that they have in the first of these layers.

Shapes as in the encoder: n tokens, H feature map, B width inside a layer, A heads of size d. Weights are float32 [out, in].

What this file does not do: describe the result (:mod:`exporters.graph`), run it (:mod:`exporters.forward`), or write files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from exporters.graph import FeedForward, FoldedEncoder, Head, Layer, Linear, Norm, Read, Table
from runtimes.errors import BadInput

MAX_SPREAD = 64.0
"""Largest ratio between two channels' scales that is folded into neighbours; int8 rows keep 7 bits above it."""
PROBABILITIES = {"logits": "probabilities", "slot_logits": "slot_probabilities"}
"""What outputs of classes are called as probabilities."""
ACTIVATIONS = ("softmax", "sigmoid")
"""What makes probabilities of logits."""


def fold(model: Any, max_length: int, segments: int = 1, activation: str | None = None) -> FoldedEncoder:
    """Fold an encoder of :mod:`pipeline.models.encoder`; it is not changed.

    Args:
        model: the encoder; its modules' weights and its ``config`` are read.
        max_length: longest text in tokens; positions beyond it are left out.
        segments: 1 if every text is one segment, 2 if token types matter; a model with fewer than two types takes none.
        activation: ``softmax`` or ``sigmoid`` where the results are to be probabilities and not logits.

    Raises:
        BadInput: probabilities are wanted of results that are no logits of classes.
        ValueError: the model has fewer positions than ``max_length``, two different matrices would have one name, or a head that reads a
            text as a whole has several outputs.
    """
    if activation not in (None, *ACTIVATIONS):
        raise BadInput(f"probabilities: {activation!r} does not make them; a task without classes gives its outputs as they are")
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
    reads_first = all(head["tokens"] == "first" for head in config.heads)
    for position, index in enumerate(order):
        last = reads_first and position == len(order) - 1
        split = last and not repeated and not owners.shares(own[index].attention.output)
        layers.append(_fold_layer(own[index], f"layers.{index}", config, hidden, at, last, split, owners, rigid))
        at += len(_hidden_norms(own[index]))
    heads = tuple(_fold_head(model, head, hidden, at, activation) for head in config.heads)
    folded = FoldedEncoder(**embeddings, layers=tuple(layers), heads=heads)
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
    for linear, _ in model.uses():
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
        "blanks_padding": kind == "trigram" and config.pad_token_id != 0,
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


def _fold_head(model: Any, head: Mapping[str, Any], hidden: _Chain, at: int, activation: str | None) -> Head:
    """``head`` as it stands in the config. The stream ends at the scale 1, so that a feature map may be given as it is."""
    if len(head["outputs"]) > 1 and head["tokens"] != "all":
        raise ValueError(f"head {head['name']}: several outputs are for heads that read all tokens, one by one")
    pooler = None
    if head["pooler"] and model.pooler is not None:
        pooler = replace(_linear("pooler", model.pooler), activation=model.config.pooler)
    outputs = tuple(head["outputs"])
    name = head["name"] if head["name"] not in outputs else f"{head['name']}.head"  # a file has no two things of one name
    linear = None if head["size"] is None else _linear(name, model.heads[head["name"]])
    if activation is not None:
        outputs = tuple(probability_name(name) for name in outputs)
    folded = Head(outputs, head["tokens"], pooler, linear, head["normalized"], activation)
    return folded.with_reader(lambda reader: hidden.read(at, reader))


def probability_name(output: str) -> str:
    """What logits of classes are called where a file gives their probabilities: ``slot_logits`` becomes ``slot_probabilities``.

    Raises:
        BadInput: ``output`` has no classes to choose from.
    """
    if output not in PROBABILITIES:
        raise BadInput(f"{output}: only {' and '.join(PROBABILITIES)} can be given as probabilities; export the outputs as they are")
    return PROBABILITIES[output]


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
