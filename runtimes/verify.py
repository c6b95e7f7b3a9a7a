"""Prove that a bundle does here what it did where it was made: checksums, then golden cases on every runtime.

A case holds if the tokenizer makes the recorded inputs, the decoder makes the recorded answer of the recorded outputs, and every file gives the
recorded outputs within its tolerance. What is decided must be the same too where the tolerance cannot change it.

Files run in a process of their own (:mod:`runtimes.golden_run`), so that one that ends its process is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.backends import installed_formats
from runtimes.bundle import Bundle, ModelEntry, check_sums, open_bundle
from runtimes.decode.base import Decoder
from runtimes.errors import BadInput, IntegrityError
from runtimes.golden_run import FileRun, run_golden
from runtimes.manifest import is_finite
from runtimes.text import Encoding, TextEncoder

ANSWER_TOLERANCE = 1e-3
"""What a number in an answer may differ by, relative to itself where it exceeds 1: recorded outputs are rounded."""


@dataclass(frozen=True)
class Check:
    """Outcome for one model file: ``worst`` |difference| of an output, or why it was not run."""

    file: str
    runtime: str | None
    cases: int
    worst: float | None
    tolerance: float


@dataclass(frozen=True)
class _Case:
    place: str
    example: dict[str, str]
    inputs: list[Encoding]
    outputs: dict[str, list[dict[str, np.ndarray]]]
    answers: dict[str, dict[str, Any]]


def verify(folder: Path) -> tuple[int, list[Check]]:
    """Check a bundle.

    Returns:
        Files compared with their checksum, and one :class:`Check` per model file.

    Raises:
        IntegrityError: naming the first file, token, output or answer that differs, or the file over which a runtime ended its process.
    """
    bundle = open_bundle(folder)
    files = check_sums(bundle.folder)
    for entry in bundle.models:
        bundle.check_file(entry)
    decoder = bundle.decoder()
    recorded = list(bundle.golden_cases())
    formats = installed_formats()
    runs = run_golden(bundle, [entry for entry in bundle.models if entry.runs_on(formats)], recorded)
    encoder = bundle.text_encoder()
    cases = [_read_case(bundle, decoder, encoder, number, case) for number, case in enumerate(recorded, start=1)]
    checks = []
    for entry in bundle.models:
        for case in cases:
            _check_answer(decoder, entry, case)
        if not entry.runs_on(formats):
            checks.append(Check(entry.file, None, 0, None, entry.tolerance))
            continue
        run = runs[entry.file]
        if run.error is not None:
            raise run.error
        worst = max((_check_outputs(decoder, entry, run, number, case) for number, case in enumerate(cases)), default=0.0)
        checks.append(Check(entry.file, run.runtime, len(cases), worst, entry.tolerance))
    return files, checks


def _read_case(bundle: Bundle, decoder: Decoder, encoder: TextEncoder, number: int, case: Mapping[str, Any]) -> _Case:
    """A golden case as arrays, its inputs proven to be those that the tokenizer makes here."""
    place = f"golden case {number}"
    try:
        example = decoder.example(case["example"])
        inputs = decoder.encode(encoder, example)
    except BadInput as error:
        raise IntegrityError(f"{place}: {error}") from error
    got, expected = [(one.ids, one.types) for one in inputs], [(one["ids"], one["types"]) for one in case["inputs"]]
    for here, there in zip(got, expected, strict=False):
        if here != there:
            what = 0 if here[0] != there[0] else 1
            raise IntegrityError(f"{place}: the tokenizer gives {('ids', 'types')[what]} {here[what]}, expected {there[what]}")
    if len(got) != len(expected):
        raise IntegrityError(f"{place}: the tokenizer makes {len(got)} inputs, expected {len(expected)}")
    try:
        outputs = {
            entry.file: [{name: np.array(values, np.float64) for name, values in one.items()} for one in case["outputs"][entry.file]]
            for entry in bundle.models
        }
    except (ValueError, TypeError, OverflowError) as error:
        raise IntegrityError(f"{place}: outputs that are no arrays of numbers: {error}") from error
    for file, of_file in outputs.items():
        for name, values in ((name, values) for one in of_file for name, values in one.items()):
            if not np.isfinite(values).all():
                raise IntegrityError(f"{place}: outputs: {file}: {name} holds numbers that are not finite")
    return _Case(place, example, inputs, outputs, case["answer"])


def _check_answer(decoder: Decoder, entry: ModelEntry, case: _Case) -> None:
    place = f"{entry.file}: {case.place}"
    try:
        answer = decoder.answer(case.example, case.inputs, case.outputs[entry.file])
    except IntegrityError as error:
        raise IntegrityError(f"{place}: {error}") from error
    if not _same(answer, case.answers[entry.file]):
        raise IntegrityError(f"{place}: its outputs are decoded as {_shown(answer)}, expected {_shown(case.answers[entry.file])}")


def _check_outputs(decoder: Decoder, entry: ModelEntry, run: FileRun, number: int, case: _Case) -> float:
    """The largest |difference| that the file shows in case ``number``, counted from 0."""
    worst = 0.0
    for got, expected in zip(run.outputs[number], case.outputs[entry.file], strict=True):
        worst = max(worst, _difference(f"{entry.file}: {case.place}", run.runtime, got, expected, entry.tolerance))
        firm = decoder.margins(expected) > 2 * entry.tolerance
        if not np.array_equal(decoder.decisions(got)[firm], decoder.decisions(expected)[firm]):
            raise IntegrityError(f"{entry.file}: {case.place} has another answer on {run.runtime}")
    return worst


def _difference(place: str, runtime: str, got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float) -> float:
    if got.keys() != expected.keys():
        raise IntegrityError(f"{place}: the file gives {', '.join(sorted(got))} on {runtime}, expected {', '.join(sorted(expected))}")
    worst = 0.0
    for name, values in expected.items():
        if got[name].shape != values.shape:
            raise IntegrityError(f"{place}: {name} is {list(got[name].shape)} on {runtime}, expected {list(values.shape)}")
        difference = float(np.abs(got[name] - values).max(initial=0.0))
        if not difference <= tolerance:  # also where it is no number
            raise IntegrityError(f"{place} differs by {difference:.4g} in {name} on {runtime}, at most {tolerance:.4g} is allowed")
        worst = max(worst, difference)
    return worst


def _same(one: Any, other: Any) -> bool:
    """Whether two answers say the same: all alike but numbers with a fraction, which may differ by a rounding."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and is_finite(other):
        return abs(one - other) <= ANSWER_TOLERANCE * max(1.0, abs(one))
    return one == other


def _shown(answer: Mapping[str, Any]) -> str:
    shown = str(dict(answer))
    return shown if len(shown) <= 200 else f"{shown[:197]}..."
