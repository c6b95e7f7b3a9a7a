"""The class of a text and the spans in it, from one file with two outputs. Options: those of text-classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.decode.base import Answer, Decoder, Outputs
from runtimes.decode.text_classification import TextClassification
from runtimes.decode.token_classification import TokenClassification

if TYPE_CHECKING:
    from runtimes.text import Encoding


class _Slots(TokenClassification):
    outputs = ("slot_logits", "slot_probabilities")


class IntentAndSlots(Decoder):
    """The answer of text-classification with the ``spans`` of token-classification."""

    kind = "intent-and-slots"
    most_columns = 1
    needs_offsets = True

    def __init__(self, options: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(options, labels)
        self.intent, self.slots = TextClassification(options, labels), _Slots(options, labels)

    def answer(self, example: Mapping[str, str], encodings: Sequence[Encoding], outputs: Sequence[Outputs]) -> Answer:
        return self.intent.answer(example, encodings, outputs) | self.slots.answer(example, encodings, outputs)

    def line(self, answer: Answer) -> str:
        return f"{self.intent.line(answer)}\t{self.slots.line(answer)}"

    def decisions(self, outputs: Outputs) -> np.ndarray:
        """The class, then the tag of each token."""
        return np.concatenate([self.intent.decisions(outputs), self.slots.decisions(outputs)])

    def margins(self, outputs: Outputs) -> np.ndarray:
        return np.concatenate([self.intent.margins(outputs), self.slots.margins(outputs)])
