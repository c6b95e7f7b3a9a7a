"""What a teacher said, computed once per input and kept on disk.

A teacher's forward pass is most of a distillation step and gives the same answer every epoch, so it runs once: its outputs,
and where layers are asked for also their feature maps and attention, without padding:

    ``output-NAME.npy``  float32 [N, ...] per input; float16 [T, ...] per token, where precision matters less than gigabytes
    ``features.npy``     float16 [T, M, H]     one row per token, M chosen layers
    ``attention.npy``    float16 [S, M, A]     one row per pair of tokens of an input, averaged to A heads

T is the number of tokens of those inputs, S the sum of their squared lengths.

Where that is more than a disk should hold, :class:`LiveTeacher` gives the same, rounded to the same precision, by running the teacher.

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
from pipeline.models.encoder import Encoder
from pipeline.models.inference import evaluation_batch, half_precision
from pipeline.tasks.batches import Batch, EncodedTexts, flat_ranges, in_order

PREFIX = "output-"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Features:
    """A batch's share of the cache: ``hidden`` [t, M, H] per token, ``attention`` [s, M, A] per pair of tokens."""

    hidden: Tensor
    attention: Tensor


class TeacherOutputs:
    """Read side of the cache; files are mapped, not loaded."""

    def __init__(self, folder: Path, texts: EncodedTexts) -> None:
        self._outputs = {path.stem.removeprefix(PREFIX): np.load(path, mmap_mode="r") for path in sorted(folder.glob(f"{PREFIX}*.npy"))}
        self._per_token = {name for name, values in self._outputs.items() if values.dtype == np.float16}
        self._lengths = texts.lengths
        self._token_start = texts.offsets
        self._pair_start = np.concatenate([[0], np.cumsum(self._lengths**2)])
        has_features = (folder / "features.npy").is_file()
        self._features = np.load(folder / "features.npy", mmap_mode="r") if has_features else None
        self._attention = np.load(folder / "attention.npy", mmap_mode="r") if has_features else None

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Outputs of a batch's inputs, in the layout of :meth:`pipeline.models.encoder.Encoder.outputs`."""
        tokens = flat_ranges(self._token_start[batch.rows], self._lengths[batch.rows]) if self._per_token else None
        places = {name: tokens if name in self._per_token else batch.rows for name in self._outputs}
        device = batch.input_ids.device
        return {name: torch.from_numpy(np.asarray(values[places[name]])).to(device) for name, values in self._outputs.items()}

    def features(self, batch: Batch) -> Features:
        """Feature maps and attention of a batch's texts, in the order of its rows, padding left out."""
        tokens = flat_ranges(self._token_start[batch.rows], self._lengths[batch.rows])
        pairs = flat_ranges(self._pair_start[batch.rows], self._lengths[batch.rows] ** 2)
        device = batch.input_ids.device
        return Features(torch.from_numpy(self._features[tokens]).to(device), torch.from_numpy(self._attention[pairs]).to(device))


class LiveTeacher:
    """What :class:`TeacherOutputs` gives, from a teacher that runs when it is asked; nothing lies on disk."""

    def __init__(self, teacher: Encoder, layers: tuple[int, ...], heads: int, device: torch.device) -> None:
        self._teacher, self._layers, self._heads = teacher.eval().to(device), layers, heads

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """As :meth:`TeacherOutputs.outputs`."""
        return answers(self._teacher, batch)[0]

    def features(self, batch: Batch) -> Features:
        """As :meth:`TeacherOutputs.features`."""
        return answers(self._teacher, batch, self._layers, self._heads)[1]


