"""Proof that an exported file computes what the torch module computes, on real texts, with and without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from runtimes.backends import OnnxModel, load_model
from runtimes.errors import GateFailed

MIN_TEXTS = 100
TOLERANCE = 1e-3
"""Largest |difference| of a logit that a float32 file may show, relative to the largest |logit| where that exceeds 1."""
PADDED_BATCH = 8


@dataclass(frozen=True)
class Parity:
    """``worst`` |logit difference| over ``texts`` texts, and the ``limit`` it was held against."""

    worst: float
    limit: float
    texts: int


@torch.no_grad()
def torch_logits(model: nn.Module, id_lists: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits [N, C] of texts run one by one, unpadded."""
    model.eval()
    return np.stack([model(torch.tensor([list(ids)])).logits[0].float().numpy() for ids in id_lists])


def check_parity(expected: np.ndarray, path: Path, id_lists: Sequence[Sequence[int]]) -> Parity:
    """Compare a file with the torch logits of the same texts.

    A TFLite file pads to its buckets by itself; an ONNX file runs every text alone, then in padded batches of
    unlike lengths.

    Args:
        expected: [N, C] from :func:`torch_logits`.
        id_lists: the N texts as token ids.

    Raises:
        GateFailed: naming the file, the worst text and its difference.
    """
    model = load_model(path)
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    runs = {"alone": np.stack([model.logits(list(ids)) for ids in id_lists])}
    if isinstance(model, OnnxModel):
        parts = [id_lists[i : i + PADDED_BATCH] for i in range(0, len(id_lists), PADDED_BATCH)]
        runs["in padded batches"] = np.concatenate([model.batch_logits(part) for part in parts])
    worst = 0.0
    for how, got in runs.items():
        differences = np.abs(got - expected).max(axis=1)
        text = int(differences.argmax())
        if not differences[text] <= limit:
            raise GateFailed(
                f"{path.name}: run {how}, text {text} of {len(id_lists)} ({len(id_lists[text])} tokens) differs from the torch model "
                f"by {differences[text]:.3g}, at most {limit:.3g} is allowed; the file is kept at {path} and not published"
            )
        worst = max(worst, float(differences[text]))
    return Parity(worst, limit, len(id_lists))
