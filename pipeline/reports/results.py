"""A ledger as the rows that people and benchmarks read: each model and file once, with the task's metrics and its latency.

Metrics are those of the ledger's task; the first is the primary one, which rows, headlines and plots show. A ledger is the content
of ``ledger.json``, format 2 of :mod:`pipeline.flow.ledger`.

What this file does not do: write figures as text (:mod:`pipeline.reports.run_table`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.flow.ledger import FORMAT, teacher
from runtimes.errors import BadInput

NEEDED = ("name", "outcome", "seed", "rows", "task", "floor", "libraries", "recipe", "gates", "stages")
POINTS_FROM = 10.0
"""A metric without a unit is in points of 100, as correlations are, if any of its values is as far from 0."""


class Shown(NamedTuple):
    """A metric as a report writes it.

    ``in_points``: of 100, with one decimal; others, such as a log loss, have three.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    in_points: bool

    @property
    def digits(self) -> int:
        return 1 if self.in_points else 3

    @property
    def heading(self) -> str:
        """Title and unit: ``F1 %``."""
        return f"{self.title} {self.unit}".rstrip()

    def lead(self, value: float, other: float) -> float:
        """How much better ``value`` is than ``other``."""
        return value - other if self.higher_is_better else other - value


def check_ledger(document: dict[str, Any], place: str) -> dict[str, Any]:
    """``document`` if it is a ledger that this version reads.

    Raises:
        BadInput: a ledger of another format, or a damaged one.
    """
    found = document.get("format")
    if found != FORMAT:
        older = isinstance(found, int) and found < FORMAT
        cure = "run its recipe again to make a new one" if older else "update pocketbert"
        raise BadInput(f"{place}: a ledger of format {found}, and this version reads format {FORMAT}; {cure}")
    missing = [key for key in NEEDED if key not in document]
    if missing:
        raise BadInput(f"{place}: a damaged ledger: {missing[0]} is missing")
    return document


def read_ledger(path: Path) -> dict[str, Any]:
    """The ledger in a file.

    Raises:
        BadInput: no such file, no JSON, or what :func:`check_ledger` refuses.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict) or "stages" not in document:
        raise BadInput(f"{path}: not a ledger")
    return check_ledger(document, str(path))


def metrics(ledger: dict[str, Any]) -> list[Shown]:
    """The metrics that have a value in this ledger, the primary one first, those that the task does not name last, under their own names.

    The primary one is there even if nothing was measured.
    """
    values = _values(ledger)
    known = [(m["name"], m["title"], m["unit"], m["higher_is_better"]) for m in ledger["task"]["metrics"]]
    named = {name for name, *_ in known}
    used = [known[0], *(metric for metric in known[1:] if metric[0] in values)]
    shown = [Shown(*metric, in_points=metric[2] == "%" or max(values.get(metric[0], [0.0])) >= POINTS_FROM) for metric in used]
    return shown + [Shown(name, name.replace("_", " "), "", True, in_points=True) for name in values if name not in named]


def primary(ledger: dict[str, Any]) -> Shown:
    """The metric that gates and choices look at."""
    return metrics(ledger)[0]


def result_rows(ledger: dict[str, Any]) -> list[dict[str, Any]]:
    """The ledger as the rows a person reads: each model or file once, with its latency where it was measured.

    Columns: stage, name, seconds of the stage, unique_params, size_bytes, validation and test (the primary metric), metrics (all, by
    split), p50_ms per real text on one thread of the place that was measured first, speedup against the baseline there.
    """
    texts = [m for r in ledger["stages"] for m in r["measurements"] if m["case"] == "texts" and m["threads"] == 1]
    measured = {m["name"]: m for m in texts if m["target"] == texts[0]["target"]}
    baseline = next((m["p50_ms"] for m in measured.values() if m["baseline"]), None)
    name = ledger["task"]["metrics"][0]["name"]
    rows = []
    for record in ledger["stages"]:
        for index, subject in enumerate(record["subjects"]):
            latency = measured.get(subject["name"])
            p50_ms = latency["p50_ms"] if latency else None
            rows.append({
                "stage": record["stage"], "name": subject["name"], "file": subject["file"],
                "seconds": record["seconds"] if index == 0 else None, "cached": record["cached"],
                "unique_params": subject["unique_params"], "size_bytes": subject["size_bytes"],
                **{split: value_of(subject, split, name) for split in ("validation", "test")}, "metrics": subject["metrics"],
                "p50_ms": p50_ms, "speedup": baseline / p50_ms if baseline and p50_ms else None,
            })  # fmt: skip
    return rows


def value_of(scored: dict[str, Any] | None, split: str, name: str) -> float | None:
    """A metric of a subject, or of the floor; None where it was not measured."""
    return None if scored is None else scored["metrics"].get(split, {}).get(name)


def aim_of(ledger: dict[str, Any]) -> float | None:
    """The primary metric of the teacher on test rows, which everything is compared with."""
    return value_of(teacher(ledger["stages"]), "test", ledger["task"]["metrics"][0]["name"])


def _values(ledger: dict[str, Any]) -> dict[str, list[float]]:
    """Sizes of all values of each metric, in order of appearance."""
    found: dict[str, list[float]] = {}
    scored = [subject for record in ledger["stages"] for subject in record["subjects"]]
    for one in [*scored, *([ledger["floor"]] if ledger["floor"] else [])]:
        for split in one["metrics"].values():
            for name, value in split.items():
                found.setdefault(name, []).append(abs(value))
    return found
