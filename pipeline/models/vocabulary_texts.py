"""Texts of random words of a tokenizer's vocabulary, where there are no real ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

WORDS = (3, 6, 12, 24, 48)
"""Words of a text, in turns."""


def vocabulary_texts(tokenizer_json: str, columns: Sequence[str], seed: int, texts: int = 200) -> list[dict[str, str]]:
    """``texts`` rows with a few to many whole words in each column."""
    words = sorted(word for word in map(_whole_word, Tokenizer.from_str(tokenizer_json).get_vocab()) if word)
    generator = np.random.default_rng(seed)
    return [{column: " ".join(generator.choice(words, WORDS[i % len(WORDS)])) for column in columns} for i in range(texts)]


def _whole_word(token: str) -> str | None:
    """The letters of a token that begins a word; None for pieces, signs and special tokens."""
    for mark in ("\u0120", "\u2581"):  # how byte-level and unigram vocabularies mark the beginning of a word
        token = token.removeprefix(mark)
    return token if token.isalpha() and len(token) > 1 else None