def cached_bytes(teacher: Encoder, texts: EncodedTexts, layers: tuple[int, ...] = (), heads: int = 1) -> int:
    """Bytes that the cache of ``texts`` takes on disk, but for a file's header."""
    config, tokens = teacher.config, len(texts.ids)
    total = 0
    for head in config.heads:
        size = head["size"] or config.hidden_size
        for name in head["outputs"]:
            values = size // len(head["outputs"]) if len(head["outputs"]) > 1 else size
            total += values * (2 * tokens if name in config.per_token_outputs else 4 * len(texts))
    return total + 2 * len(layers) * (tokens * config.hidden_size + int((texts.lengths**2).sum()) * heads)


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
def answers(teacher: Encoder, batch: Batch, layers: tuple[int, ...] = (), heads: int = 1) -> tuple[dict[str, Tensor], Features | None]:
    """What ``teacher`` says of a batch, in the precision of the cache; feature maps and attention where ``layers`` are asked for."""
    with half_precision(device=batch.input_ids.device.type):
        out = teacher(**batch.inputs, output_hidden_states=bool(layers), output_attention_scores=bool(layers))
    per_token = teacher.config.per_token_outputs
    given = {name: batch.flat(value).to(torch.float16) if name in per_token else value.float() for name, value in out.outputs.items()}
    if not layers:
        return given, None
    real, both = batch.attention_mask.bool(), valid_pairs(batch.attention_mask)
    hidden = torch.stack([out.hidden_states[layer][real] for layer in layers], dim=1)
    chosen = [group_heads(torch.softmax(out.attention_scores[i - 1].float(), -1), heads) for i in layers]
    weights = torch.stack([w.permute(0, 2, 3, 1)[both] for w in chosen], dim=1)
    return given, Features(hidden.to(torch.float16), weights.to(torch.float16))


@torch.no_grad()
def collect(
    teacher: Encoder, texts: EncodedTexts, folder: Path, progress: Progress, layers: tuple[int, ...] = (), heads: int = 1,
    device: torch.device = CPU,
) -> TeacherOutputs:  # fmt: skip
    """Run the teacher over ``texts`` once, unless ``folder`` already holds the result.

    Args:
        layers: 1-based layers whose feature maps and attention are kept; none for outputs alone.
        heads: attention is averaged to so many heads, the student's.
        device: where the teacher runs.
    """
    if not folder.is_dir():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write(teacher.to(device), texts, partial, progress, layers, heads)
        finally:
            teacher.to(CPU)
        os.replace(partial, folder)
    return TeacherOutputs(folder, texts)


def _write(teacher: Encoder, texts: EncodedTexts, folder: Path, progress: Progress, layers: tuple[int, ...], heads: int) -> None:
    teacher.eval()
    lengths = texts.lengths
    pair_start = np.concatenate([[0], np.cumsum(lengths**2)])
    outputs: dict[str, np.ndarray] = {}
    features = attention = None
    if layers:
        shape = (len(texts.ids), len(layers), teacher.config.hidden_size)
        features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
        attention = np.lib.format.open_memmap(folder / "attention.npy", "w+", np.float16, (int(pair_start[-1]), len(layers), heads))
    done = 0
    device = next(teacher.parameters()).device
    with progress.training("teacher outputs", len(texts)) as report:
        for batch in in_order(texts, evaluation_batch(texts)):
            given, known = answers(teacher, batch.to(device), layers, heads)
            tokens = flat_ranges(texts.offsets[batch.rows], lengths[batch.rows])
            for name, value in given.items():
                per_token = name in teacher.config.per_token_outputs
                value = value.cpu().numpy()
                if name not in outputs:
                    rows = len(texts.ids) if per_token else len(texts)
                    outputs[name] = np.lib.format.open_memmap(folder / f"{PREFIX}{name}.npy", "w+", value.dtype, (rows, *value.shape[1:]))
                outputs[name][tokens if per_token else batch.rows] = value
            if known is not None:
                features[tokens] = known.hidden.cpu().numpy()
                attention[flat_ranges(pair_start[batch.rows], lengths[batch.rows] ** 2)] = known.attention.cpu().numpy()
            done += len(batch.rows)
            report(done, None)
    for mapped in (*outputs.values(), features, attention):
        if mapped is not None:
            mapped.flush()
