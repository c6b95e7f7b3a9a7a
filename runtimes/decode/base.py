"""What a decoder does: make the inputs of an example, and read the outputs of its inputs as an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.errors import BadInput, IntegrityError
from runtimes.manifest import Table, shown

if TYPE_CHECKING:
    from runtimes.text import Encoding, TextEncoder

Outputs = Mapping[str, np.ndarray]
"""Outputs of one input by name: per input [...], per token [n, ...]."""
Answer = dict[str, Any]
"""What a person gets; it can be written as JSON."""

SCALES = ("softmax", "sigmoid", "none")
NOTHING = "(none)"
"""How a line shows that there is no answer."""


class Decoder(ABC):
    """One kind of task on a device; a subclass gives :meth:`answer` and :meth:`line`.

    Here is what most kinds share: a text, or a pair, makes one input, and no output is a decision.

    Args:
        options: the section ``task`` of the manifest.
        labels: name of an output -> names of its classes.

    Raises:
        IntegrityError: an option that is missing or of the wrong type.

    Attributes:
        columns: what a person gives, in order; the last may be one that :attr:`optional` names.
        optional: columns that may be left out.
        decode: "softmax" or "sigmoid" makes probabilities of what a file gives, "none" where they are that already.
    """

    kind: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    most_columns = 2
    needs_offsets = False
    """Whether an answer says where in the text it stands."""

    def __init__(self, options: Mapping[str, Any], labels: Mapping[str, Sequence[str]]) -> None:
        self.options = Table(dict(options), "task")
        self.labels = {output: tuple(names) for output, names in labels.items()}
        self.columns = self.options.texts("columns")
        if not 1 <= len(self.columns) <= self.most_columns or len(set(self.columns)) < len(self.columns):
            raise IntegrityError(f"task: columns: {shown(list(self.columns))}; {self.kind} reads 1 to {self.most_columns} columns of different names")
        self.segments = self.options.whole("segments", least=1)
        self.decode = self.options.one_of("decode", SCALES)

    def example(self, given: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
        """An example by column.

        Args:
            given: one text, texts in the order of :attr:`columns`, or texts by column.

        Raises:
            BadInput: other columns than this task has, or something that is no text.
        """
        if isinstance(given, str):
            given = (given,)
        if not isinstance(given, (Mapping, Sequence)):
            raise BadInput(f"{given!r} is no example; {self.kind} takes {self._wanted()}")
        if not isinstance(given, Mapping):
            given = self._in_order(given)
        missing = [column for column in self.columns if column not in given and column not in self.optional]
        unknown = [str(column) for column in given if column not in self.columns]
        if missing or unknown:
            wrong = f"{', '.join(missing)[:200]} missing" if missing else f"{', '.join(unknown)[:200]} unknown"
            raise BadInput(f"{wrong}; {self.kind} takes {self._wanted()}")
        for column, text in given.items():
            if not isinstance(text, str):
                raise BadInput(f"{column}: {text!r} is not a text; {self.kind} takes {self._wanted()}")
        return {column: given[column] for column in self.columns if column in given}

    def encode(self, encoder: TextEncoder, example: Mapping[str, str]) -> list[Encoding]:
        """The inputs of one example; several where it is a long text in windows, or two texts that are read apart.

        Raises:
            BadInput: texts that cannot be encoded.
        """
        return [encoder.encode(*(example[column] for column in self.columns), offsets=self.needs_offsets)]

    @abstractmethod
    def answer(self, example: Mapping[str, str], encodings: Sequence[Encoding], outputs: Sequence[Outputs]) -> Answer:
        """The answer to an example, from the outputs of each of its inputs.

        Raises:
            IntegrityError: outputs that this task cannot read.
        """

    @abstractmethod
    def line(self, answer: Answer) -> str:
        """An answer as one line for a terminal, its parts separated by tabs."""

    def decisions(self, outputs: Outputs) -> np.ndarray:
        """What was decided in one input, int64 [d]: a class, a tag for each token, a start and an end. Numbers and vectors decide nothing."""
        return np.zeros(0, np.int64)

    def margins(self, outputs: Outputs) -> np.ndarray:
        """How far each decision is from the next best, float64 [d], in the unit of the outputs.

        While no output moves by more than half of it, the decision stays.
        """
        return np.zeros(0)

    def _in_order(self, texts: Sequence[Any]) -> dict[str, Any]:
        least = sum(1 for column in self.columns if column not in self.optional)
        if not least <= len(texts) <= len(self.columns):
            raise BadInput(f"{len(texts)} {'text' if len(texts) == 1 else 'texts'} given; {self.kind} takes {self._wanted()}")
        return dict(zip(self.columns, texts, strict=False))

    def _wanted(self) -> str:
        return ", ".join(f"{column[:60]} (may be left out)" if column in self.optional else column[:60] for column in self.columns)


def output(outputs: Outputs, names: Sequence[str]) -> np.ndarray:
    """The first of ``names`` that a file gives; IntegrityError if it gives none."""
    for name in names:
        if name in outputs:
            return outputs[name]
    raise IntegrityError(f"no output {' or '.join(names)}; the file gives {', '.join(sorted(outputs))}")


def one_line(text: str) -> str:
    """``text`` with every stretch of blanks as one, so that it stays on its line and in its column."""
    return " ".join(text.split())
