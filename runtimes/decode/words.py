"""Words of a raw text, and the tokens that stand for them.

The rule is the same wherever a text is tagged, in Python or in an app:

1. A Chinese, Japanese or Korean ideograph is a word, and parts what stands around it.
2. Of what is left between blanks, these signs part what stands around them: brackets, double quotation marks, dashes but not hyphens,
   ``; ! ? …``, two or more full stops or hyphens in a row, and ``,`` and ``/`` unless a digit stands on both sides.
3. In each part, the stretch from the first to the last letter or digit is a word, signs inside it included: "x-ray", "don't", "3.5". Marks
   that belong to its last letter (accents, vowel signs) belong to the word. A final "'s" is a word of its own: "Anna" "'s". Single letters
   with full stops between them keep the last one: "U.S.".
4. Every other character but blanks is a word: the full stop of a sentence, a quotation mark, an emoji.

Letters, digits and marks are the categories L, N and M of Unicode; blanks are what ``str.isspace`` says. Training rows, which have their tokens
given, are the text ``" ".join(tokens)`` with the tokens as its words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtimes.text import Encoding

IDEOGRAPHS = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip
"""First and last code points, as in BERT's tokenizer, which makes a token of each."""
CUT_OFF = -1
APOSTROPHES = "'\u2019"
HYPHENS = "-\u2010\u2011"
PARTING = '";!?\u2026'
PARTING_CATEGORIES = ("Pd", "Ps", "Pe", "Pi", "Pf")
"""Of Unicode: dashes, brackets, quotation marks; hyphens and apostrophes among them part nothing."""
PARTING_UNLESS_IN_NUMBERS = ",/"
PARTING_IN_RUNS = ".-"


def find_words(text: str) -> list[tuple[int, int]]:
    """Words as characters [start, end), in order.

    >>> [text[a:b] for text in ["(Don't go to Köln.)"] for a, b in find_words(text)]
    ['(', "Don't", 'go', 'to', 'Köln', '.', ')']
    """
    words: list[tuple[int, int]] = []
    start = 0
    for end in range(len(text) + 1):
        if end == len(text) or text[end].isspace() or is_ideograph(text[end]):
            words += _between_blanks(text, start, end)
            if end < len(text) and not text[end].isspace():
                words.append((end, end + 1))
            start = end + 1
    return words


def joined_words(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """The tokens of a training row as characters [start, end) of ``" ".join(tokens)``."""
    words, start = [], 0
    for token in tokens:
        words.append((start, start + len(token)))
        start += len(token) + 1
    return words


def first_tokens(words: Sequence[tuple[int, int]], encoding: Encoding) -> list[int]:
    """Number of the first token of each word.

    Args:
        words: characters [start, end) in the first text of ``encoding``, in order.
        encoding: with offsets.

    Returns:
        For each word the first token that stands for some of its characters; -1 where there is none, because the text was cut before the word,
        because the tokenizer drops its characters, or because the token stands for the word before it too and is that word's.
    """
    tokens = [(start, end, i) for i, ((start, end), n) in enumerate(zip(encoding.offsets, encoding.sequences, strict=True)) if n == 0 and end > start]
    found, at, taken = [], 0, -1
    for start, end in words:
        while at < len(tokens) and tokens[at][1] <= start:
            at += 1
        found.append(tokens[at][2] if at != taken and at < len(tokens) and tokens[at][0] < end else CUT_OFF)
        if found[-1] != CUT_OFF:
            taken = at
    return found


def is_ideograph(character: str) -> bool:
    code = ord(character)
    return code >= IDEOGRAPHS[0][0] and any(first <= code <= last for first, last in IDEOGRAPHS)


def end_with_marks(text: str, end: int) -> int:
    """``end`` moved over the marks (accents, vowel signs) that follow: a tokenizer that drops them ends its last token before them."""
    while end < len(text) and unicodedata.category(text[end])[0] == "M":
        end += 1
    return end


def _between_blanks(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Words of a stretch without blanks and ideographs."""
    words, begin = [], start
    for i in range(start, end):
        if _parts(text, i):
            words += [*_in_part(text, begin, i), (i, i + 1)]
            begin = i + 1
    return words + _in_part(text, begin, end)


def _parts(text: str, i: int) -> bool:
    """Whether the character numbered ``i`` parts what stands around it."""
    sign, before, after = text[i], text[i - 1 : i], text[i + 1 : i + 2]
    if sign in PARTING_IN_RUNS:
        return sign in (before, after)
    if sign in PARTING_UNLESS_IN_NUMBERS:
        return not (before.isdigit() and after.isdigit())
    return sign in PARTING or (unicodedata.category(sign) in PARTING_CATEGORIES and sign not in APOSTROPHES and sign not in HYPHENS)


def _in_part(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Words of a part: signs before its word, the word, signs after it."""
    inside = [i for i in range(start, end) if unicodedata.category(text[i])[0] in "LN"]
    if not inside:
        return [(i, i + 1) for i in range(start, end)]
    first, last = inside[0], min(end, end_with_marks(text, inside[-1] + 1))
    words = [(first, last)]
    if last - first > 2 and text[last - 1] in "sS" and text[last - 2] in APOSTROPHES:
        last -= 2
        words = [(first, last), (last, last + 2)]
    elif last < end and text[last] == "." and _is_abbreviation(text[first:last]):
        last += 1
        words = [(first, last)]
    return [*((i, i + 1) for i in range(start, first)), *words, *((i, i + 1) for i in range(words[-1][1], end))]


def _is_abbreviation(word: str) -> bool:
    """Whether it is of single letters with full stops between them."""
    letters = word.split(".")
    return len(letters) > 1 and all(len(letter) == 1 and letter.isalpha() for letter in letters)
