"""Text -> token ids, with the tokenizer file of the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from runtimes.errors import IntegrityError


class TextEncoder:
    """The bundle's tokenizer, cut to the longest input that its models take.

    ``truncated`` counts the texts that were cut since the object was made.
    """

    def __init__(self, tokenizer_file: Path, max_length: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise IntegrityError(f"{tokenizer_file}: not a tokenizer file: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self.max_length = max_length
        self.truncated = 0

    def encode(self, text: str) -> list[int]:
        """Token ids with special tokens, at most ``max_length`` of them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(list(texts))
        self.truncated += sum(1 for encoding in encodings if encoding.overflowing)
        return [encoding.ids for encoding in encodings]
