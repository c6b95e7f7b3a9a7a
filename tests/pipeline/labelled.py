"""Texts with a class each, for tests of what learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.models.encoder import Encoder
from pipeline.models.inference import predict
from pipeline.tasks import batches
from pipeline.tasks.batches import EncodedTexts
from pipeline.tasks.text_classification import TextClassification

TASK = TextClassification(data="none")


def with_labels(texts: EncodedTexts, labels: Sequence[int] | np.ndarray) -> EncodedTexts:
    return replace(texts, targets={"labels": np.asarray(labels, np.int64)})


def from_id_lists(id_lists: Sequence, labels: Sequence[int] | np.ndarray, pad_id: int) -> EncodedTexts:
    return with_labels(batches.from_id_lists(id_lists, pad_id), labels)


def encode(tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[int], max_length: int, pad_id: int) -> EncodedTexts:
    return with_labels(batches.encode(tokenizer, texts, max_length, pad_id), labels)


def predict_logits(model: Encoder, texts: EncodedTexts) -> Tensor:
    return predict(model, texts)["logits"]


def accuracy(model: Encoder, texts: EncodedTexts) -> float:
    """In per cent."""
    return 100 * float((predict_logits(model, texts).argmax(-1).numpy() == texts.targets["labels"]).mean())
