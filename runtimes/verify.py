"""Prove that a bundle does here what it did where it was made: checksums, then golden cases on every runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.backends import installed_formats, load_model
from runtimes.bundle import check_sums, open_bundle
from runtimes.errors import IntegrityError
from runtimes.text import TextEncoder


@dataclass(frozen=True)
class Check:
    """Outcome for one model file: ``worst`` |logit difference|, or why it was not run."""

    file: str
    runtime: str | None
    cases: int
    worst: float | None
    tolerance: float


def verify(folder: Path) -> tuple[int, list[Check]]:
    """Check a bundle.

    Returns:
        Files compared with their checksum, and one :class:`Check` per model file.

    Raises:
        IntegrityError: naming the first file, token or logit that differs.
    """
    bundle = open_bundle(folder)
    files = check_sums(bundle.folder)
    cases = list(bundle.golden_cases())
    encoder = TextEncoder(bundle.tokenizer_file, bundle.max_length)
    for number, case in enumerate(cases, start=1):
        ids = encoder.encode(case["text"])
        if ids != case["ids"]:
            raise IntegrityError(f"golden case {number}: the tokenizer gives {ids}, expected {case['ids']}")
    formats = installed_formats()
    checks = []
    for entry in bundle.models:
        if not entry.runs_on(formats):
            checks.append(Check(entry.file, None, 0, None, entry.tolerance))
            continue
        model = load_model(bundle.path(entry), session=entry.session)
        worst = 0.0
        for number, case in enumerate(cases, start=1):
            expected = np.asarray(case["logits"][entry.file])
            got = model.logits(case["ids"])
            difference = float(np.abs(got - expected).max())
            worst = max(worst, difference)
            if not difference <= entry.tolerance:
                raise IntegrityError(
                    f"{entry.file}: golden case {number} differs by {difference:.4g} on {model.runtime}, "
                    f"at most {entry.tolerance:.4g} is allowed"
                )
            margin = np.sort(expected)[-1] - np.sort(expected)[-2]
            if margin > 2 * entry.tolerance and bundle.labels[int(got.argmax())] != case["label"][entry.file]:
                raise IntegrityError(f"{entry.file}: golden case {number} has another answer on {model.runtime}")
        checks.append(Check(entry.file, model.runtime, len(cases), worst, entry.tolerance))
    return files, checks
