"""Read the checkpoints of the transformers library into :class:`~pipeline.models.encoder.Encoder`, and write them back.

Six families are read: BERT (with MiniLM), RoBERTa, DistilBERT, ELECTRA, ALBERT and MobileBERT. The translation is a
table of names: the same weights give the same logits (``tests/pipeline/test_hub.py`` holds max |difference| < 1e-5).

What this file does not do: open a connection (:mod:`pipeline.models.source` finds the folder), or unpickle anything.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.models.config import EncoderConfig, layer_shape
from pipeline.models.encoder import Encoder
from pipeline.tasks.heads import head_shape
from runtimes.errors import BadInput

WEIGHTS = "model.safetensors"

# One row per tensor: name in the checkpoint (without the family's prefix) -> name here. {l} is a layer, {f} an FFN.
_BERT = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.token_type_embeddings": "embeddings.token_type",
    "embeddings.LayerNorm": "embeddings.norm",
    "encoder.layer.{l}.attention.self.query": "layers.{l}.attention.query",
    "encoder.layer.{l}.attention.self.key": "layers.{l}.attention.key",
    "encoder.layer.{l}.attention.self.value": "layers.{l}.attention.value",
    "encoder.layer.{l}.attention.output.dense": "layers.{l}.attention.output",
    "encoder.layer.{l}.attention.output.LayerNorm": "layers.{l}.attention_norm",
    "encoder.layer.{l}.intermediate.dense": "layers.{l}.ffns.0.up",
    "encoder.layer.{l}.output.dense": "layers.{l}.ffns.0.down",
    "encoder.layer.{l}.output.LayerNorm": "layers.{l}.ffns.0.norm",
    "pooler.dense": "pooler",
    "classifier": "heads.classifier",
    "qa_outputs": "heads.span",
}
_ROBERTA = {k: v for k, v in _BERT.items() if k != "pooler.dense"} | {
    "classifier.dense": "pooler",
    "classifier.out_proj": "heads.classifier",
}
_ELECTRA = _ROBERTA | {"embeddings_project": "embeddings.projection"}
_DISTILBERT = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.LayerNorm": "embeddings.norm",
    "transformer.layer.{l}.attention.q_lin": "layers.{l}.attention.query",
    "transformer.layer.{l}.attention.k_lin": "layers.{l}.attention.key",
    "transformer.layer.{l}.attention.v_lin": "layers.{l}.attention.value",
    "transformer.layer.{l}.attention.out_lin": "layers.{l}.attention.output",
    "transformer.layer.{l}.sa_layer_norm": "layers.{l}.attention_norm",
    "transformer.layer.{l}.ffn.lin1": "layers.{l}.ffns.0.up",
    "transformer.layer.{l}.ffn.lin2": "layers.{l}.ffns.0.down",
    "transformer.layer.{l}.output_layer_norm": "layers.{l}.ffns.0.norm",
    "pre_classifier": "pooler",
    "classifier": "heads.classifier",
    "qa_outputs": "heads.span",
}
_ALBERT_LAYER = "encoder.albert_layer_groups.{l}.albert_layers.0."
_ALBERT = {
    "embeddings.word_embeddings": "embeddings.word",
    "embeddings.position_embeddings": "embeddings.position",
    "embeddings.token_type_embeddings": "embeddings.token_type",
    "embeddings.LayerNorm": "embeddings.norm",
    "encoder.embedding_hidden_mapping_in": "embeddings.projection",
    _ALBERT_LAYER + "attention.query": "layers.{l}.attention.query",
    _ALBERT_LAYER + "attention.key": "layers.{l}.attention.key",
    _ALBERT_LAYER + "attention.value": "layers.{l}.attention.value",
    _ALBERT_LAYER + "attention.dense": "layers.{l}.attention.output",
    _ALBERT_LAYER + "attention.LayerNorm": "layers.{l}.attention_norm",
    _ALBERT_LAYER + "ffn": "layers.{l}.ffns.0.up",
    _ALBERT_LAYER + "ffn_output": "layers.{l}.ffns.0.down",
    _ALBERT_LAYER + "full_layer_layer_norm": "layers.{l}.ffns.0.norm",
    "pooler": "pooler",
    "classifier": "heads.classifier",
    "qa_outputs": "heads.span",
}
_MOBILEBERT = {k: v for k, v in _BERT.items() if "intermediate" not in k and ".output." not in k[20:]} | {
    "embeddings.embedding_transformation": "embeddings.projection",
    "encoder.layer.{l}.attention.output.dense": "layers.{l}.attention.output",
    "encoder.layer.{l}.attention.output.LayerNorm": "layers.{l}.attention_norm",
    "encoder.layer.{l}.bottleneck.input.dense": "layers.{l}.bottleneck_in.linear",
    "encoder.layer.{l}.bottleneck.input.LayerNorm": "layers.{l}.bottleneck_in.norm",
    "encoder.layer.{l}.bottleneck.attention.dense": "layers.{l}.bottleneck_attention.linear",
    "encoder.layer.{l}.bottleneck.attention.LayerNorm": "layers.{l}.bottleneck_attention.norm",
    "encoder.layer.{l}.ffn.{f}.intermediate.dense": "layers.{l}.ffns.{f}.up",
    "encoder.layer.{l}.ffn.{f}.output.dense": "layers.{l}.ffns.{f}.down",
    "encoder.layer.{l}.ffn.{f}.output.LayerNorm": "layers.{l}.ffns.{f}.norm",
    # The last of the stacked FFNs has a name of its own in the checkpoints.
    "encoder.layer.{l}.intermediate.dense": "layers.{l}.ffns.{last}.up",
    "encoder.layer.{l}.output.dense": "layers.{l}.ffns.{last}.down",
    "encoder.layer.{l}.output.LayerNorm": "layers.{l}.ffns.{last}.norm",
    "encoder.layer.{l}.output.bottleneck.dense": "layers.{l}.bottleneck_out",
    "encoder.layer.{l}.output.bottleneck.LayerNorm": "layers.{l}.out_norm",
}
HEADS = {
    "ForSequenceClassification": ("classifier", "first"),
    "ForTokenClassification": ("classifier", "all"),
    "ForQuestionAnswering": ("span", "all"),
}
"""End of a class name of transformers -> name of the head here, and the tokens that it reads."""
TENSOR_NAMES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
    "albert": _ALBERT,
    "mobilebert": _MOBILEBERT,
}


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``; BadInput names what is wrong with it."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"model {folder}: no config.json; a folder written by save_pretrained is needed")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"model {path}: not JSON: {error}") from error
    kind = config.get("model_type")
    if kind != EncoderConfig.model_type and kind not in TENSOR_NAMES:
        raise BadInput(
            f"model {folder}: architecture {kind!r} is not a BERT-class encoder; supported are {', '.join(TENSOR_NAMES)}"
        )
    return config


def load_encoder(folder: Path, heads: list[dict[str, Any]] | None = None, labels: list[str] | None = None) -> Encoder:
    """Load a model folder of any supported family, in evaluation mode.

    Args:
        folder: ``config.json`` with ``model.safetensors``.
        heads: those of a new task (:attr:`EncoderConfig.heads`). One is made afresh unless the checkpoint has it, with the same classes.
            None takes the checkpoint's own.
        labels: class names of the first head.

    Returns:
        The encoder; its ``dropped_head`` says which head of another task was left out, None if none was; ``fresh_heads`` names the heads
        that are new and know nothing.

    Raises:
        BadInput: no weights, pickled weights only, weights that do not fit, an architecture outside the families.
    """
    raw = read_config(folder)
    weights = _read_weights(folder)
    own = _own_heads(raw)
    wanted = (own or None) if heads is None else heads
    names = dict(enumerate(labels)) if labels is not None else {int(k): v for k, v in raw.get("id2label", {}).items()}
    same_classes = labels is None or list(names.values()) == class_names(raw)
    if raw["model_type"] == EncoderConfig.model_type:
        for key in ("id2label", "label2id", "num_labels", "heads"):
            raw.pop(key, None)
        config = EncoderConfig(**raw, heads=wanted, **_label_fields(names))
    else:
        config = EncoderConfig(**config_fields(raw), heads=wanted, **_label_fields(names))
        weights = translate(weights, raw["model_type"], config)
    kept = {head["name"] for head in config.heads if heads is None or (head in own and (same_classes or head["outputs"] != ["logits"]))}
    dropped = sorted(head["name"] for head in own if head["name"] not in kept and f"heads.{head['name']}.weight" in weights)
    weights = {k: v for k, v in weights.items() if not k.startswith("heads.") or k.split(".")[1] in kept}
    model = _assemble(Encoder(config), weights, folder)
    model.dropped_head = f"{', '.join(dropped)} of {(raw.get('architectures') or ['the checkpoint'])[0]}" if dropped else None
    model.fresh_heads = sorted(name for name in model.heads if f"heads.{name}.weight" not in weights)
    return model


def _own_heads(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The heads that a checkpoint's config speaks of; none for one of pre-training."""
    if raw["model_type"] == EncoderConfig.model_type:
        return raw.get("heads") or []
    architecture = (raw.get("architectures") or [""])[0]
    for end, (name, tokens) in HEADS.items():
        if architecture.endswith(end):
            size = 2 if name == "span" else len(class_names(raw))
            outputs = ["start_logits", "end_logits"] if name == "span" else ["logits"]
            return [head_shape(name, outputs, tokens, size, pooler=tokens == "first")]
    return []


