"""What models, folded encoders and files give for texts, for comparisons in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from exporters.forward import NumpySteps, forward
from exporters.graph import FoldedEncoder
from exporters.parity import torch_results
from runtimes.backends import load_model
from runtimes.text import Encoding


def inputs(id_lists: Sequence[Sequence[int]], segments: int = 1) -> list[Encoding]:
    """Texts of one segment, or whose second half is the second segment."""
    made = []
    for ids in id_lists:
        second = len(ids) - len(ids) // 2 if segments == 2 else 0
        made.append(Encoding(list(ids), [0] * (len(ids) - second) + [1] * second))
    return made


def torch_logits(model: nn.Module, id_lists: Sequence[Sequence[int]]) -> np.ndarray:
    """[N, C] of a classifier."""
    return np.stack([result["logits"] for result in torch_results(model, inputs(id_lists))])


def numpy_logits(model: FoldedEncoder, id_lists: Sequence[Sequence[int]]) -> np.ndarray:
    """[N, C] of a folded classifier."""
    return forward(model, NumpySteps(inputs(id_lists)))["logits"]


def numpy_results(model: FoldedEncoder, texts: Sequence[Encoding]) -> list[dict[str, np.ndarray]]:
    """Outputs of each text, of all texts run together."""
    together = forward(model, NumpySteps(texts))
    per_token = {name for head in model.heads if head.per_token for name in head.outputs}
    ends = np.cumsum([len(text.ids) for text in texts])
    return [
        {name: value[end - len(text.ids) : end] if name in per_token else value[number] for name, value in together.items()}
        for number, (text, end) in enumerate(zip(texts, ends, strict=True))
    ]


def file_results(path: Path, texts: Sequence[Encoding]) -> list[dict[str, np.ndarray]]:
    """Outputs that a file gives for each text, run alone."""
    model = load_model(path)
    return [model.run(text.ids, text.types) for text in texts]


def file_logits(path: Path, id_lists: Sequence[Sequence[int]]) -> np.ndarray:
    """[N, C] of a classifier's file."""
    return np.stack([result["logits"] for result in file_results(path, inputs(id_lists))])


def joined(results: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    """One output of all texts as rows, [N, C] or [all tokens, T]."""
    values = [np.atleast_1d(result[name]) for result in results]
    return np.stack(values) if values[0].ndim == 1 and name not in ("start_logits", "end_logits") else np.concatenate(values)
