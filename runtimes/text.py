"""Text -> token ids, with the tokenizer file of the bundle.

The tokenizer encodes texts whole; cutting them to the longest input that a model takes is done here, to the same result. The library's own
cutting makes every part that it cuts off an encoding too: for a pair of long texts every part of one with every part of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runtimes.errors import BadInput, IntegrityError
from runtimes.tokenizer_structure import check_tokenizer

SPECIAL_TOKENS = ("special", "text")
"""What a special token is that stands in a text, ``[SEP]``: that very token, or the letters that it is written with."""
MOST_TOKENS = 2**20
"""No model takes more in one input."""
FIRST, SECOND, SPECIAL = 0, 1, -1
"""Values of :attr:`Encoding.sequences`."""


@dataclass(frozen=True)
class Encoding:
    """One input of a model.

    Attributes:
        ids: token ids with special tokens.
        types: the token type of each, 0 or 1.
        offsets: characters [start, end) of each token in its own text; (0, 0) for special tokens. Empty where nobody asked.
        sequences: 0 for tokens of the first text, 1 of the second, -1 for special ones. Empty where nobody asked.
    """

    ids: list[int]
    types: list[int]
    offsets: list[tuple[int, int]] = ()
    sequences: list[int] = ()


class TextEncoder:
    """The bundle's tokenizer, cut to the longest input that its models take.

    Args:
        tokenizer_file: tokenizer.json.
        max_length: tokens of the longest input.
        special_tokens: one of :data:`SPECIAL_TOKENS`. As ``text`` nobody who types ``[SEP]`` parts a text with it.

    Raises:
        IntegrityError: a file that is no tokenizer, or one that would take time or memory without bound.

    ``truncated`` counts the texts and pairs that were cut since the object was made.
    """

    def __init__(self, tokenizer_file: Path, max_length: int, special_tokens: str = "special") -> None:
        check_tokenizer(tokenizer_file)
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise IntegrityError(f"{tokenizer_file}: not a tokenizer file: {error}") from error
        self._take(tokenizer, max_length)
        tokenizer.encode_special_tokens = special_tokens == "text"

    @classmethod
    def of(cls, tokenizer: Tokenizer, max_length: int) -> TextEncoder:
        """An encoder of a tokenizer in memory, whose cutting and padding are switched off."""
        made = cls.__new__(cls)
        made._take(tokenizer, max_length)
        return made

    def _take(self, tokenizer: Tokenizer, max_length: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.truncated = 0

    def special_tokens(self) -> dict[str, int]:
        """Special tokens as they are written -> their ids, in the order of the ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items()) if token.special}

    def encode(self, text: str, pair: str | None = None, offsets: bool = True) -> Encoding:
        """Encode a text, or a pair of texts as one input, in at most ``max_length`` tokens.

        Of a pair the longer text is cut first, then both to the same length.

        Args:
            offsets: also say which characters each token stands for; without, encoding takes a quarter less time.

        Raises:
            BadInput: something that is no text, or a text with half of a surrogate pair.
        """
        return self.encode_batch([text if pair is None else (text, pair)], offsets)[0]

    def encode_batch(self, texts: Sequence[str | tuple[str, str]], offsets: bool = True) -> list[Encoding]:
        """What :meth:`encode` gives, of each text or pair."""
        whole = self._whole(list(texts), offsets)
        made = []
        for encoding in whole:
            if len(encoding.ids) > self.max_length:
                self.truncated += 1
                made.append(_cut(encoding, self.max_length, offsets))
            else:
                made.append(_encoding(encoding) if offsets else Encoding(encoding.ids, encoding.type_ids))
        return made

    def windows(self, question: str, context: str, stride: int) -> list[Encoding]:
        """Encode ``question`` with every part of ``context`` that fits beside it, as BERT reads long texts.

        Args:
            stride: tokens of the context that a window shares with the window before it.

        Returns:
            At least one input; the question is whole in each, and the parts cover the whole context.

        Raises:
            BadInput: a question that leaves no more than ``stride`` tokens of room for the context; something that is no text.
        """
        whole = _encoding(self._whole([(question, context)], offsets=True)[0])
        length, asked, told = len(whole.ids), whole.sequences.count(FIRST), whole.sequences.count(SECOND)
        if length <= self.max_length:
            return [whole]
        special = length - asked - told
        room = self.max_length - special - asked
        if room <= stride:
            most = max(0, self.max_length - special - stride - 1)
            raise BadInput(
                f"the question has {asked} tokens; of {self.max_length} tokens in a window, {special} special and {stride} shared with the "
                f"window before, it may have {most}. Shorten it, or raise max_length or lower stride"
            )
        begin = whole.sequences.index(SECOND)
        parts = []
        for start in range(0, max(1, told - stride), room - stride):
            kept = [*range(begin), *range(begin + start, begin + min(start + room, told)), *range(begin + told, length)]
            parts.append(_selected(whole, kept))
        return parts

    def _whole(self, texts: list[Any], offsets: bool) -> list[Any]:
        """Encodings of the library, uncut."""
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        try:
            return encode(texts)
        except Exception:
            for number, given in enumerate(texts, start=1):
                place = "the text" if len(texts) == 1 else f"text {number} of {len(texts)}"
                for text in given if isinstance(given, tuple) else (given,):
                    check_text(text, place)
            raise


def check_text(text: Any, place: str) -> None:
    """Refuse what no tokenizer can encode.

    Raises:
        BadInput: naming ``place`` and, for half of a surrogate pair, the character.
    """
    if not isinstance(text, str):
        raise BadInput(f"{place}: {text!r} is not a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            f"{place}: character {error.start + 1} is U+{ord(text[error.start]):04X}, half of a surrogate pair, which is no character; "
            "the text was damaged before it came here, so read it again with the right encoding"
        ) from error


def _encoding(encoding: Any) -> Encoding:
    sequences = [SPECIAL if number is None else number for number in encoding.sequence_ids]
    return Encoding(encoding.ids, encoding.type_ids, encoding.offsets, sequences)


def _cut(encoding: Any, max_length: int, offsets: bool) -> Encoding:
    """An encoding of the library cut at the ends of its texts; special tokens stay."""
    whole = _encoding(encoding)
    first, second = whole.sequences.count(FIRST), whole.sequences.count(SECOND)
    room = max(0, max_length - (len(whole.ids) - first - second))
    left = dict(zip((FIRST, SECOND), _shares(first, second, room), strict=True))
    kept = []
    for i, sequence in enumerate(whole.sequences):
        if sequence == SPECIAL:
            kept.append(i)
        elif left[sequence]:
            left[sequence] -= 1
            kept.append(i)
    return _selected(whole, kept) if offsets else Encoding([whole.ids[i] for i in kept], [whole.types[i] for i in kept])


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that each of two texts keeps in ``room``: the longer one is cut first; of two long ones the second keeps an odd token."""
    shorter, longer = sorted((first, second))
    if shorter + longer > room:
        longer = max(shorter, room - shorter)
        if shorter + longer > room:
            shorter = room // 2
            longer = room - shorter
    return (shorter, longer) if first <= second else (longer, shorter)


def _selected(whole: Encoding, kept: list[int]) -> Encoding:
    """The tokens numbered in ``kept``."""
    return Encoding(*([values[i] for i in kept] for values in (whole.ids, whole.types, whole.offsets, whole.sequences)))
