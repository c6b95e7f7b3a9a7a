"""Read ``config.json`` of a model folder into the fields of :class:`~pipeline.models.config.EncoderConfig`.

Every value is checked where it is read, before a tensor is made: a wrong one is named with the file and what it may be.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipeline.models.config import NORMS, EncoderConfig, layer_shape
from pipeline.models.json_files import CURE, read_table
from pipeline.models.tensor_names import TENSOR_NAMES
from runtimes.errors import BadInput

MOST = {"vocab_size": 5_000_000, "max_position_embeddings": 1_000_000, "num_hidden_layers": 1000, "n_layers": 1000}
"""Largest values that are believed."""
MOST_OTHERS = 100_000
MOST_LABELS = 1_000_000


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``, of a family that can be read.

    Raises:
        BadInput: no such file, a damaged one, or one of another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"model {folder}: no config.json; a folder written by save_pretrained is needed")
    raw = read_table(path)
    kind = raw.get("model_type")
    if kind != EncoderConfig.model_type and (not isinstance(kind, str) or kind not in TENSOR_NAMES):
        told = "names no model_type" if kind is None else f"architecture {_shown(kind)} is not a BERT-class encoder"
        raise BadInput(f"model {path}: {told}; supported are {', '.join(TENSOR_NAMES)}")
    labels(raw, path)
    architectures(raw, path)
    return raw


def read_encoder_config(folder: Path) -> EncoderConfig:
    """The shape of the encoder in ``folder``, its heads left at their default.

    Raises:
        BadInput: as :func:`read_config`, and for a value that cannot be.
    """
    raw = read_config(folder)
    return made_config(encoder_fields(raw, folder / "config.json"), folder / "config.json")


def made_config(fields: dict[str, Any], place: Path | str) -> EncoderConfig:
    """The configuration with ``fields``; BadInput where they contradict each other."""
    try:
        return EncoderConfig(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BadInput(f"model {place}: {told}; {CURE}") from error


def encoder_fields(raw: dict[str, Any], place: Path | str) -> dict[str, Any]:
    """Fields of :class:`EncoderConfig` without labels and heads, of a config of any family or of this package's own."""
    if raw["model_type"] != EncoderConfig.model_type:
        fields = config_fields(raw, place)
        width, heads = fields.get("bottleneck_size") or fields["hidden_size"], fields["layers"][0]["heads"]
        if width % heads:
            raise BadInput(f"model {place}: {heads} attention heads do not divide the width {width}; {CURE}")
        return fields
    values = _Values(raw, place)
    for key in ("vocab_size", "hidden_size", "embedding_size", "max_position_embeddings"):
        values.whole(key)
    for key, default in (("type_vocab_size", 2), ("position_offset", 0), ("pad_token_id", 0)):
        values.whole(key, default, least=0)
    values.whole("bottleneck_size", 1)
    values.one_of("activation", _activations(), "gelu")
    layers = raw.get("layers")
    if not isinstance(layers, list) or len(layers) > MOST["num_hidden_layers"] or not all(map(_is_layer, layers)):
        raise BadInput(f"model {place}: layers is {_shown(layers)}, not a list of layers with heads, head_size and ffn_sizes; {CURE}")
    return {k: v for k, v in raw.items() if k not in ("id2label", "label2id", "num_labels", "heads")}


def labels(raw: dict[str, Any], place: Path | str) -> dict[int, str]:
    """Number of a class -> its name; {} where the config has none.

    Raises:
        BadInput: names that are not numbered from 0.
    """
    given = raw.get("id2label")
    if given is None:
        return {}
    try:
        named = {int(number): name for number, name in given.items()}
    except (AttributeError, ValueError) as error:
        raise BadInput(f"model {place}: id2label is {_shown(given)}, not names of classes by their numbers; {CURE}") from error
    if sorted(named) != list(range(len(named))) or not all(isinstance(name, str) for name in named.values()):
        raise BadInput(f"model {place}: id2label is {_shown(given)}: classes are numbered 0, 1, ... and each has a text for its name; {CURE}")
    return dict(sorted(named.items()))


