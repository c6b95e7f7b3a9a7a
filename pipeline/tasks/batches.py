"""Tokenized texts, and batches of texts of like length.

The order of batches is a pure function of seed and epoch, so that training can stop anywhere and go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

CHUNK_BATCHES = 50
"""Texts are sorted by length inside chunks of so many batches: little padding, yet other neighbours every epoch."""


@dataclass(frozen=True)
class EncodedTexts:
    """N tokenized texts in one flat array.

    ``ids`` int32 [total tokens]; ``offsets`` int64 [N+1]: text i is ``ids[offsets[i]:offsets[i+1]]``;
    ``labels`` int64 [N], -1 where a text has none; ``pad_id`` fills batches.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    pad_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, [N]."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.offsets.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def text(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: Sequence[int] | np.ndarray) -> EncodedTexts:
        """The texts at ``indices``, in that order."""
        return from_id_lists([self.text(i) for i in indices], self.labels[np.asarray(indices)], self.pad_id)

    def joined(self, other: EncodedTexts) -> EncodedTexts:
        """These texts followed by those of ``other``."""
        offsets = np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]])
        return EncodedTexts(
            np.concatenate([self.ids, other.ids]), offsets, np.concatenate([self.labels, other.labels]), self.pad_id
        )


@dataclass(frozen=True)
class Batch:
    """Padded texts: ``input_ids`` and ``attention_mask`` int64 [b, n], ``labels`` int64 [b], ``rows`` the texts' indices."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: np.ndarray


def from_id_lists(id_lists: Sequence[np.ndarray], labels: np.ndarray, pad_id: int) -> EncodedTexts:
    offsets = np.zeros(len(id_lists) + 1, dtype=np.int64)
    np.cumsum([len(ids) for ids in id_lists], out=offsets[1:])
    flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in id_lists]) if id_lists else np.zeros(0, np.int32)
    return EncodedTexts(flat, offsets, np.asarray(labels, dtype=np.int64), pad_id)


def encode(tokenizer: Tokenizer, texts: Sequence[str], labels: Sequence[int], max_length: int, pad_id: int) -> EncodedTexts:
    """Tokenize texts with special tokens, cut to ``max_length`` tokens."""
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch_fast(list(texts))
    return from_id_lists([np.asarray(e.ids, dtype=np.int32) for e in encodings], np.asarray(labels), pad_id)


def make_batch(texts: EncodedTexts, rows: np.ndarray) -> Batch:
    lengths = texts.lengths[rows]
    width = int(lengths.max())
    ids = np.full((len(rows), width), texts.pad_id, dtype=np.int64)
    filled = np.arange(width) < lengths[:, None]
    ids[filled] = np.concatenate([texts.text(row) for row in rows])
    return Batch(torch.from_numpy(ids), torch.from_numpy(filled.astype(np.int64)), torch.from_numpy(texts.labels[rows]), rows)


def shuffled_rows(texts: EncodedTexts, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Rows of each batch of an epoch: every text once, texts of like length together, batches in random order."""
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(texts))
    lengths = texts.lengths
    batches: list[np.ndarray] = []
    chunk = batch_size * CHUNK_BATCHES
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def in_order(texts: EncodedTexts, batch_size: int) -> Iterator[Batch]:
    """Batches for evaluation, longest texts together; ``rows`` tells where results belong."""
    order = np.argsort(texts.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield make_batch(texts, order[start : start + batch_size])