def save_encoder(model: Encoder, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, the same bytes for the same model."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model.config.to_dict(), indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    # A tensor that has several names, because layers share it, is stored under the first.
    owned = {tensor.data_ptr() if tensor.numel() else name: name for name, tensor in reversed(sorted(model.state_dict().items()))}
    state = model.state_dict()
    save_file({name: state[name].contiguous() for name in sorted(owned.values())}, folder / WEIGHTS, {"format": "pt"})


def config_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Translate a transformers config into the fields of :class:`EncoderConfig`."""
    kind = raw["model_type"]
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise BadInput(f"model: position_embedding_type {raw['position_embedding_type']!r} is not supported, only 'absolute'")
    if kind == "distilbert":
        hidden, heads, count, ffn = (raw[k] for k in ("dim", "n_heads", "n_layers", "hidden_dim"))
        return {
            "vocab_size": raw["vocab_size"], "hidden_size": hidden, "type_vocab_size": 0, "pooler": "relu",
            "layers": [layer_shape(heads, hidden // heads, [ffn]) for _ in range(count)],
            "activation": raw.get("activation", "gelu"), "max_position_embeddings": raw["max_position_embeddings"],
            "hidden_dropout": raw.get("dropout", 0.1), "attention_dropout": raw.get("attention_dropout", 0.1),
            "classifier_dropout": raw.get("seq_classif_dropout", 0.2), "pad_token_id": raw.get("pad_token_id", 0),
            "family": kind,
        }  # fmt: skip
    hidden, heads, count = (raw[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    dropout = raw.get("hidden_dropout_prob", 0.1)
    head_dropout = raw.get("classifier_dropout", raw.get("classifier_dropout_prob"))
    fields = {
        "vocab_size": raw["vocab_size"], "hidden_size": hidden,
        "layers": [layer_shape(heads, hidden // heads, [raw["intermediate_size"]]) for _ in range(count)],
        "activation": raw.get("hidden_act", "gelu"), "layer_norm_eps": raw.get("layer_norm_eps", 1e-12),
        "max_position_embeddings": raw["max_position_embeddings"], "type_vocab_size": raw.get("type_vocab_size", 2),
        "hidden_dropout": dropout, "attention_dropout": raw.get("attention_probs_dropout_prob", 0.1),
        "classifier_dropout": dropout if head_dropout is None else head_dropout,
        "pad_token_id": raw.get("pad_token_id", 0) or 0, "pooler": "tanh", "family": kind,
    }  # fmt: skip
    if kind == "roberta":
        fields["position_offset"] = fields["pad_token_id"] + 1
    elif kind == "electra":
        fields["pooler"] = "gelu"
        if raw["embedding_size"] != hidden:
            fields |= {"embedding_size": raw["embedding_size"], "embedding_projection": "sum"}
    elif kind == "albert":
        if raw.get("inner_group_num", 1) != 1:
            raise BadInput("model: ALBERT with inner_group_num above 1 is not supported")
        groups = [int(i * raw.get("num_hidden_groups", 1) / count) for i in range(count)]
        fields |= {
            "embedding_size": raw["embedding_size"], "embedding_projection": "sum",
            "shared_with": [groups.index(group) for group in groups],
        }  # fmt: skip
    elif kind == "mobilebert":
        fields |= _mobilebert_fields(raw, heads, count)
    return fields


def _mobilebert_fields(raw: dict[str, Any], heads: int, count: int) -> dict[str, Any]:
    bottleneck = raw["intra_bottleneck_size"] if raw.get("use_bottleneck", True) else None
    inner = raw["hidden_size"] if bottleneck is None else bottleneck
    reads = "all" if raw.get("use_bottleneck_attention") else "query_key" if raw.get("key_query_shared_bottleneck", True) else "none"
    projection = "trigram" if raw.get("trigram_input", True) else "word" if raw["embedding_size"] != raw["hidden_size"] else "none"
    return {
        "embedding_size": raw["embedding_size"], "embedding_projection": projection,
        "layers": [
            layer_shape(heads, inner // heads, [raw["intermediate_size"]] * raw.get("num_feedforward_networks", 4))
            for _ in range(count)
        ],
        "bottleneck_size": bottleneck, "bottleneck_attention": reads, "norm": raw.get("normalization_type", "no_norm"),
        "activation": raw.get("hidden_act", "relu"),
        "pooler": "tanh" if raw.get("classifier_activation", True) else "none",
    }  # fmt: skip


def translate(weights: dict[str, torch.Tensor], family: str, config: EncoderConfig) -> dict[str, torch.Tensor]:
    """Rename a checkpoint's tensors. Heads of other tasks (masked words, ...) are left out."""
    patterns = []
    for theirs, ours in TENSOR_NAMES[family].items():
        pattern = re.escape(theirs).replace(r"\{l\}", r"(?P<l>\d+)").replace(r"\{f\}", r"(?P<f>\d+)")
        patterns.append((re.compile(rf"(?:{family}\.)?{pattern}\.(?P<leaf>weight|bias)"), ours))
    renamed = {}
    for name, tensor in weights.items():
        for pattern, ours in patterns:
            if found := pattern.fullmatch(name):
                part = found.groupdict()
                index = int(part.get("l") or 0)
                last = len(config.layers[index]["ffn_sizes"]) - 1 if part.get("l") else 0
                renamed[ours.format(l=index, f=part.get("f"), last=last) + "." + part["leaf"]] = tensor
    return renamed


def _assemble(model: Encoder, weights: dict[str, torch.Tensor], folder: Path) -> Encoder:
    own = model.state_dict()
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            raise BadInput(
                f"model {folder}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(own[name].shape)}"
            )
    given = {own[name].data_ptr() for name in weights if name in own}
    missing = [
        name for name, tensor in own.items()
        if name not in weights and tensor.data_ptr() not in given and not name.startswith(("heads.", "pooler."))
    ]  # fmt: skip
    if missing:
        raise BadInput(f"model {folder}: {len(missing)} tensors are missing from the weights, first {missing[0]}")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickled:
            raise BadInput(
                f"model {folder}: only pickled weights ({pickled[0]}), which could run code when read; "
                f"save them again with save_pretrained(..., safe_serialization=True)"
            )
        raise BadInput(f"model {folder}: no weights; {WEIGHTS} is needed")
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items() if tensor.is_floating_point()}
    except SafetensorError as error:
        raise BadInput(f"model {path}: not a safetensors file: {error}") from error


