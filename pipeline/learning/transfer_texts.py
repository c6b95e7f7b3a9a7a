"""More texts for the teacher to label: words masked, or exchanged for words that are used alike.

Sources: Tang et al. 2019, arXiv:1903.12136 §3.2 (masking; its part-of-speech and n-gram sampling are left out);
Jiao et al. 2020, TinyBERT, arXiv:1909.10351 §3.3 (exchange for near words; here the neighbours are those of the
teacher's own word table, where TinyBERT asks GloVe and a masked language model).

Exchanging words matters beyond the number of texts: it shows the student words that no training text holds, in places
where they make sense, so that their embeddings learn too. A copy carries no label: only the teacher says what it means.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.tasks.batches import EncodedTexts, from_id_lists


def nearest_words(table: Tensor, ids: np.ndarray, excluded: frozenset[int], count: int) -> np.ndarray:
    """The ``count`` rows of a word table [V, H] with the highest cosine to each row of ``ids`` [m], itself left out: [m, count]."""
    unit = functional.normalize(table.detach().float(), dim=-1)
    likeness = unit[torch.from_numpy(ids).long()] @ unit.T
    likeness[:, sorted(excluded)] = -2.0
    likeness[torch.arange(len(ids)), torch.from_numpy(ids).long()] = -2.0
    return likeness.topk(count, dim=-1).indices.numpy()


def altered_copies(
    texts: EncodedTexts,
    copies: int,
    mask_probability: float,
    replace_probability: float,
    table: Tensor,
    neighbours: int,
    special_ids: frozenset[int],
    mask_id: int,
    seed: int,
) -> EncodedTexts:
    """``copies`` altered copies of every text, copy by copy, with label -1.

    Each token that is not special becomes ``mask_id`` with ``mask_probability``, or with ``replace_probability`` one of
    its ``neighbours`` nearest words in ``table`` [V, H].
    """
    generator = np.random.default_rng((seed, 0xA06))
    free = ~np.isin(texts.ids, sorted(special_ids))
    used, place = np.unique(texts.ids, return_inverse=True)
    near = nearest_words(table, used, special_ids, neighbours)
    made = []
    for _ in range(copies):
        draw = generator.random(len(texts.ids))
        choice = generator.integers(neighbours, size=len(texts.ids))
        masked = free & (draw < mask_probability)
        replaced = free & ~masked & (draw < mask_probability + replace_probability)
        ids = np.where(replaced, near[place, choice], texts.ids)
        ids[masked] = mask_id
        made += [ids[texts.offsets[i] : texts.offsets[i + 1]] for i in range(len(texts))]
    return from_id_lists(made, np.full(len(made), -1), texts.pad_id)
