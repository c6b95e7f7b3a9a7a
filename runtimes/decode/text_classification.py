"""The class of a text or a pair of texts, or several classes of it.

Options: ``multi_label`` (bool, false): each class is decided by itself. ``threshold`` (number or null): a class below this probability is no
answer; with ``multi_label`` it is 0.5 if null, otherwise the best class is always the answer if null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.decode.base import NOTHING, Answer, Decoder, Outputs, one_line
from runtimes.decode.classes import Classes, lead, log_odds
from runtimes.errors import IntegrityError

if TYPE_CHECKING:
    from runtimes.text import Encoding

SHOWN = 5
"""Classes in an answer where one is chosen."""
EVEN = 0.5
NONE_OF_THEM = -1


class TextClassification(Decoder):
    """``{"label", "probability", "labels": [{"label", "probability"}, ...]}``, ``labels`` the best five, best first.

    Below the threshold ``label`` is null, and ``probability`` still that of the best class. With ``multi_label`` the answer has ``labels``
    alone: all that reach the threshold, best first.
    """

    kind = "text-classification"

    def __init__(self, options: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(options, labels)
        self.classes = Classes(("logits", "probabilities"), labels, self.decode, rank=1)
        self.multi_label = self.options.flag("multi_label", False)
        given = self.options.raw.get("threshold")
        self.threshold = None if given is None else float(self.options.number("threshold"))
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise IntegrityError(f"task: threshold: {self.threshold} is not a probability")
        if self.multi_label and self.decode == "softmax":
            raise IntegrityError("task: decode: softmax makes the classes share one whole; multi_label needs sigmoid, or none")
        if self.multi_label and self.threshold is None:
            self.threshold = EVEN

    def answer(self, example: Mapping[str, str], encodings: Sequence[Encoding], outputs: Sequence[Outputs]) -> Answer:
        raw = self.classes.raw(outputs[0])
        probabilities = self.classes.probabilities(raw)
        best_first = np.argsort(-raw, kind="stable")
        ranked = [{"label": self.classes.names[i], "probability": float(probabilities[i])} for i in best_first]
        if self.multi_label:
            return {"labels": [one for one in ranked if one["probability"] >= self.threshold]}
        best = ranked[0]
        known = self.threshold is None or best["probability"] >= self.threshold
        return {"label": best["label"] if known else None, "probability": best["probability"], "labels": ranked[:SHOWN]}

    def line(self, answer: Answer) -> str:
        if self.multi_label:
            return "\t".join(f"{one_line(one['label'])}\t{one['probability']:.4f}" for one in answer["labels"]) or NOTHING
        return f"{NOTHING if answer['label'] is None else one_line(answer['label'])}\t{answer['probability']:.4f}"

    def decisions(self, outputs: Outputs) -> np.ndarray:
        """The class, -1 if none of them; with ``multi_label`` 1 or 0 for each."""
        raw = self.classes.raw(outputs)
        probabilities = self.classes.probabilities(raw)
        if self.multi_label:
            return (probabilities >= self.threshold).astype(np.int64)
        best = int(raw.argmax())
        known = self.threshold is None or probabilities[best] >= self.threshold
        return np.array([best if known else NONE_OF_THEM])

    def margins(self, outputs: Outputs) -> np.ndarray:
        raw = self.classes.raw(outputs)
        if self.multi_label:
            return np.abs(self._above_threshold(raw))
        ahead = np.atleast_1d(lead(raw))
        if self.threshold is None:
            return ahead
        above = self._above_threshold(self._against_the_others(raw) if self.decode == "softmax" else raw.max(keepdims=True))
        return np.minimum(ahead, above) if above >= 0 else -above

    def _above_threshold(self, values: np.ndarray) -> np.ndarray:
        """How far ``values`` are above the threshold: probabilities, or log odds."""
        return values - (self.threshold if self.decode == "none" else log_odds(self.threshold))

    def _against_the_others(self, logits: np.ndarray) -> np.ndarray:
        """Log odds [1] of the best class. They move by at most twice what a logit moves by."""
        best = int(logits.argmax())
        return logits[best : best + 1] - np.logaddexp.reduce(np.delete(logits, best))
