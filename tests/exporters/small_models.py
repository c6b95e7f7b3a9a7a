"""Encoders of every kind with random weights of a size at which each part of them matters, and texts for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.models.config import EncoderConfig, layer_shape
from pipeline.models.encoder import Encoder
from pipeline.models.linear import LowRank, Quaternion

VOCABULARY = 90
LONGEST = 16
CLASSES = 3

STUDENT = {
    "embedding_size": 16, "embedding_projection": "trigram", "bottleneck_size": 24, "norm": "no_norm", "activation": "relu",
    "pooler": "none", "layers": [layer_shape(2, 12, [48, 40])] * 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "relu bert": {"activation": "relu"},
    "no-norm student": STUDENT,
    "no-norm student without trigrams": STUDENT | {"embedding_projection": "word"},
    "no-norm student that reads the bottleneck": STUDENT | {"bottleneck_attention": "all"},
    "layer-norm student": STUDENT | {"norm": "layer_norm"},
    "albert": {"embedding_size": 16, "embedding_projection": "sum", "shared_with": [0, 0], "activation": "gelu_new"},
}


def small_encoder(kind: str, seed: int = 0, **changes: Any) -> Encoder:
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "layers": [layer_shape(4, 8, [64])] * 2, "max_position_embeddings": LONGEST}
    model = Encoder(EncoderConfig(**config | KINDS[kind] | changes, num_labels=CLASSES)).eval()
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, mean: float, deviation: float) -> None:
        like.data.copy_(mean + deviation * torch.randn(like.shape, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            normal(module.weight, 0, max(1, module.in_features) ** -0.5)
            if module.bias is not None:
                normal(module.bias, 0, 0.1)
        elif isinstance(module, (LowRank, Quaternion)):
            continue
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 0, 0.6)
        elif getattr(module, "weight", None) is not None:  # norms
            normal(module.weight, 1, 0.2)
            normal(module.bias, 0, 0.1)
    model.embeddings.word.weight.data[0] = 0  # so that padding behind a text changes nothing in a trigram
    classifier = model.heads["classifier"]
    normal(classifier.weight, 0, 2 * model.config.hidden_size**-0.5)
    sample = texts(32, seed=9, vocabulary=min(VOCABULARY, model.config.vocab_size))
    with torch.no_grad():  # so that every class is the answer to some texts
        classifier.bias -= torch.cat([model(torch.tensor([ids])).logits for ids in sample]).mean(dim=0)
    return model


def texts(count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Token ids without 0..4, which are special."""
    generator = np.random.default_rng(seed)
    return [generator.integers(5, vocabulary, generator.integers(3, LONGEST + 1)).tolist() for _ in range(count)]


@pytest.fixture(autouse=True)
def one_thread():
    """Texts this small are not worth a second thread, which waits longest where others want the processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def break_ffn(model: Encoder, layer: int, ffn: int = 0, height: float = 1e4) -> str:
    """Make a ReLU's unit huge that nobody reads: the same function, and int8 activations that hold nothing else.

    Returns the name of the matrix whose input they are.
    """
    part = model.layers[layer].ffns[ffn]
    part.up.bias.data[5] = height
    part.down.weight.data[:, 5] = 0
    return f"layers.{layer}.ffns.{ffn}.down"
