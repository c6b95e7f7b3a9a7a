"""An output with one number for each of several classes: probabilities, the best class, and how clear it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtimes.decode.base import Outputs, output
from runtimes.errors import IntegrityError


class Classes:
    """The output ``names[0]``, which a file that gives probabilities calls ``names[1]``, and the names of its classes.

    Args:
        labels: of a bundle: name of an output -> names of its classes.
        decode: "softmax", "sigmoid" or "none".
        rank: 1 where an input has classes, 2 where each of its tokens has.

    Raises:
        IntegrityError: no names for the classes.
    """

    def __init__(self, names: tuple[str, str], labels: Mapping[str, Sequence[str]], decode: str, rank: int) -> None:
        self.outputs, self.rank = names, rank
        self.names = next((tuple(labels[name]) for name in names if name in labels), ())
        self.decode = decode
        if not self.names:
            raise IntegrityError(f"labels: no names for the classes of {names[0]}; there are names for {', '.join(labels) or 'nothing'}")

    def raw(self, outputs: Outputs) -> np.ndarray:
        """What the file gives, float64 [..., C]: logits, or probabilities where ``decode`` is "none"."""
        values = np.asarray(output(outputs, self.outputs), np.float64)
        if values.ndim != self.rank:
            raise IntegrityError(f"{self.outputs[0]}: the file gives {list(values.shape)}; this task reads {'[n, C]' if self.rank == 2 else '[C]'}")
        if values.shape[-1] != len(self.names):
            raise IntegrityError(f"{self.outputs[0]}: the file gives {values.shape[-1]} classes, the bundle names {len(self.names)}")
        return values

    def probabilities(self, raw: np.ndarray) -> np.ndarray:
        """Of :meth:`raw`, same shape."""
        return {"softmax": softmax, "sigmoid": sigmoid, "none": np.asarray}[self.decode](raw)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logits))


def log_odds(probability: np.ndarray | float) -> np.ndarray:
    """Inverse of :func:`sigmoid`; infinite at 0 and 1."""
    with np.errstate(divide="ignore"):
        return np.log(probability) - np.log1p(-np.asarray(probability, np.float64))


def lead(values: np.ndarray) -> np.ndarray:
    """The best minus the second best over the last axis; infinite where there is no second."""
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.inf)
    highest = np.partition(values, -2, axis=-1)
    return highest[..., -1] - highest[..., -2]
