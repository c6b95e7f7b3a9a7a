"""Spans of a text, each with its type and the characters where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.decode.base import NOTHING, Answer, Decoder, Outputs, one_line
from runtimes.decode.classes import Classes, lead
from runtimes.decode.tags import spans_of
from runtimes.decode.words import CUT_OFF, find_words, first_tokens
from runtimes.errors import IntegrityError

if TYPE_CHECKING:
    from runtimes.text import Encoding


class TokenClassification(Decoder):
    """``{"spans": [{"type", "start", "end", "text", "probability"}, ...]}`` in order, characters [start, end) of the text.

    A word has the tag of its first token; ``probability`` is the mean over the words of a span. Words that were cut off have no tag.
    """

    kind = "token-classification"
    most_columns = 1
    needs_offsets = True
    outputs = ("logits", "probabilities")

    def __init__(self, options: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(options, labels)
        self.classes = Classes(self.outputs, labels, self.decode, rank=2)

    def answer(self, example: Mapping[str, str], encodings: Sequence[Encoding], outputs: Sequence[Outputs]) -> Answer:
        text, encoding = example[self.columns[0]], encodings[0]
        raw = self.classes.raw(outputs[0])
        if raw.shape[0] != len(encoding.ids):
            raise IntegrityError(f"{self.classes.outputs[0]}: the file gives tags for {raw.shape[0]} tokens of {len(encoding.ids)}")
        words = find_words(text)
        seen = [(word, token) for word, token in zip(words, first_tokens(words, encoding), strict=True) if token != CUT_OFF]
        scores = raw[[token for _, token in seen]]
        best = scores.argmax(axis=-1)
        probabilities = self.classes.probabilities(scores)[np.arange(len(seen)), best]
        spans = []
        for kind, first, end in spans_of([self.classes.names[i] for i in best]):
            begin, finish = seen[first][0][0], seen[end - 1][0][1]
            spans.append({
                "type": kind, "start": begin, "end": finish, "text": text[begin:finish], "probability": float(probabilities[first:end].mean()),
            })  # fmt: skip
        return {"spans": spans}

    def line(self, answer: Answer) -> str:
        return "\t".join(f"{one_line(span['type'])} {span['start']}-{span['end']} {one_line(span['text'])}" for span in answer["spans"]) or NOTHING

    def decisions(self, outputs: Outputs) -> np.ndarray:
        """The tag of each token, special ones included."""
        return self.classes.raw(outputs).argmax(axis=-1)

    def margins(self, outputs: Outputs) -> np.ndarray:
        return lead(self.classes.raw(outputs))
