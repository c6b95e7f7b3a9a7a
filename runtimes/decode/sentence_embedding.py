"""The vector of a text, or how alike two texts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.decode.base import Answer, Decoder, Outputs, output

if TYPE_CHECKING:
    from runtimes.text import Encoding, TextEncoder

SECOND_TEXT = "text_pair"
SMALLEST_NORM = 1e-12


class SentenceEmbedding(Decoder):
    """``{"embedding": [...]}`` of one text; ``{"similarity"}`` of two: the cosine of their vectors, which are made apart."""

    kind = "sentence-embedding"

    def __init__(self, options: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__(options, labels)
        if len(self.columns) == 1:  # trained on texts alone; two texts can be compared all the same
            self.columns = (*self.columns, SECOND_TEXT)
        self.optional = self.columns[1:]

    def encode(self, encoder: TextEncoder, example: Mapping[str, str]) -> list[Encoding]:
        return encoder.encode_batch([example[column] for column in self.columns if column in example], offsets=False)

    def answer(self, example: Mapping[str, str], encodings: Sequence[Encoding], outputs: Sequence[Outputs]) -> Answer:
        vectors = [np.ravel(output(one, ("sentence_embedding",))) for one in outputs]
        if len(vectors) == 1:
            return {"embedding": [float(number) for number in vectors[0]]}
        return {"similarity": cosine(vectors[0], vectors[1])}

    def line(self, answer: Answer) -> str:
        if "similarity" in answer:
            return f"{answer['similarity']:.4f}"
        return "\t".join(f"{number:.6g}" for number in answer["embedding"])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """0 for a vector without length."""
    one, other = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), SMALLEST_NORM))
