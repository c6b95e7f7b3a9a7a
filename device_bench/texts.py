"""Texts as the agents read them: token ids of many texts in one flat file, with the logits they should give.

A ``.texts`` file is little-endian, without padding: int32 N; int32 C (0: no logits); int32 offsets[N + 1], rising from 0;
int32 ids[offsets[N]], text i is ``ids[offsets[i]:offsets[i + 1]]``; float32 logits[N][C]. Nothing follows. A board reads it
with ten lines of C.

What this does not do: tokenize; read (the agents do, because a board gets them alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def write_texts(path: Path, id_lists: Sequence[Sequence[int]], logits: np.ndarray | None = None) -> None:
    """Write texts, and what they should give: ``logits`` [N, C] for the N texts."""
    rows = np.zeros((len(id_lists), 0), np.float32) if logits is None else np.asarray(logits, np.float32)
    if rows.ndim != 2 or len(rows) != len(id_lists):
        raise ValueError(f"{rows.shape} logits for {len(id_lists)} texts")
    offsets = np.cumsum([0, *(len(ids) for ids in id_lists)])
    ids = np.concatenate([np.asarray(ids) for ids in id_lists])
    with path.open("wb") as file:
        for part, kind in (([len(id_lists), rows.shape[1]], "<i4"), (offsets, "<i4"), (ids, "<i4"), (rows, "<f4")):
            file.write(np.asarray(part).astype(kind).tobytes())
