"""Random encoders of every family, and texts for them: what the tests of the exporters share.

Freshly made norms have weights of 1 and biases of 0, under which most mistakes of a folding are invisible; here every
parameter is random.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from pipeline.models.config import EncoderConfig, head_shape, layer_shape
from pipeline.models.encoder import Encoder, NoNorm
from pipeline.models.hub_fields import config_fields
from pipeline.models.linear import Quaternion

VOCABULARY, LONGEST, LABELS = 99, 20, 5
FIRST_ID = 5
"""Below it are padding and the other special tokens."""

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 3,
    "max_position_embeddings": 24,
}  # fmt: skip
MOBILE = SMALL | {"embedding_size": 12, "intra_bottleneck_size": 16, "num_feedforward_networks": 2, "classifier_activation": False}
ALL = {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False}
NONE = {"key_query_shared_bottleneck": False}
LAYER_NORM = {"normalization_type": "layer_norm", "layer_norm_eps": 1e-5}

HUB: dict[str, transformers.PretrainedConfig] = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL, type_vocab_size=1),
    "distilbert": transformers.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=4, hidden_dim=40, max_position_embeddings=24),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=12),
    "electra without projection": transformers.ElectraConfig(**SMALL, embedding_size=32),
    "albert": transformers.AlbertConfig(**SMALL | {"num_hidden_layers": 4}, embedding_size=12, num_hidden_groups=2),
    "albert of one layer": transformers.AlbertConfig(**SMALL, embedding_size=12),
    "mobilebert": transformers.MobileBertConfig(**MOBILE),
    "mobilebert, pooler": transformers.MobileBertConfig(**MOBILE | {"classifier_activation": True}),
    "mobilebert, layer norm": transformers.MobileBertConfig(**MOBILE, **LAYER_NORM),
    "mobilebert, narrow": transformers.MobileBertConfig(**MOBILE | {"intra_bottleneck_size": 8}),
    "mobilebert, word": transformers.MobileBertConfig(**MOBILE, trigram_input=False),
    "mobilebert, all": transformers.MobileBertConfig(**MOBILE, **ALL),
    "mobilebert, all, layer norm": transformers.MobileBertConfig(**MOBILE, **ALL, **LAYER_NORM),
    "mobilebert, none": transformers.MobileBertConfig(**MOBILE, **NONE),
    "mobilebert, none, layer norm": transformers.MobileBertConfig(**MOBILE, **NONE, **LAYER_NORM),
    "mobilebert without bottleneck": transformers.MobileBertConfig(**MOBILE, use_bottleneck=False),
}
"""Shapes of the six families under the names of the transformers library; "narrow": the feature map is wider than two bottlenecks."""
UNEQUAL = [layer_shape(3, 8, [40]), layer_shape(4, 4, [24, 16]), layer_shape(1, 8, [8])]
ALIKE = [layer_shape(4, 4, [40])] * 3
STUDENT = {"norm": "no_norm", "bottleneck_size": 16, "activation": "relu", "pooler": "none"}
LOW_RANK = [
    layer_shape(4, 8, [40], {"attention.query": 6}),
    layer_shape(
        4, 8, [40], {"attention.query": 8, "attention.key": 5, "attention.value": 7, "attention.output": 9, "ffns.0.up": 11, "ffns.0.down": 10}
    ),
    layer_shape(4, 8, [40, 24], {"attention.query": 6, "attention.value": 7, "ffns.1.up": 11, "ffns.0.down": 10}),
]
EMPTY = [layer_shape(0, 8, [40, 24]), layer_shape(4, 4, [0]), layer_shape(4, 4, [24, 0]), layer_shape(0, 4, [16])]
OWN: dict[str, dict[str, Any]] = {
    "unequal layers": {"layers": UNEQUAL, "activation": "gelu_pytorch_tanh"},
    "factorized": {"embedding_size": 12, "embedding_projection": "word", "embedding_projection_bias": False, "layers": UNEQUAL, "pooler": "relu"},
    "unequal student": {
        "embedding_size": 12, "embedding_projection": "trigram", "layers": UNEQUAL, "bottleneck_size": 16, "norm": "no_norm", "activation": "relu",
        "type_vocab_size": 0, "pooler": "none",
    },
    "no norm after the sum": {"embedding_size": 12, "embedding_projection": "sum", "norm": "no_norm", "layers": ALIKE, "bottleneck_size": 16},
    "shared student": {"norm": "no_norm", "layers": ALIKE, "bottleneck_size": 16, "shared_with": [0, 0, 2], "pooler": "none"},
    "shared student, all": {"norm": "no_norm", "layers": ALIKE, "bottleneck_size": 16, "shared_with": [0, 0, 0], "bottleneck_attention": "all"},
    "shared, no norm, no bottleneck": {"norm": "no_norm", "layers": ALIKE, "shared_with": [0, 0, 0]},
    "one layer": {"layers": ALIKE[:1]},
    "low rank": {"layers": LOW_RANK},
    "low rank student": STUDENT | {"layers": LOW_RANK},
    "low rank student, all": STUDENT | {"layers": LOW_RANK, "bottleneck_attention": "all"},
    "low rank student, none": STUDENT | {"layers": LOW_RANK, "bottleneck_attention": "none"},
    "empty parts": {"layers": EMPTY},
    "empty ffn at the end": {"layers": [EMPTY[0], EMPTY[1]]},
    "nothing but norms": {"layers": [layer_shape(4, 8, [40]), layer_shape(0, 8, [0])]},
    "empty student": STUDENT | {"layers": EMPTY},
    "empty student, all": STUDENT | {"layers": EMPTY, "bottleneck_attention": "all"},
    "empty student, layer norm": STUDENT | {"layers": EMPTY, "norm": "layer_norm"},
    "quaternion": {"layers": ALIKE, "quaternion": True},
    "quaternion of odd heads": {"layers": [layer_shape(3, 4, [20]), layer_shape(1, 8, [12, 0]), layer_shape(3, 4, [8])], "quaternion": True},
    "quaternion student": STUDENT | {"layers": ALIKE, "quaternion": True},
    "quaternion student, all": STUDENT | {"layers": ALIKE, "quaternion": True, "bottleneck_attention": "all"},
    "shared attention": {"layers": [layer_shape(4, 8, [size]) for size in (40, 24, 16)], "shared_attention": [0, 0, 0]},
    "shared attention at first": {"layers": ALIKE, "shared_attention": [0, 0, 2]},
    "shared attention student": STUDENT | {"layers": ALIKE, "shared_attention": [0, 1, 0]},
    "shared attention student, all": STUDENT | {"layers": ALIKE, "shared_attention": [0, 0, 0], "bottleneck_attention": "all"},
    "shared ffn": {"layers": [layer_shape(heads, 4, [40, 16]) for heads in (3, 4, 2)], "shared_ffn": [0, 1, 1]},
    "shared ffn student": STUDENT | {"layers": ALIKE, "shared_ffn": [0, 0, 0]},
    "shared empty parts": STUDENT | {"layers": [layer_shape(0, 4, [0])] * 3, "shared_attention": [0, 0, 0], "shared_ffn": [0, 0, 0]},
    "shared ffn of quaternions": {"layers": ALIKE, "quaternion": True, "shared_ffn": [0, 0, 2], "shared_attention": [0, 1, 1]},
    "shared low rank": {"layers": [LOW_RANK[1]] * 3, "shared_attention": [0, 0, 0], "shared_ffn": [0, 0, 0]},
}  # fmt: skip
"""Shapes that the methods of this package make of them."""
KINDS = (*HUB, *OWN)
TAGS = 7
HEADS: dict[str, list[dict[str, Any]]] = {
    "tags": [head_shape("classifier", ["logits"], "all", TAGS)],
    "intent and slots": [
        head_shape("classifier", ["logits"], "first", LABELS, pooler=True), head_shape("slots", ["slot_logits"], "all", TAGS),
    ],
    "span": [head_shape("span", ["start_logits", "end_logits"], "all", 2)],
    "mean": [head_shape("embedding", ["sentence_embedding"], "mean", None, normalized=True)],
    "narrow mean": [head_shape("embedding", ["sentence_embedding"], "mean", 12, normalized=True)],
    "first vector": [head_shape("embedding", ["sentence_embedding"], "first", None, normalized=True)],
    "two of a text": [
        head_shape("classifier", ["logits"], "first", LABELS, pooler=True), head_shape("slots", ["slot_logits"], "first", TAGS, pooler=True),
    ],
}  # fmt: skip
"""What reads the last feature map, beside the classifier of the first token that every kind has by itself."""
NO_NORM_STUDENTS = ("mobilebert", "mobilebert, narrow", "mobilebert, word", "mobilebert, all", "mobilebert, none", "unequal student")
SHARED = tuple(kind for kind in KINDS if "albert" in kind or OWN.get(kind, {}).get("shared_with"))
"""Whole layers share their weights."""
SHARED_PARTS = tuple(kind for kind in KINDS if "shared" in kind and kind not in SHARED)
"""Layers share their attention or their FFNs alone."""


def last_attention_is_shared(kind: str) -> bool:
    owners = OWN.get(kind, {}).get("shared_attention", [0])
    return kind in SHARED or owners.count(owners[-1]) > 1


def encoder(kind: str, seed: int = 1, **changes: Any) -> Encoder:
    """A random encoder of ``kind``; ``changes`` are fields of its config."""
    if kind in HUB:
        fields = config_fields(HUB[kind].to_dict())
    else:
        fields = {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 24} | OWN[kind]
    return randomized(Encoder(EncoderConfig(**fields | changes, num_labels=LABELS)), seed)


@torch.no_grad()
def randomized(model: Encoder, seed: int = 1) -> Encoder:
    """``model`` with random parameters, norms' weights between 0.3 and 1.7 with either sign in NoNorm; in evaluation mode."""
    torch.manual_seed(seed)
    # Without statistics feature maps grow from layer to layer, until attention is a step function and float32 noise shows.
    gain = 0.5 if model.config.norm == "no_norm" else 1.0
    for module in model.modules():
        if isinstance(module, Quaternion):
            module.blocks.normal_(0, gain * (4 * module.blocks.shape[1]) ** -0.5)
            module.bias.normal_(0, 0.3)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0, gain * max(1, module.in_features) ** -0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.3)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 0.7)
        elif isinstance(module, (nn.LayerNorm, NoNorm)):
            module.weight.uniform_(0.3, 1.7)
            if isinstance(module, NoNorm):
                module.weight.mul_(torch.where(torch.rand(len(module.weight)) < 0.1, -1.0, 1.0))
            module.bias.normal_(0, 0.3)
    model.embeddings.word.weight[model.config.pad_token_id] = 0  # so that padding behind a text changes nothing in a trigram
    return model.eval()


