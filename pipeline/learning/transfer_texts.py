"""What a student learns from its teacher: the training inputs, texts without labels, and altered copies.

In a copy words are masked, or exchanged for words that are used alike.

Sources: Tang et al. 2019, arXiv:1903.12136 §3.2 (masking; its part-of-speech and n-gram sampling are left out);
Jiao et al. 2020, TinyBERT, arXiv:1909.10351 §3.3 (exchange for near words; here the neighbours are those of the
teacher's own word table, where TinyBERT asks GloVe and a masked language model).

Exchanging words matters beyond the number of texts: it shows the student words that no training text holds, in places
where they make sense, so that their embeddings learn too. A copy carries no label: only the teacher says what it means.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from pipeline.flow.stage import Context
from pipeline.models.checkpoint import Checkpoint
from pipeline.tasks.batches import EncodedTexts
from runtimes.errors import BadInput


class TransferSet(BaseModel):
    """Which inputs a teacher labels for its student."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    unlabeled: bool = True
    """Whether the texts of ``task.unlabeled`` are part of it, where the recipe names some."""
    copies: int = Field(4, ge=0)
    """Altered copies of every input; 0 for none."""
    mask_probability: float = Field(0.1, ge=0, le=1)
    """Chance of a token of a copy to be masked."""
    replace_probability: float = Field(0.3, ge=0, le=1)
    """Chance of a token of a copy to be exchanged for one of its nearest words in the teacher's word table."""
    neighbours: int = Field(15, ge=1)
    """Number of nearest words that a token may be exchanged for (TinyBERT: 15)."""

    def inputs(self, context: Context, teacher: Checkpoint) -> EncodedTexts:
        """Training inputs, those without labels, then the copies, as the teacher tokenizes them.

        Raises:
            BadInput: copies are asked for, and the tokenizer has no mask token.
        """
        texts = replace(context.encode(teacher, "train"), group=1)  # a teacher's answer to one text of a pair needs no other
        if self.unlabeled and context.data.unlabeled:
            texts = texts.joined(replace(context.encode(teacher, "unlabeled"), group=1))
        if not self.copies:
            return texts
        mask_id = teacher.special_id("mask_token")
        if mask_id is None:
            raise BadInput("copies: the tokenizer has no mask token; set copies = 0")
        words = min(self.neighbours, teacher.model.config.vocab_size - len(teacher.special_ids) - 1)
        made = altered_copies(
            texts, self.copies, self.mask_probability, self.replace_probability, teacher.model.embeddings.word.weight, words,
            teacher.special_ids, mask_id, context.seed,
        )  # fmt: skip
        return texts.joined(made)


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
    """``copies`` altered copies of every input, copy by copy, without targets.

    Each token that is not special becomes ``mask_id`` with ``mask_probability``, or with ``replace_probability`` one of
    its ``neighbours`` nearest words in ``table`` [V, H].
    """
    generator = np.random.default_rng((seed, 0xA06))
    free = ~np.isin(texts.ids, sorted(special_ids))
    used, place = np.unique(texts.ids, return_inverse=True)
    near = nearest_words(table, used, special_ids, neighbours)
    made: EncodedTexts | None = None
    for _ in range(copies):
        draw = generator.random(len(texts.ids))
        choice = generator.integers(neighbours, size=len(texts.ids))
        masked = free & (draw < mask_probability)
        replaced = free & ~masked & (draw < mask_probability + replace_probability)
        ids = np.where(replaced, near[place, choice], texts.ids)
        ids[masked] = mask_id
        copy = texts.with_ids(ids)
        made = copy if made is None else made.joined(copy)
    return made
