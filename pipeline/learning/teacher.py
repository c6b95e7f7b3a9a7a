"""What a teacher said, computed once per example and kept on disk.

A teacher's forward pass is most of a distillation step and gives the same answer every epoch, so it runs once:
logits, and where layers are asked for also their feature maps and attention, without padding:

    ``logits.npy``     float32 [N, C]
    ``features.npy``   float16 [T, M, H]     one row per token, M chosen layers
    ``attention.npy``  float16 [S, M, A]     one row per pair of tokens of a text, averaged to A heads

T is the number of tokens of those texts, S the sum of their squared lengths.

What this file does not do: choose the layers or the texts (the methods do).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.flow.progress import Progress
from pipeline.learning.training import EVALUATION_BATCH, half_precision
from pipeline.models.encoder import Encoder
from pipeline.tasks.batches import Batch, EncodedTexts, in_order


@dataclass(frozen=True)
class Features:
    """A batch's share of the cache: ``hidden`` [t, M, H] per token, ``attention`` [s, M, A] per pair of tokens."""

    hidden: Tensor
    attention: Tensor


class TeacherOutputs:
    """Read side of the cache; files are mapped, not loaded."""

    def __init__(self, folder: Path, texts: EncodedTexts) -> None:
        self.logits = torch.from_numpy(np.load(folder / "logits.npy"))
        self._lengths = texts.lengths
        self._token_start = texts.offsets
        self._pair_start = np.concatenate([[0], np.cumsum(self._lengths**2)])
        has_features = (folder / "features.npy").is_file()
        self._features = np.load(folder / "features.npy", mmap_mode="r") if has_features else None
        self._attention = np.load(folder / "attention.npy", mmap_mode="r") if has_features else None

    def features(self, batch: Batch) -> Features:
        """Feature maps and attention of a batch's texts, in the order of its rows, padding left out."""
        tokens = _ranges(self._token_start[batch.rows], self._lengths[batch.rows])
        pairs = _ranges(self._pair_start[batch.rows], self._lengths[batch.rows] ** 2)
        return Features(torch.from_numpy(self._features[tokens]), torch.from_numpy(self._attention[pairs]))


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start+1, ... of every pair, joined."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)


def group_heads(probabilities: Tensor, heads: int) -> Tensor:
    """Average attention [b, A, n, n] of A heads to ``heads`` groups of neighbours; to one mean for all where A does not divide."""
    count = probabilities.shape[1]
    if count == heads:
        return probabilities
    if count % heads == 0:
        return probabilities.unflatten(1, (heads, count // heads)).mean(2)
    return probabilities.mean(1, keepdim=True).expand(-1, heads, -1, -1)


def valid_pairs(mask: Tensor) -> Tensor:
    """[b, n] -> bool [b, n, n]: both tokens are real."""
    return (mask[:, :, None] * mask[:, None, :]).bool()


@torch.no_grad()
def collect(
    teacher: Encoder, texts: EncodedTexts, folder: Path, progress: Progress, layers: tuple[int, ...] = (), heads: int = 1
) -> TeacherOutputs:
    """Run the teacher over ``texts`` once, unless ``folder`` already holds the result.

    Args:
        layers: 1-based layers whose feature maps and attention are kept; none for logits alone.
        heads: attention is averaged to so many heads, the student's.
    """
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(teacher, texts, partial, progress, layers, heads)
        os.replace(partial, folder)
    return TeacherOutputs(folder, texts)


def _write(teacher: Encoder, texts: EncodedTexts, folder: Path, progress: Progress, layers: tuple[int, ...], heads: int) -> None:
    teacher.eval()
    lengths = texts.lengths
    pair_start = np.concatenate([[0], np.cumsum(lengths**2)])
    logits = np.empty((len(texts), teacher.config.num_labels), dtype=np.float32)
    features = attention = None
    if layers:
        shape = (len(texts.ids), len(layers), teacher.config.hidden_size)
        features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
        attention = np.lib.format.open_memmap(folder / "attention.npy", "w+", np.float16, (int(pair_start[-1]), len(layers), heads))
    done = 0
    with progress.training("teacher outputs", len(texts)) as report:
        for batch in in_order(texts, EVALUATION_BATCH):
            with half_precision():
                out = teacher(
                    batch.input_ids, batch.attention_mask, output_hidden_states=bool(layers), output_attention_scores=bool(layers)
                )
            logits[batch.rows] = out.logits.float().numpy()
            if layers:
                real, both = batch.attention_mask.bool(), valid_pairs(batch.attention_mask)
                hidden = torch.stack([out.hidden_states[layer][real] for layer in layers], dim=1)
                features[_ranges(texts.offsets[batch.rows], lengths[batch.rows])] = hidden.to(torch.float16).numpy()
                chosen = [group_heads(torch.softmax(out.attention_scores[i - 1].float(), -1), heads) for i in layers]
                weights = torch.stack([w.permute(0, 2, 3, 1)[both] for w in chosen], dim=1)
                attention[_ranges(pair_start[batch.rows], lengths[batch.rows] ** 2)] = weights.to(torch.float16).numpy()
            done += len(batch.rows)
            report(done, None)
    np.save(folder / "logits.npy", logits)
    for mapped in (features, attention):
        if mapped is not None:
            mapped.flush()
