"""Read the checkpoints of the transformers library into :class:`~pipeline.models.encoder.Encoder`, and write them back.

The families are BERT (with MiniLM), RoBERTa, XLM-R, CamemBERT, DistilBERT, ELECTRA, ALBERT and MobileBERT. The translation is a table
of names (:mod:`pipeline.models.tensor_names`): the same weights give the same logits (``tests/pipeline/models/test_hub.py`` holds
max |difference| < 1e-5).

What this file does not do: open a connection (:mod:`pipeline.models.source` finds the folder), or unpickle anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.models.config import EncoderConfig
from pipeline.models.encoder import Encoder
from pipeline.models.hub_fields import architectures, class_names, config_fields, encoder_fields, made_config, read_config
from pipeline.models.hub_fields import labels as config_labels
from pipeline.models.tensor_names import CLASS_NAMES, TENSOR_NAMES, prefix, translate
from pipeline.models.weights import WEIGHTS, read_weights
from pipeline.tasks.heads import head_shape
from runtimes.errors import BadInput

HEADS = {
    "ForSequenceClassification": ("classifier", "first"),
    "ForTokenClassification": ("classifier", "all"),
    "ForQuestionAnswering": ("span", "all"),
}
"""End of a class name of transformers -> name of the head here, and the tokens that it reads."""


def load_encoder(folder: Path, heads: list[dict[str, Any]] | None = None, labels: list[str] | None = None) -> Encoder:
    """Load a model folder of any supported family, in evaluation mode.

    Args:
        folder: ``config.json`` with ``model.safetensors``, or with the files of ``model.safetensors.index.json``.
        heads: those of a new task (:attr:`EncoderConfig.heads`). One is made afresh unless the checkpoint has it, with the same classes.
            None takes the checkpoint's own.
        labels: class names of the first head.

    Returns:
        The encoder; its ``dropped_head`` says which heads of other tasks, of pre-training too, were left out, None if none were;
        ``fresh_heads`` names the heads that are new and know nothing.

    Raises:
        BadInput: a damaged file, no weights, pickled weights only, weights that do not fit, an architecture outside the families.
    """
    raw, place = read_config(folder), folder / "config.json"
    fields = encoder_fields(raw, place)
    weights = read_weights(folder)
    own = _own_heads(raw, place)
    wanted = (own or None) if heads is None else heads
    names = dict(enumerate(labels)) if labels is not None else config_labels(raw, place)
    same_classes = labels is None or list(names.values()) == class_names(raw, place)
    config = made_config(fields | {"heads": wanted} | _label_fields(names), place)
    left_out: list[str] = []
    if raw["model_type"] != EncoderConfig.model_type:
        try:
            translated = translate(weights, raw["model_type"], config)
        except BadInput as error:
            raise BadInput(f"model {folder}: {error}") from error
        weights, left_out = translated.weights, translated.left_out
    kept = {head["name"] for head in config.heads if heads is None or (head in own and (same_classes or head["outputs"] != ["logits"]))}
    known = {name.split(".")[1] for name in weights if name.startswith("heads.")}
    dropped = sorted(name for name in known if name not in kept) + left_out
    weights = {k: v for k, v in weights.items() if not k.startswith("heads.") or k.split(".")[1] in kept}
    model = _assemble(config, weights, folder)
    model.dropped_head = f"{', '.join(dropped)} of {architectures(raw, place) or 'the checkpoint'}" if dropped else None
    model.fresh_heads = sorted(name for name in model.heads if f"heads.{name}.weight" not in weights)
    return model


def _own_heads(raw: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    """The heads that a checkpoint's config speaks of; none for one of pre-training."""
    if raw["model_type"] == EncoderConfig.model_type:
        return raw.get("heads") or []
    for end, (name, tokens) in HEADS.items():
        if architectures(raw, place).endswith(end):
            size = 2 if name == "span" else len(class_names(raw, place))
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


def _assemble(config: EncoderConfig, weights: dict[str, torch.Tensor], folder: Path) -> Encoder:
    """The encoder with ``weights``; their shapes are checked before memory is taken for what a wrong config.json asks for."""
    with torch.device("meta"):
        shape = Encoder(config)
    own = dict(shape.named_parameters(remove_duplicate=False))
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            raise BadInput(
                f"model {folder}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(own[name].shape)}"
            )
    given = {id(own[name]) for name in weights if name in own}
    missing = [name for name, tensor in own.items() if id(tensor) not in given and not name.startswith(("heads.", "pooler."))]
    if missing:
        raise BadInput(f"model {folder}: {len(missing)} tensors are missing from the weights, first {missing[0]}")
    model = Encoder(config)
    model.load_state_dict(weights, strict=False)
    return model.eval()


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
            "architectures": [f"{CLASS_NAMES[config.family]}{_ending(config)}"], "dim": config.hidden_size, "n_heads": first["heads"],
            "n_layers": len(config.layers), "hidden_dim": first["ffn_sizes"][0], "activation": config.activation,
        }  # fmt: skip
    fields = common | {
        "architectures": [f"{CLASS_NAMES[config.family]}{_ending(config)}"], "hidden_size": config.hidden_size,
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
        start = "" if theirs.startswith(("classifier", "pre_classifier", "qa_outputs")) else prefix(config.family)
        for index in range(own_layers if "{l}" in theirs else 1):
            last = len(config.layers[index]["ffn_sizes"]) - 1
            for ffn in range(last if "{f}" in theirs else 1):
                for leaf in ("weight", "bias"):
                    tensor = state.pop(ours.format(l=index, f=ffn, last=last) + "." + leaf, None)
                    if tensor is not None:
                        renamed[start + theirs.format(l=index, f=ffn) + "." + leaf] = tensor.contiguous()
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
