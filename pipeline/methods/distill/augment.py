"""More texts for the teacher to label: words masked or exchanged at random.

Source: Tang et al. 2019, arXiv:1903.12136 §3.2 (masking and random replacement; part-of-speech and n-gram sampling
are left out). A copy carries no label: only the teacher's logits say what it means.
"""

from __future__ import annotations

import numpy as np

from pipeline.tasks.batches import EncodedTexts, from_id_lists


def masked_copies(
    texts: EncodedTexts,
    copies: int,
    mask_probability: float,
    replace_probability: float,
    special_ids: frozenset[int],
    mask_id: int,
    seed: int,
) -> EncodedTexts:
    """``copies`` altered copies of every text, copy by copy, with label -1.

    Each token that is not special becomes ``mask_id`` with ``mask_probability``, or with ``replace_probability`` a
    token drawn from all tokens of ``texts`` (so frequent ones come often).
    """
    generator = np.random.default_rng((seed, 0xA06))
    pool = texts.ids[~np.isin(texts.ids, sorted(special_ids))]
    made = []
    for _ in range(copies):
        draw = generator.random(len(texts.ids))
        ids = texts.ids.copy()
        free = ~np.isin(ids, sorted(special_ids))
        masked = free & (draw < mask_probability)
        replaced = free & ~masked & (draw < mask_probability + replace_probability)
        ids[masked] = mask_id
        ids[replaced] = generator.choice(pool, int(replaced.sum()))
        made += [ids[texts.offsets[i] : texts.offsets[i + 1]] for i in range(len(texts))]
    return from_id_lists(made, np.full(len(made), -1), texts.pad_id)
