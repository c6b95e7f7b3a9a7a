"""The report of a run: a ledger as one HTML page for people.

The page is a single file without script, fonts or addresses: it opens from a mail, a zip or a board without network,
prints, and follows the reader's light or dark mode. This file turns the ledger into text and plot geometry;
``run_report.html.j2`` beside it draws both, with every value escaped. Plots are laid out twice, for desks and for phones.

It measures and judges nothing: figures come from the ledger, verdicts from its gates; the same ledger gives the same
bytes. What is unknown is a dash, or a sentence that says what is missing. Table and headline compare files on one and
the same target, the first that was measured; every target has plots of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.reports.drawing import NARROW, WIDE, fixed, render, short
from pipeline.reports.results import Shown, metrics, primary, value_of
from pipeline.reports.run_table import best_row, caption, columns, file_kind, first, floor_sentence, headline, measurements, rows, targets
from pipeline.reports.scatter import scatter


def write_report(ledger: dict[str, Any], path: Path) -> None:
    """Write the page for ``ledger`` (the content of ``ledger.json``) to ``path``."""
    path.write_text(render("run_report.html.j2", view(ledger)), encoding="utf-8", newline="\n")


def view(ledger: dict[str, Any]) -> dict[str, Any]:
    """Everything the template shows."""
    table, (sentence, best) = list(rows(ledger)), headline(ledger)
    return {
        "ledger": ledger, "rows": table, "columns": columns(ledger), "caption": caption(ledger), "headline": sentence, "best": best,
        "metric": primary(ledger), "near_the_floor": floor_sentence(ledger),
        "teacher": first(row if row["teacher"] else None for row in table),
        "metrics": metrics_table(ledger), "details": details(ledger), "targets": [_target_view(ledger, target) for target in targets(ledger)],
    }  # fmt: skip


def metrics_table(ledger: dict[str, Any]) -> dict[str, Any] | None:
    """Every metric that the task names, on test rows, of the floor and of every model and file; None where there is the primary alone."""
    shown = _named(ledger)
    scored = [(one["name"], one) for one in _scored(ledger) if one["metrics"].get("test")]
    if len(shown) < 2 or not scored:
        return None
    return {
        "titles": [metric.heading + ("" if metric.higher_is_better else " (lower is better)") for metric in shown],
        "rows": [(name, [fixed(value_of(one, "test", metric.name), metric.digits) for metric in shown]) for name, one in scored],
    }  # fmt: skip


def details(ledger: dict[str, Any]) -> dict[str, Any] | None:
    """What a task measures beside its metrics, such as a figure of each class, on test rows: of the floor, the teacher and the headline's file."""
    named = {metric.name for metric in _named(ledger)}
    best = best_row(ledger)
    models = [one for record in ledger["stages"] for one in record["subjects"]]
    chosen = [ledger["floor"], *models[:1], *(one for one in models[1:] if best and one["name"] == best["what"])]
    compared = [one for one in chosen if one and set(one["metrics"].get("test", ())) - named]
    extra = [metric for metric in metrics(ledger) if metric.name not in named and any(metric.name in one["metrics"]["test"] for one in compared)]
    if not extra:
        return None
    return {
        "names": [one["name"] for one in compared],
        "rows": [(metric.heading, [fixed(value_of(one, "test", metric.name), metric.digits) for one in compared]) for metric in extra],
    }  # fmt: skip


def _named(ledger: dict[str, Any]) -> list[Shown]:
    known = {metric["name"] for metric in ledger["task"]["metrics"]}
    return [metric for metric in metrics(ledger) if metric.name in known]


def _scored(ledger: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The floor, then every model and file."""
    if ledger["floor"]:
        yield ledger["floor"]
    for record in ledger["stages"]:
        yield from record["subjects"]


def _target_view(ledger: dict[str, Any], target: str) -> dict[str, Any]:
    measured, metric = measurements(ledger, target), primary(ledger)
    subjects = {s["name"]: s for r in ledger["stages"] for s in r["subjects"]}
    texts = [m for m in measured if m["case"] == "texts"]
    single = [m["name"] for m in texts if m["threads"] == 1]
    points, unplotted = [], []
    for m in (m for m in texts if m["threads"] == 1):
        value = value_of(subjects.get(m["name"]), "test", metric.name)
        if value is None or not m["p50_ms"]:
            unplotted.append(f"{m['name']} (no {'test ' + metric.title if value is None else 'latency'})")
            continue
        size_mb, runtime = subjects[m["name"]]["size_bytes"] / 1e6, f" · {m['runtime']}" if single.count(m["name"]) > 1 else ""
        parts = [f"{short(m['p50_ms'])} ms", f"{fixed(value, metric.digits)} {metric.unit}".rstrip(), f"{short(size_mb)} MB"]
        points.append({
            "name": m["name"] + runtime, "ms": m["p50_ms"], "value": value, "size_mb": size_mb,
            "kind": "baseline" if m["baseline"] else file_kind(m["file"]).lower(),
            "detail": " · ".join([*parts, *(["baseline"] if m["baseline"] else [])]),
        })  # fmt: skip
    timed = [m for m in texts if None not in (m["p50_ms"], m["p90_ms"], m["p99_ms"])]
    at_length = [m for m in measured if m["case"] == "length"]
    lengths = sorted({m["length"] for m in at_length})
    return {
        "name": target, "timed": timed, "untimed": [m["name"] for m in texts if m not in timed], "unplotted": unplotted,
        "scatters": [scatter(points, width, metric.higher_is_better) for width in (WIDE, NARROW)] if points else [], "lengths": lengths,
        "at_length": [(s, [first(m["p50_ms"] for m in g if m["length"] == n) for n in lengths]) for s, g in by_setup(at_length)],
        "setups": [(setup, _costs(group)) for setup, group in by_setup(measured)], "conditions": conditions(measured),
    }  # fmt: skip


def by_setup(measured: list[dict[str, Any]]) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Measurements by file, runtime and threads, in order of appearance."""
    setups = dict.fromkeys((m["name"], m["runtime"], m["threads"]) for m in measured)
    return [(setup, [m for m in measured if (m["name"], m["runtime"], m["threads"]) == setup]) for setup in setups]


def _costs(group: list[dict[str, Any]]) -> dict[str, float | None]:
    """What a setup costs beside its latency quantiles: the first reading of each."""
    found = {key: first(m[key] for m in group if m["case"] == "texts") for key in ("count", "mean_ms", "noise")}
    found |= {key: first(m[key] for m in group) for key in ("load_ms", "first_inference_ms")}
    return found | {k: first((m["memory"] or {}).get(k) for m in group) for k in ("baseline_bytes", "model_bytes", "peak_bytes")}


def conditions(measured: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Conditions by dotted name; where measurements differ, each value, or the range of numbers."""
    seen: dict[str, dict[str, Any]] = {}
    for key, value in (pair for m in measured for pair in _flat(m["conditions"] or {}, "")):
        seen.setdefault(key, {})[repr(value)] = value
    return [(key, _spread(list(values.values()))) for key, values in seen.items()]


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _spread(values: list[Any]) -> str:
    lists = [value if isinstance(value, list) else [value] for value in values]
    numbers = [n for one in lists for n in one if type(n) in (int, float)]
    if len(values) > 1 and len(numbers) == sum(map(len, lists)):
        return f"{min(numbers):.10g} to {max(numbers):.10g}"
    words = {"None": "not readable", "True": "yes", "False": "no", "": "none"}
    texts = [", ".join(map(str, one[:1] if len(set(map(repr, one))) == 1 else one)) for one in lists]
    return "; ".join(words.get(text, text) for text in texts)