def architectures(raw: dict[str, Any], place: Path | str) -> str:
    """The class that wrote the checkpoint; empty where the config does not say."""
    given = raw.get("architectures") or [""]
    if not isinstance(given, list) or not isinstance(given[0], str):
        raise BadInput(f"model {place}: architectures is {_shown(given)}, not a list with the name of a class; {CURE}")
    return given[0]


def class_names(raw: dict[str, Any], place: Path | str = "config.json") -> list[str]:
    """Names of the classes of the checkpoint's head, in its order; transformers leaves those out that it made up itself."""
    named = list(labels(raw, place).values())
    return named or [f"LABEL_{number}" for number in range(_Values(raw, place).whole("num_labels", 2, most=MOST_LABELS))]


def config_fields(raw: dict[str, Any], place: Path | str = "config.json") -> dict[str, Any]:
    """Translate a transformers config into the fields of :class:`EncoderConfig`.

    Raises:
        BadInput: a value that is missing or cannot be, or asks for what the encoder does not have.
    """
    kind, values = raw["model_type"], _Values(raw, place)
    if raw.get("position_embedding_type") not in (None, "absolute"):
        raise BadInput(f"model {place}: position_embedding_type {_shown(raw['position_embedding_type'])} is not supported, only 'absolute'")
    if raw.get("quantization_config"):
        raise BadInput(f"model {place}: the weights are quantized (quantization_config); give the checkpoint that they were quantized from")
    fields = _distilbert_fields(values) if kind == "distilbert" else _bert_fields(values)
    offset = kind in ("roberta", "xlm-roberta", "camembert")
    fields |= {
        "vocab_size": values.whole("vocab_size"), "max_position_embeddings": values.whole("max_position_embeddings"),
        "pad_token_id": values.whole("pad_token_id", int(offset), least=0, most=MOST["vocab_size"]), "family": kind,
    }  # fmt: skip
    if fields["pad_token_id"] >= fields["vocab_size"]:
        raise BadInput(f"model {place}: pad_token_id is {fields['pad_token_id']}, vocab_size {fields['vocab_size']}; one of them is wrong")
    if offset:
        fields["position_offset"] = fields["pad_token_id"] + 1
        if fields["position_offset"] + 2 > fields["max_position_embeddings"]:
            raise BadInput(f"model {place}: max_position_embeddings leaves no position behind padding; a RoBERTa counts from pad_token_id + 1")
    elif kind == "electra":
        fields["pooler"] = "gelu"
        size = values.whole("embedding_size")
        if size != fields["hidden_size"]:
            fields |= {"embedding_size": size, "embedding_projection": "sum"}
    elif kind == "albert":
        fields |= _albert_fields(values, len(fields["layers"]), place)
    elif kind == "mobilebert":
        fields |= _mobilebert_fields(values, len(fields["layers"]), place)
    return fields