def class_names(raw: dict[str, Any]) -> list[str]:
    """Names of the classes of the checkpoint's head, in its order; transformers leaves those out that it made up itself."""
    named = {int(number): name for number, name in (raw.get("id2label") or {}).items()}
    return [name for _, name in sorted(named.items())] or [f"LABEL_{number}" for number in range(raw.get("num_labels") or 2)]


def _label_fields(names: dict[int, str]) -> dict[str, Any]:
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}} if names else {}


def hub_config(config: EncoderConfig) -> dict[str, Any]:
    """A ``config.json`` that unmodified transformers, optimum and transformers.js accept beside an exported file.

    It names the family nearest to the model and carries its labels and sizes. The weights lie in the exported file,
    so sizes that the family cannot express (a factorized table, unequal layers) are told but read by nobody.
    """
    common = {
        "model_type": config.family, "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position_embeddings,
        "pad_token_id": config.pad_token_id, "id2label": {str(k): v for k, v in config.id2label.items()}, "label2id": config.label2id,
    }  # fmt: skip
    first = config.layers[0]
    if config.family == "distilbert":
        return common | {
            "architectures": [f"DistilBert{_ending(config)}"], "dim": config.hidden_size, "n_heads": first["heads"],
            "n_layers": len(config.layers), "hidden_dim": first["ffn_sizes"][0], "activation": config.activation,
        }  # fmt: skip
    names = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra", "albert": "Albert", "mobilebert": "MobileBert"}
    fields = common | {
        "architectures": [f"{names[config.family]}{_ending(config)}"], "hidden_size": config.hidden_size,
        "num_attention_heads": first["heads"], "num_hidden_layers": len(config.layers),
        "intermediate_size": first["ffn_sizes"][0], "hidden_act": config.activation,
        "type_vocab_size": max(1, config.type_vocab_size), "embedding_size": config.embedding_size,
    }  # fmt: skip
    if config.family == "mobilebert":
        fields |= {
            "intra_bottleneck_size": config.inner_size, "use_bottleneck": config.bottleneck_size is not None,
            "use_bottleneck_attention": config.bottleneck_attention == "all", "normalization_type": config.norm,
            "key_query_shared_bottleneck": config.bottleneck_attention == "query_key", "trigram_input": config.embedding_projection == "trigram",
            "num_feedforward_networks": len(first["ffn_sizes"]), "classifier_activation": config.pooler != "none",
        }  # fmt: skip
    return fields