def texts(count: int, lengths: tuple[int, ...] = (1, 2, LONGEST), longest: int = LONGEST, vocabulary: int = VOCABULARY, seed: int = 0) -> list:
    """``count`` random texts as ids: one of each of ``lengths``, the rest of any length up to ``longest``."""
    generator = np.random.default_rng(seed)
    drawn = [*lengths, *generator.integers(1, longest + 1, count - len(lengths))]
    return [generator.integers(FIRST_ID, vocabulary, length).tolist() for length in drawn]


BIG: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 128, "layers": [layer_shape(4, 32, [512])] * 3},
    "student": {
        "hidden_size": 256, "embedding_size": 96, "embedding_projection": "trigram", "layers": [layer_shape(4, 32, [512, 512])] * 4,
        "bottleneck_size": 128, "norm": "no_norm", "activation": "relu", "type_vocab_size": 0, "pooler": "none",
    },
    "albert": {
        "vocab_size": 8000, "hidden_size": 256, "embedding_size": 64, "embedding_projection": "sum", "layers": [layer_shape(4, 64, [1024])] * 6,
        "shared_with": [0] * 6, "activation": "gelu_new",
    },
}  # fmt: skip
"""Large enough that weights, and not the graph, decide a file's size and its behaviour in 8 bits."""
_WIDE = {"hidden_size": 256, "layers": [layer_shape(4, 64, [1024])] * 3}
_RANKS = dict.fromkeys(("attention.query", "attention.key", "attention.value", "attention.output", "ffns.0.up", "ffns.0.down"), 96)
THIN: dict[str, dict[str, Any]] = {
    "dense": _WIDE,
    "low rank": _WIDE | {"layers": [layer_shape(4, 64, [1024], _RANKS)] * 3},
    "quaternion": _WIDE | {"quaternion": True},
    "shared attention": _WIDE | {"shared_attention": [0, 0, 0]},
    "shared ffn": _WIDE | {"shared_ffn": [0, 0, 0]},
    "shared parts of a student": BIG["student"] | {"shared_attention": [0] * 4, "shared_ffn": [0, 0, 2, 2]},
    "empty parts": BIG["student"] | {"layers": [layer_shape(4, 32, [512, 0]), layer_shape(0, 32, [512, 512])] * 2},
}
"""Dense matrices, and fewer weights in their place."""
BIG_LONGEST = 32


@cache
def big_encoder(kind: str) -> Encoder:
    fields = {"vocab_size": 2000, "max_position_embeddings": 40} | (BIG | THIN)[kind]
    return randomized(Encoder(EncoderConfig(**fields, num_labels=LABELS)))


@cache
def big_texts() -> list:
    return texts(100, (1, 2, 8, 9, 16, 17, BIG_LONGEST), BIG_LONGEST, 2000)
