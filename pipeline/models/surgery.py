"""Physical cuts: an encoder with fewer heads, units, channels, layers or ranks, whose weights are those that stay.

Every cut is a new config and a selection of rows and columns; nothing is masked, so the saving is one of shapes and holds
in every runtime. Where a cut ends, :func:`require_same` holds the smaller model against the masked one on real texts.

Indices are per layer position. Layers that share weights must be cut alike: a layer that is used whole in several positions
has its tensors under one name, which is cut once; a matrix that layers share has a name in each, all of which are cut.

What this file does not do: choose what goes (the methods do), or train. Its checks get texts handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.models.config import EncoderConfig
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.inference import predict
from pipeline.models.linear import LowRank
from pipeline.tasks.batches import EncodedTexts, with_neighbours
from runtimes.errors import BadInput, GateFailed

TOLERANCE = 1e-4
"""Largest |difference| of an output between a masked model and the model cut to match."""
Weights = dict[str, Tensor]


def keep_heads(model: Encoder, kept: Sequence[Sequence[int]]) -> Encoder:
    """The model with the heads ``kept[l]`` of every layer l; a layer may lose all, then only the bias behind them stays."""
    dims = [layer["head_size"] for layer in model.config.layers]
    every = [[list(range(d)) for _ in heads] for heads, d in zip(kept, dims, strict=True)]
    return keep_head_dimensions(model, every, every, kept)


def keep_head_dimensions(
    model: Encoder, query_key: Sequence[Sequence[Sequence[int]]], value: Sequence[Sequence[Sequence[int]]],
    heads: Sequence[Sequence[int]] | None = None,
) -> Encoder:  # fmt: skip
    """The model with the dimensions ``query_key[l][h]`` of queries and keys, and ``value[l][h]`` of values, for each head of ``heads[l]``.

    Queries and keys of a head lose the same dimensions, because they meet in a product; values and the output's columns
    likewise. All heads of a layer keep equally many of both. The scores are divided by the root of the new size, so the
    queries are multiplied by the root of new over old, and the function is that of the old size.

    Args:
        heads: which heads these are; all of each layer if left out.
    """
    heads = [range(layer["heads"]) for layer in model.config.layers] if heads is None else heads
    _refuse_quaternions(model, "attention heads")
    weights = model.state_dict()
    layers = []
    for index, layer in enumerate(model.config.layers):
        size, chosen = layer["head_size"], list(heads[index])
        _check_indices(chosen, layer["heads"], f"layer {index}: heads")
        for dims in (*query_key[index], *value[index]):
            _check_indices(dims, size, f"layer {index}: dimensions")
        _check_alike(model, index, model.config.shared_attention, (heads, query_key, value))
        kept_size = len(query_key[index][0]) if chosen else size
        if any(len(dims) != kept_size for dims in (*query_key[index], *value[index])):
            raise BadInput(f"layer {index}: every head must keep equally many dimensions of queries, keys and values")
        layers.append(layer | {"heads": len(chosen), "head_size": kept_size})
        name = f"layers.{model.order[index]}.attention"
        if model.config.shared_with[index] == index:
            qk = _flat([[h * size + d for d in dims] for h, dims in zip(chosen, query_key[index], strict=True)])
            v = _flat([[h * size + d for d in dims] for h, dims in zip(chosen, value[index], strict=True)])
            if layer["heads"] and chosen:
                _rows(weights, f"{name}.query", qk, scale=(kept_size / size) ** 0.5)
                _rows(weights, f"{name}.key", qk)
                _rows(weights, f"{name}.value", v)
            elif layer["heads"]:
                _drop(weights, [f"{name}.{part}" for part in ("query", "key", "value")])
            _columns(weights, f"{name}.output", v)
        if not chosen:
            layers[-1] = _without_ranks(layers[-1], "attention.")
    return _rebuilt(model, weights, layers=layers)


def keep_ffn_units(model: Encoder, kept: Sequence[Sequence[Sequence[int]]]) -> Encoder:
    """The model with the units ``kept[l][f]`` of FFN f in layer l; with none, only the bias behind it stays."""
    _refuse_quaternions(model, "FFN units")
    weights, layers = model.state_dict(), []
    for index, layer in enumerate(model.config.layers):
        layers.append(layer | {"ffn_sizes": [len(units) for units in kept[index]]})
        for number, units in enumerate(kept[index]):
            _check_indices(units, layer["ffn_sizes"][number], f"layer {index}: FFN units")
            _check_alike(model, index, model.config.shared_ffn, (kept,))
            name = f"layers.{model.order[index]}.ffns.{number}"
            if model.config.shared_with[index] == index and layer["ffn_sizes"][number]:
                if units:
                    _rows(weights, f"{name}.up", units)
                else:
                    _drop(weights, [f"{name}.up"])
                _columns(weights, f"{name}.down", units)
            if not units:
                layers[-1] = _without_ranks(layers[-1], f"ffns.{number}.")
    return _rebuilt(model, weights, layers=layers)


def keep_hidden(model: Encoder, kept: Sequence[int]) -> Encoder:
    """The model with the channels ``kept`` of its feature map.

    Layer norms then take their statistics over fewer channels, which is what a gated norm does too
    (:func:`pipeline.models.gated.gated`).

    Raises:
        BadInput: a model whose feature map cannot be cut: one with bottlenecks, NoNorm or ALBERT's embeddings.
    """
    config = model.config
    if not config.hidden_can_shrink:
        raise BadInput(
            "the hidden width can be cut in BERT-like encoders only: layer norms, no bottleneck, embeddings of the same width, "
            "and no output that is as wide as the model"
        )
    _refuse_quaternions(model, "hidden width")
    _check_indices(kept, config.hidden_size, "hidden channels")
    if not kept:
        raise BadInput("hidden channels: at least one must stay")
    weights = model.state_dict()
    embeddings = ["position", "token_type"] + (["word"] if config.embedding_projection == "none" else [])
    for part in embeddings:
        if f"embeddings.{part}.weight" in weights:
            weights[f"embeddings.{part}.weight"] = weights[f"embeddings.{part}.weight"][:, kept]
    if config.embedding_projection == "word":
        _rows(weights, "embeddings.projection", kept)
    _rows(weights, "embeddings.norm", kept)
    for own, layer in enumerate(model.layers):
        name = f"layers.{own}"
        readers = [f"attention.{part}" for part in ("query", "key", "value") if layer.attention.heads]
        readers += [f"ffns.{i}.up" for i, ffn in enumerate(layer.ffns) if ffn.up is not None]
        writers = ["attention.output", "attention_norm", *(f"ffns.{i}.{part}" for i in range(len(layer.ffns)) for part in ("down", "norm"))]
        for part in readers:
            _columns(weights, f"{name}.{part}", kept)
        for part in writers:
            _rows(weights, f"{name}.{part}", kept)
    if model.pooler is not None:
        _columns(weights, "pooler", kept)
        _rows(weights, "pooler", kept)
    for name in model.heads:
        _columns(weights, f"heads.{name}", kept)
    size = {"hidden_size": len(kept)} | ({"embedding_size": len(kept)} if config.embedding_projection == "none" else {})
    return _rebuilt(model, weights, **size)


def keep_layers(model: Encoder, kept: Sequence[int]) -> Encoder:
    """The model with the layers ``kept``, in their old order."""
    config = model.config
    _check_indices(kept, len(config.layers), "layers")
    if list(kept) != sorted(kept):
        raise BadInput(f"layers {list(kept)}: they stay in their order")
    sharing = {name: _renumbered(getattr(config, name), kept) for name in ("shared_with", "shared_attention", "shared_ffn")}
    made = Encoder(EncoderConfig(**config.to_dict() | {"layers": [config.layers[i] for i in kept]} | sharing))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("layers.")}
    old = model.state_dict()
    for new_position, position in enumerate(kept):
        start = f"layers.{model.order[position]}."
        weights |= {f"layers.{made.order[new_position]}.{n[len(start):]}": t for n, t in old.items() if n.startswith(start)}
    made.load_state_dict(weights)
    return made.eval()


def factor(model: Encoder, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Encoder:
    """The model with some matrices as products: name -> (outer [out, r], inner [r, in]).

    Args:
        factors: names within the model, such as ``layers.0.attention.query``.
    """
    _refuse_shared_parts(model)
    _refuse_quaternions(model, "ranks")
    weights, layers = model.state_dict(), [dict(layer) for layer in model.config.layers]
    for name, (outer, inner) in factors.items():
        bias = weights.pop(f"{name}.outer.bias", None) if f"{name}.outer.bias" in weights else weights.pop(f"{name}.bias")
        _drop(weights, [name])
        weights |= {f"{name}.outer.weight": outer, f"{name}.outer.bias": bias, f"{name}.inner.weight": inner}
        own, part = name.removeprefix("layers.").split(".", 1)
        for position, index in enumerate(model.order):
            if index == int(own):
                layers[position]["ranks"] = layers[position].get("ranks", {}) | {part: len(inner)}
    return _rebuilt(model, weights, layers=layers)


def multiply_out(model: Encoder, names: Sequence[str]) -> Encoder:
    """The model with the products ``names`` as dense matrices again; as for :func:`factor`, no part may be shared by layers alone."""
    _refuse_shared_parts(model)
    weights, layers = model.state_dict(), [dict(layer) for layer in model.config.layers]
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, LowRank):
            dense, bias = module.weight.detach(), module.bias.detach()
            _drop(weights, [name])
            weights |= {f"{name}.weight": dense, f"{name}.bias": bias}
        own, part = name.removeprefix("layers.").split(".", 1)
        for position, index in enumerate(model.order):
            if index == int(own):
                layers[position] = _without_ranks(layers[position], part)
    return _rebuilt(model, weights, layers=layers)


def layer_matrices(model: Encoder) -> list[str]:
    """Names of all matrices of the layers, as :func:`factor` takes them; a shared one once."""
    names: dict[int, str] = {}
    for own, layer in enumerate(model.layers):
        parts = [f"attention.{part}" for part in ("query", "key", "value", "output") if layer.attention.heads]
        parts += [f"ffns.{i}.{part}" for i, ffn in enumerate(layer.ffns) if ffn.up is not None for part in ("up", "down")]
        for part in parts:
            names.setdefault(id(layer.get_submodule(part)), f"layers.{own}.{part}")
    return list(names.values())


def break_even_rank(in_features: int, out_features: int) -> int:
    """The largest rank at which two thin matrices hold fewer weights than the dense one."""
    return (in_features * out_features - 1) // (in_features + out_features)


def encoder_parameters(model: Encoder) -> int:
    """Unique parameters of the layers, without embeddings and head."""
    return count_unique_parameters(model.layers)


def require_same(expected: Mapping[str, Tensor], model: Encoder, texts: EncodedTexts, what: str) -> float:
    """Hold the outputs of a cut model against those that the masked one gave for the same texts, as :func:`predict` gives them.

    Returns:
        The largest |difference|.

    Raises:
        GateFailed: they differ by more than ``TOLERANCE``; nothing goes on from there.
    """
    found = predict(model, texts)
    worst = max(float((found[name] - value).abs().max()) for name, value in expected.items())
    if not worst < TOLERANCE:
        raise GateFailed(f"{what}: the cut model differs from the masked one by {worst:.3g} on real texts, {TOLERANCE:g} is allowed")
    return worst


def probe_texts(texts: EncodedTexts, count: int = 128) -> EncodedTexts:
    """Some of ``texts``, of every length, groups whole."""
    lengths = texts.lengths.reshape(-1, texts.group).max(axis=1)
    by_length = np.argsort(lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(lengths) - 1, min(count, len(lengths))).astype(int)]
    return texts.take(with_neighbours(chosen, texts.group))


# --- pieces -----------------------------------------------------------------------------------------------------------


def _rebuilt(model: Encoder, weights: Weights, **changes: Any) -> Encoder:
    """An encoder of the changed config with ``weights``."""
    try:
        config = EncoderConfig(**model.config.to_dict() | changes)
    except ValueError as error:
        raise BadInput(f"{error}; layers that share weights must be cut alike") from error
    made = Encoder(config)
    made.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()})
    return made.eval()


def _each(name: str, weights: Weights, thin: str) -> str:
    """``name``, or the factor ``thin`` of it where it is a product."""
    return f"{name}.{thin}" if f"{name}.{thin}.weight" in weights else name


def _rows(weights: Weights, name: str, kept: Sequence[int], scale: float = 1.0) -> None:
    name = _each(name, weights, "outer")
    for leaf in ("weight", "bias"):
        if f"{name}.{leaf}" in weights:
            weights[f"{name}.{leaf}"] = weights[f"{name}.{leaf}"][list(kept)] * scale


def _columns(weights: Weights, name: str, kept: Sequence[int]) -> None:
    inner = _each(name, weights, "inner")
    if not kept and inner != name:  # nothing is read: the bias alone stays
        outer, bias = weights[f"{name}.outer.weight"], weights[f"{name}.outer.bias"]
        _drop(weights, [name])
        weights |= {f"{name}.weight": outer[:, :0], f"{name}.bias": bias}
        return
    weights[f"{inner}.weight"] = weights[f"{inner}.weight"][:, list(kept)]


def _drop(weights: Weights, names: Sequence[str]) -> None:
    for key in [key for key in weights for name in names if key.startswith(f"{name}.")]:
        del weights[key]


def _without_ranks(layer: dict[str, Any], prefix: str) -> dict[str, Any]:
    ranks = {part: rank for part, rank in layer.get("ranks", {}).items() if not part.startswith(prefix)}
    return {key: value for key, value in layer.items() if key != "ranks"} | ({"ranks": ranks} if ranks else {})


def _renumbered(owners: Sequence[int], kept: Sequence[int]) -> list[int]:
    """For each kept layer the new index of the first kept layer that has the same owner."""
    first: dict[int, int] = {}
    return [first.setdefault(owners[position], new) for new, position in enumerate(kept)]


def _flat(lists: Sequence[Sequence[int]]) -> list[int]:
    return [item for part in lists for item in part]


def _check_alike(model: Encoder, index: int, owners: Sequence[int], choices: Sequence[Sequence[Any]]) -> None:
    """Refuse a layer that is cut otherwise than the one whose weights it uses."""
    owner = model.config.shared_with[index] if owners[index] == index else owners[index]
    if any(list(map(list, _nested(choice[index]))) != list(map(list, _nested(choice[owner]))) for choice in choices):
        raise BadInput(f"layer {index} uses the weights of layer {owner}, but is cut otherwise; layers that share weights must be cut alike")


def _nested(choice: Sequence[Any]) -> Sequence[Sequence[int]]:
    return [part if isinstance(part, Sequence) else [part] for part in choice]


def _check_indices(kept: Sequence[int], count: int, what: str) -> None:
    if len(set(kept)) != len(kept) or any(not 0 <= i < count for i in kept):
        raise BadInput(f"{what}: {list(kept)} must be distinct and lie between 0 and {count - 1}")


def _refuse_shared_parts(model: Encoder) -> None:
    if model.config.shared_attention + model.config.shared_ffn != list(range(len(model.config.layers))) * 2:
        raise BadInput("factorization: this model shares the attention or the FFNs alone between layers; factorize before share-layers")


def _refuse_quaternions(model: Encoder, what: str) -> None:
    if model.config.quaternion:
        raise BadInput(f"{what} cannot be cut out of quaternion matrices, whose weights serve four places at once; prune before quaternion")