def _bert_fields(values: _Values) -> dict[str, Any]:
    hidden, heads, count = (values.whole(key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    dropout = values.share("hidden_dropout_prob", 0.1)
    return {
        "hidden_size": hidden, "layers": [layer_shape(heads, hidden // heads, [values.whole("intermediate_size")]) for _ in range(count)],
        "activation": values.one_of("hidden_act", _activations(), "gelu"), "layer_norm_eps": values.positive("layer_norm_eps", 1e-12),
        "type_vocab_size": values.whole("type_vocab_size", 2, least=0), "hidden_dropout": dropout,
        "attention_dropout": values.share("attention_probs_dropout_prob", 0.1),
        "classifier_dropout": values.share("classifier_dropout", values.share("classifier_dropout_prob", dropout)), "pooler": "tanh",
    }  # fmt: skip


def _distilbert_fields(values: _Values) -> dict[str, Any]:
    hidden, heads, count, ffn = (values.whole(key) for key in ("dim", "n_heads", "n_layers", "hidden_dim"))
    return {
        "hidden_size": hidden, "type_vocab_size": 0, "pooler": "relu",
        "layers": [layer_shape(heads, hidden // heads, [ffn]) for _ in range(count)],
        "activation": values.one_of("activation", _activations(), "gelu"), "hidden_dropout": values.share("dropout", 0.1),
        "attention_dropout": values.share("attention_dropout", 0.1), "classifier_dropout": values.share("seq_classif_dropout", 0.2),
    }  # fmt: skip


def _albert_fields(values: _Values, count: int, place: Path | str) -> dict[str, Any]:
    if values.whole("inner_group_num", 1) != 1:
        raise BadInput(f"model {place}: ALBERT with inner_group_num above 1 is not supported")
    groups = [int(i * values.whole("num_hidden_groups", 1, most=count) / count) for i in range(count)]
    return {
        "embedding_size": values.whole("embedding_size"), "embedding_projection": "sum",
        "shared_with": [groups.index(group) for group in groups],
    }  # fmt: skip


def _mobilebert_fields(values: _Values, count: int, place: Path | str) -> dict[str, Any]:
    hidden, embedding, heads = (values.whole(key) for key in ("hidden_size", "embedding_size", "num_attention_heads"))
    bottleneck = values.whole("intra_bottleneck_size") if values.flag("use_bottleneck", True) else None
    inner = hidden if bottleneck is None else bottleneck
    shared = "query_key" if values.flag("key_query_shared_bottleneck", True) else "none"
    ffns = [values.whole("intermediate_size")] * values.whole("num_feedforward_networks", 4, most=1000)
    return {
        "embedding_size": embedding,
        "embedding_projection": "trigram" if values.flag("trigram_input", True) else "word" if embedding != hidden else "none",
        "layers": [layer_shape(heads, inner // heads, ffns) for _ in range(count)],
        "bottleneck_size": bottleneck, "bottleneck_attention": "all" if values.flag("use_bottleneck_attention", False) else shared,
        "norm": values.one_of("normalization_type", NORMS, "no_norm"), "activation": values.one_of("hidden_act", _activations(), "relu"),
        "pooler": "tanh" if values.flag("classifier_activation", True) else "none",
    }  # fmt: skip


class _Values:
    """The values of a config.json, each checked where it is read; null is as good as none."""

    def __init__(self, raw: dict[str, Any], place: Path | str) -> None:
        self._raw, self._place = raw, place

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int | None = None) -> int:
        most = MOST.get(key, MOST_OTHERS) if most is None else most
        return self._value(key, default, f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)

    def share(self, key: str, default: float) -> float:
        return self._value(key, default, "a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1)

    def positive(self, key: str, default: float) -> float:
        return self._value(key, default, "a number above 0", lambda v: type(v) in (int, float) and math.isfinite(v) and 0 < v <= 1)

    def flag(self, key: str, default: bool) -> bool:
        return self._value(key, default, "true or false", lambda v: type(v) is bool)

    def one_of(self, key: str, known: tuple[str, ...], default: str) -> str:
        return self._value(key, default, f"one of {', '.join(known)}", lambda v: isinstance(v, str) and v in known)

    def _value(self, key: str, default: Any, what: str, holds: Any) -> Any:
        value = self._raw.get(key)
        if value is None:
            if default is None:
                raise BadInput(f"model {self._place}: {key} is missing; {CURE}")
            return default
        if not holds(value):
            raise BadInput(f"model {self._place}: {key} is {_shown(value)}, not {what}; {CURE}")
        return value


def _activations() -> tuple[str, ...]:
    from transformers.activations import ACT2FN

    return tuple(ACT2FN)


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not isinstance(layer.get("ffn_sizes"), list):
        return False
    sizes = [layer.get("heads"), layer.get("head_size"), *layer["ffn_sizes"]]
    ranks = layer.get("ranks") or {}
    sizes += list(ranks.values()) if isinstance(ranks, dict) else [None]
    return all(type(size) is int and 0 <= size <= MOST_OTHERS for size in sizes)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
