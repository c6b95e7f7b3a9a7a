"""Tokenized rows, and batches of inputs of like length.

An input is one sequence of tokens that a model runs. A row of data makes one input, or two that belong together (siamese), or
several windows of a long text. What is known of tokens is kept flat: all tokens of all inputs one behind the other.

The order of batches is a pure function of seed and epoch, so that training can stop anywhere and go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from runtimes.errors import BadInput
from runtimes.text import Encoding

CHUNK_BATCHES = 50
"""Inputs are sorted by length inside chunks of so many batches: little padding, yet other neighbours every epoch."""
IGNORED = -100
"""Target of a token, or of an input, that has none."""


@dataclass(frozen=True)
class EncodedTexts:
    """N tokenized inputs in one flat array of T tokens.

    Attributes:
        ids: int32 [T].
        offsets: int64 [N + 1]; input i is ``ids[offsets[i]:offsets[i + 1]]``.
        pad_id: fills batches.
        types: token types uint8 [T]; None where all are 0.
        targets: by name, one entry an input, [N, ...].
        token_targets: by name, one entry a token, [T].
        row_of: int64 [N], the row that an input was made of.
        group: neighbours that only make sense together, such as the two texts of a siamese pair.
        encodings: the inputs with character offsets, for tasks that answer in characters; None for others.
    """

    ids: np.ndarray
    offsets: np.ndarray
    pad_id: int
    types: np.ndarray | None = None
    targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_targets: Mapping[str, np.ndarray] = field(default_factory=dict)
    row_of: np.ndarray | None = None
    group: int = 1
    encodings: Sequence[Encoding] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each input, [N]."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """The row of each input, [N]."""
        return np.arange(len(self)) if self.row_of is None else self.row_of

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.offsets.tobytes())
        if self.types is not None:
            digest.update(self.types.tobytes())
        for named in (self.targets, self.token_targets):
            for name in sorted(named):
                digest.update(name.encode() + np.ascontiguousarray(named[name]).tobytes())
        return digest.hexdigest()

    def text(self, index: int) -> np.ndarray:
        """Ids of one input."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def encoding(self, index: int) -> Encoding:
        """One input as runtimes take it."""
        if self.encodings is not None:
            return self.encodings[index]
        own = slice(self.offsets[index], self.offsets[index + 1])
        types = [0] * len(self.ids[own]) if self.types is None else self.types[own].tolist()
        return Encoding(self.ids[own].tolist(), types)

    def take(self, indices: Sequence[int] | np.ndarray) -> EncodedTexts:
        """The inputs at ``indices``, in that order; whole groups only."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        tokens = flat_ranges(self.offsets[indices], lengths)
        return EncodedTexts(
            self.ids[tokens], _starts(lengths), self.pad_id, None if self.types is None else self.types[tokens],
            {name: values[indices] for name, values in self.targets.items()},
            {name: values[tokens] for name, values in self.token_targets.items()},
            self.rows[indices], self.group, None if self.encodings is None else [self.encodings[i] for i in indices],
        )  # fmt: skip

    def joined(self, other: EncodedTexts) -> EncodedTexts:
        """These inputs followed by those of ``other``, in groups of the same size, with the targets that both have."""
        types = None
        if self.types is not None or other.types is not None:
            types = np.concatenate([np.zeros(len(t.ids), np.uint8) if t.types is None else t.types for t in (self, other)])
        return EncodedTexts(
            np.concatenate([self.ids, other.ids]), np.concatenate([self.offsets, other.offsets[1:] + self.offsets[-1]]), self.pad_id, types,
            {n: np.concatenate([values, other.targets[n]]) for n, values in self.targets.items() if n in other.targets},
            {n: np.concatenate([values, other.token_targets[n]]) for n, values in self.token_targets.items() if n in other.token_targets},
            np.concatenate([self.rows, other.rows]), self.group,
        )  # fmt: skip

    def with_ids(self, ids: np.ndarray) -> EncodedTexts:
        """Inputs of the same shapes with other tokens [T], and without targets: nobody has labelled them."""
        return EncodedTexts(
            ids.astype(np.int32), self.offsets, self.pad_id, self.types, {name: _unknown(v) for name, v in self.targets.items()},
            {name: _unknown(v) for name, v in self.token_targets.items()}, self.rows, self.group,
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Padded inputs.

    Attributes:
        input_ids, attention_mask: int64 [b, n].
        token_type_ids: int64 [b, n]; None where all are 0.
        targets: by name [b, ...]; token_targets: by name [t], the real tokens of all inputs one behind the other.
        rows: numbers of the inputs in their :class:`EncodedTexts`, [b].
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    targets: Mapping[str, Tensor]
    token_targets: Mapping[str, Tensor]
    rows: np.ndarray

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        known = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "token_type_ids": self.token_type_ids}
        return {name: value for name, value in known.items() if value is not None}

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        if self.input_ids.device == device:
            return self
        types = None if self.token_type_ids is None else self.token_type_ids.to(device)
        targets, token_targets = ({n: v.to(device) for n, v in named.items()} for named in (self.targets, self.token_targets))
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), types, targets, token_targets, self.rows)

    def parts(self, size: int | None) -> list[Batch]:
        """Batches of at most ``size`` of these inputs, in order, none padded further than it must be; this one itself for None."""
        if size is None or size >= len(self.rows):
            return [self]
        lengths = self.attention_mask.sum(1).tolist()
        made = []
        for start in range(0, len(self.rows), size):
            own, width = slice(start, start + size), max(lengths[start : start + size])
            tokens = slice(sum(lengths[:start]), sum(lengths[: start + size]))
            types = None if self.token_type_ids is None else self.token_type_ids[own, :width]
            made.append(Batch(
                self.input_ids[own, :width], self.attention_mask[own, :width], types, {n: v[own] for n, v in self.targets.items()},
                {n: v[tokens] for n, v in self.token_targets.items()}, self.rows[own],
            ))  # fmt: skip
        return made

    def flat(self, values: Tensor) -> Tensor:
        """[b, n, ...] -> [t, ...]: the real tokens of all inputs one behind the other."""
        return values[self.attention_mask.bool()]

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """[t, ...] -> [b, n, ...], with ``fill`` behind each input."""
        made = values.new_full((*self.attention_mask.shape, *values.shape[1:]), fill)
        made[self.attention_mask.bool()] = values
        return made


def from_id_lists(id_lists: Sequence[Sequence[int] | np.ndarray], pad_id: int, types: Sequence[Sequence[int]] | None = None) -> EncodedTexts:
    """Inputs without targets."""
    flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in id_lists]) if len(id_lists) else np.zeros(0, np.int32)
    kinds = None if types is None else np.concatenate([np.asarray(t, dtype=np.uint8) for t in types]) if len(types) else np.zeros(0, np.uint8)
    return EncodedTexts(flat, _starts([len(ids) for ids in id_lists]), pad_id, kinds)


def encode(tokenizer: Tokenizer, texts: Sequence[str | tuple[str, str]], max_length: int, pad_id: int) -> EncodedTexts:
    """Tokenize texts, or pairs of them, with special tokens, cut to ``max_length`` tokens; no targets.

    Raises:
        BadInput: a text that is no Unicode, such as half of a surrogate pair.
    """
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    try:
        encodings = tokenizer.encode_batch_fast(list(texts))
    except UnicodeEncodeError as error:
        raise BadInput(f"a text holds half of a surrogate pair ({error.object[error.start : error.end]!r}), which no file can hold") from error
    paired = bool(texts) and not isinstance(texts[0], str)
    return from_id_lists([e.ids for e in encodings], pad_id, [e.type_ids for e in encodings] if paired else None)


def make_batch(texts: EncodedTexts, rows: np.ndarray) -> Batch:
    lengths = texts.lengths[rows]
    width = int(lengths.max())
    tokens = flat_ranges(texts.offsets[rows], lengths)
    filled = np.arange(width) < lengths[:, None]
    ids = np.full((len(rows), width), texts.pad_id, dtype=np.int64)
    ids[filled] = texts.ids[tokens]
    types = None
    if texts.types is not None:
        types = np.zeros_like(ids)
        types[filled] = texts.types[tokens]
    return Batch(
        torch.from_numpy(ids), torch.from_numpy(filled.astype(np.int64)), None if types is None else torch.from_numpy(types),
        {name: torch.from_numpy(values[rows]) for name, values in texts.targets.items()},
        {name: torch.from_numpy(values[tokens]) for name, values in texts.token_targets.items()}, rows,
    )  # fmt: skip


def shuffled_rows(texts: EncodedTexts, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Inputs of each batch of an epoch: every one once, groups whole, those of like length together, batches in random order."""
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(texts) // texts.group)
    lengths = texts.lengths.reshape(-1, texts.group).max(axis=1)
    per_batch = max(1, batch_size // texts.group)
    batches: list[np.ndarray] = []
    chunk = per_batch * CHUNK_BATCHES
    for start in range(0, len(order), chunk):
        part = order[start : start + chunk]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [with_neighbours(part[i : i + per_batch], texts.group) for i in range(0, len(part), per_batch)]
    return [batches[i] for i in generator.permutation(len(batches))]


def batches_per_epoch(texts: EncodedTexts, batch_size: int) -> int:
    """How many batches :func:`shuffled_rows` makes."""
    return -(-(len(texts) // texts.group) // max(1, batch_size // texts.group))


def in_order(texts: EncodedTexts, batch_size: int) -> Iterator[Batch]:
    """Batches for evaluation, inputs of like length together and groups whole; ``rows`` tells where results belong."""
    order = np.argsort(texts.lengths.reshape(-1, texts.group).max(axis=1), kind="stable")
    per_batch = max(1, batch_size // texts.group)
    for start in range(0, len(order), per_batch):
        yield make_batch(texts, with_neighbours(order[start : start + per_batch], texts.group))


def with_neighbours(groups: np.ndarray, size: int) -> np.ndarray:
    """Numbers of groups -> numbers of their inputs."""
    return groups if size == 1 else (groups[:, None] * size + np.arange(size)).reshape(-1)


def flat_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of every pair, joined."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(np.asarray(starts) - (ends - counts), counts)


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _unknown(values: np.ndarray) -> np.ndarray:
    return np.full_like(values, IGNORED if values.dtype.kind == "i" else np.nan)
