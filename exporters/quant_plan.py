"""Which tensor is stored and multiplied in which precision: one plan for both formats.

A plan is a default and ordered rules, each a regular expression on tensor names with a precision; the first that matches
a whole name decides. Names are those of :mod:`exporters.folding`: ``embeddings.words``, ``layers.0.query_key_value``,
``layers.0.ffns.1.up``, ``classifier``, ... Of a matrix that is a product of two, ``layers.0.output.inner`` is the one that runs
first; of queries, keys and values that one is part of the matrix that reads for all of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from exporters.graph import FoldedEncoder
from runtimes.errors import BadInput

FLOAT32 = "float32"
INT8 = "int8"
INT8_STATIC = "int8-static"
INT4 = "int4"
PRECISIONS = {
    FLOAT32: "as trained",
    INT8: "weights in 8 bits per output channel; activations quantized as they come, with ranges of their own",
    INT8_STATIC: "weights in 8 bits per output channel; activations in ranges found by calibration",
    INT4: "weights in 4 bits",
}


@dataclass(frozen=True)
class Range:
    """What calibration saw of one matrix: the least and the largest value of its input and of its output."""

    input_min: float
    input_max: float
    output_min: float
    output_max: float


@dataclass(frozen=True)
class QuantPlan:
    """``rules`` are (pattern, precision); ``ranges`` by tensor name are needed where the precision is static."""

    default: str = INT8
    rules: tuple[tuple[str, str], ...] = ()
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern, precision in (("the default", self.default), *self.rules):
            if precision not in PRECISIONS:
                raise BadInput(f"quantization rule {pattern!r}: unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadInput(f"quantization rule {pattern!r}: not a regular expression: {error}") from error

    def precision(self, name: str) -> str:
        """Of a matrix."""
        for pattern, precision in self.rules:
            if re.fullmatch(pattern, name):
                return precision
        return self.default

    def table_precision(self, name: str) -> str:
        """Of a table: 8 bits under every scheme, unless a rule says float32."""
        return FLOAT32 if self.precision(name) == FLOAT32 else INT8

    def keeping(self, names: Iterable[str]) -> QuantPlan:
        """The same plan with ``names`` in float32."""
        kept = tuple((re.escape(name), FLOAT32) for name in names)
        return replace(self, rules=kept + self.rules)

    def only(self, name: str) -> QuantPlan:
        """``name`` as in this plan, everything else in float32."""
        return replace(self, default=FLOAT32, rules=((re.escape(name), self.precision(name)),))

    def for_old_runtimes(self) -> QuantPlan:
        """The same plan in the one quantized precision that old runtimes compute."""
        rules = tuple((pattern, FLOAT32 if precision == FLOAT32 else INT8) for pattern, precision in self.rules)
        return QuantPlan(FLOAT32 if self.default == FLOAT32 else INT8, rules)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """A warning for each rule that matches no name, with the names nearest to it."""
        names = list(names)
        warnings = []
        for pattern, _ in self.rules:
            if not any(re.fullmatch(pattern, name) for name in names):
                near = difflib.get_close_matches(pattern.replace("\\", ""), names, n=3, cutoff=0.4)
                hint = f"; near it are {', '.join(near)}" if near else f"; names are like {', '.join(names[:3])}"
                warnings.append(f"quantization rule {pattern!r} matches no tensor{hint}")
        return warnings

    def range(self, name: str) -> Range:
        if name not in self.ranges:
            raise BadInput(f"{name}: {INT8_STATIC} needs a range, but no calibration saw this matrix; calibrate, or choose {INT8}")
        return self.ranges[name]


FLOAT_PLAN = QuantPlan(FLOAT32)


def tensor_names(model: FoldedEncoder) -> list[str]:
    """Every name that a rule can match, each once, in the order of use."""
    return list(dict.fromkeys([model.words.name, *(linear.name for linear, _ in model.linears())]))


def tensor_bytes(model: FoldedEncoder) -> dict[str, int]:
    """Bytes that each tensor takes in float32."""
    sizes = {model.words.name: model.words.rows.nbytes}
    return sizes | {linear.name: linear.weight.nbytes for linear, _ in model.linears()}


def rows_to_int8(weight: np.ndarray, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric quantization per row: (codes int8 [rows, columns] in +-(2^(bits-1) - 1), scales float32 [rows]).

    Source: Jacob et al. 2018, arXiv:1712.05877 §2.1 with zero point 0, per output channel.
    """
    largest = 2 ** (bits - 1) - 1
    scales = (np.abs(weight).max(axis=1) / largest).astype(np.float32)
    scales[scales == 0] = 1.0  # a row of zeros
    return np.clip(np.round(weight / scales[:, None]), -largest, largest).astype(np.int8), scales