def _ending(config: EncoderConfig) -> str:
    """How the class of transformers for the first head is called behind the family's name."""
    first = config.heads[0]
    return next((end for end, head in HEADS.items() if head == (first["name"], first["tokens"])), "Model")


def save_for_transformers(model: Encoder, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` that unmodified transformers loads: the inverse of :func:`translate`.

    Args:
        model: an encoder whose shape its ``config.family`` has a checkpoint form for.
        folder: is made; the tokenizer is left to the caller.

    Raises:
        BadInput: the family has no way to say what the model is (unequal layers, a factorized table, ...); nothing is written.
    """
    config = model.config
    own_layers = len(model.layers)  # fewer than config.layers where layers share their weights
    raw = hub_config(config) | {
        "layer_norm_eps": config.layer_norm_eps, "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout, "classifier_dropout": config.classifier_dropout,
    }  # fmt: skip
    if config.family == "distilbert":
        raw |= {"dropout": config.hidden_dropout, "attention_dropout": config.attention_dropout, "seq_classif_dropout": config.classifier_dropout}
    elif config.family == "albert":
        raw |= {"num_hidden_groups": own_layers, "inner_group_num": 1, "classifier_dropout_prob": config.classifier_dropout}
    # Whatever would be read back as another model cannot be said in this form.
    meant, read = _structure(config), _structure(EncoderConfig(**config_fields(raw)))
    lost = [name for name, value in meant.items() if read.get(name, value) != value]
    if lost:
        told = "; ".join(f"{name} is {meant[name]!r}, would be read as {read[name]!r}" for name in lost)
        raise BadInput(f"model {folder}: transformers' {config.family} cannot express this encoder: {told}; save_encoder can")
    state, renamed = model.state_dict(), {}
    table = dict(TENSOR_NAMES[config.family])
    if "classifier.out_proj" in table and config.heads[0]["tokens"] == "first":
        del table["classifier"]  # the name of a head that reads all tokens
    for theirs, ours in table.items():
        prefix = "" if theirs.startswith(("classifier", "pre_classifier", "qa_outputs")) else f"{config.family}."
        for index in range(own_layers if "{l}" in theirs else 1):
            last = len(config.layers[index]["ffn_sizes"]) - 1
            for ffn in range(last if "{f}" in theirs else 1):
                for leaf in ("weight", "bias"):
                    tensor = state.pop(ours.format(l=index, f=ffn, last=last) + "." + leaf, None)
                    if tensor is not None:
                        renamed[prefix + theirs.format(l=index, f=ffn) + "." + leaf] = tensor.contiguous()
    if state:
        raise BadInput(f"model {folder}: transformers' {config.family} has no place for {len(state)} tensors, first {min(state)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(dict(sorted(renamed.items())), folder / WEIGHTS, {"format": "pt"})


def _structure(config: EncoderConfig) -> dict[str, Any]:
    """What decides the function a model computes, by name, each layer a name of its own."""
    names = [
        "vocab_size", "hidden_size", "embedding_size", "embedding_projection", "embedding_projection_bias", "shared_with",
        "shared_attention", "shared_ffn", "quaternion",
        "bottleneck_size", "norm", "layer_norm_eps", "activation", "pooler", "max_position_embeddings", "position_offset",
        "type_vocab_size", "pad_token_id",
    ]  # fmt: skip
    if config.bottleneck_size is not None:  # without one it says nothing
        names.append("bottleneck_attention")
    return {name: getattr(config, name) for name in names} | {f"layers[{i}]": layer for i, layer in enumerate(config.layers)}
