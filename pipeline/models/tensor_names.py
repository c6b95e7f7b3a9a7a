"""What the tensors of each family of transformers are called, and how they come to bear the names of this package.

Checkpoints of before 2019 call weight and bias of a norm ``gamma`` and ``beta`` (google-bert/bert-base-uncased does to this day). The
encoder's tensors stand behind the name of the family (``bert.``) where a head was saved with it, and without where the bare encoder was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from pipeline.models.config import EncoderConfig
from runtimes.errors import BadInput

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
TENSOR_NAMES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
    "albert": _ALBERT,
    "mobilebert": _MOBILEBERT,
}
"""``model_type`` -> name there -> name here."""
CLASS_NAMES = {
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "distilbert": "DistilBert",
    "electra": "Electra", "albert": "Albert", "mobilebert": "MobileBert",
}  # fmt: skip
"""``model_type`` -> how the classes of transformers begin."""
OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
BODY = ("embeddings.", "encoder.", "transformer.", "embeddings_project.")
"""How the names of the encoder's own tensors begin, behind the prefix."""


def prefix(family: str) -> str:
    """What stands before the names of the encoder's tensors in a checkpoint with a head."""
    return "roberta." if family in ("xlm-roberta", "camembert") else f"{family}."


@dataclass(frozen=True)
class Translated:
    """``weights`` by the names of this package; ``left_out``: the heads that have no place there, by the beginning of their names."""

    weights: dict[str, torch.Tensor]
    left_out: list[str]


def translate(weights: dict[str, torch.Tensor], family: str, config: EncoderConfig) -> Translated:
    """Rename a checkpoint's tensors. Heads of pre-training (masked words, ...) are left out.

    Raises:
        BadInput: a tensor inside the encoder that the family does not have, such as an adapter's, or of a layer that the config lacks.
    """
    start = prefix(family)
    patterns = []
    for theirs, ours in TENSOR_NAMES[family].items():
        pattern = re.escape(theirs).replace(r"\{l\}", r"(?P<l>\d{1,6})").replace(r"\{f\}", r"(?P<f>\d{1,6})")
        patterns.append((re.compile(rf"{pattern}\.(?P<leaf>weight|bias|gamma|beta)"), ours))
    renamed: dict[str, torch.Tensor] = {}
    left_out = set()
    for name, tensor in weights.items():
        bare = name.removeprefix(start)
        found, ours = next(((match, ours) for pattern, ours in patterns if (match := pattern.fullmatch(bare))), (None, ""))
        if found is None:
            if bare.startswith(BODY):
                raise BadInput(f"tensor {name} is none of a {family} encoder; merge adapters into the weights, and save the plain model")
            if not bare.startswith("pooler."):  # of RoBERTa, which no head reads
                left_out.add(bare.split(".")[0])
            continue
        part = found.groupdict()
        layer = int(part.get("l") or 0)
        if layer >= len(config.layers):
            raise BadInput(f"tensor {name} belongs to layer {layer}, counted from 0; config.json has {len(config.layers)} layers")
        last = len(config.layers[layer]["ffn_sizes"]) - 1
        leaf = OLD_LEAVES.get(part["leaf"], part["leaf"])
        renamed[ours.format(l=layer, f=part.get("f"), last=last) + "." + leaf] = tensor
    return Translated(renamed, sorted(left_out))
