"""A run as a table for the terminal, and in one sentence: what every stage cost and bought.

Table and sentence compare files on one and the same target, the first that was measured, by the primary metric of the task. The
first row is the floor: what a model without a BERT scores on the same data. What is unknown is a dash.

They measure and judge nothing: figures come from the ledger.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from io import StringIO
from typing import TYPE_CHECKING, Any

from pipeline.flow.ledger import teacher
from pipeline.flow.progress import clock
from pipeline.reports.drawing import fixed, short
from pipeline.reports.results import Shown, aim_of, primary, result_rows, value_of

if TYPE_CHECKING:
    from rich.console import Console

UNBOUNDED = 100_000  # columns of a pipe
NARROW = 120  # columns of a terminal on which titles are set in several lines, so that names have room
NEAR_THE_FLOOR = 1.0  # points; a difference that other training data of the same kind would make too

Row = dict[str, Any]


def columns(ledger: dict[str, Any]) -> dict[str, str]:
    """Key of a row -> title of its column."""
    metric = primary(ledger).heading
    return {
        "stage": "stage", "what": "what", "params": "params M", "size": "size MB", "validation": f"val {metric}", "test": f"test {metric}",
        "p50": "p50 ms", "speedup": "speed-up", "seconds": "seconds",
    }  # fmt: skip


def table_lines(ledger: dict[str, Any]) -> list[str]:
    """What :func:`print_table` prints, as lines of plain text that are as wide as they need to be."""
    from rich.console import Console

    page = StringIO()
    print_table(ledger, Console(file=page, width=UNBOUNDED, color_system=None))
    return [line.rstrip() for line in page.getvalue().splitlines()]


def print_table(ledger: dict[str, Any], console: Console | None = None) -> None:
    """The table on a terminal, standard output if None is given; then what is compared with what, and how near the floor is.

    Names wrap where it is narrow, figures never do.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else UNBOUNDED)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    titles = columns(ledger)
    for key, title in titles.items():
        is_name = key in ("stage", "what")
        title = _printable(title).replace(" ", "\n") if console.width < NARROW else _printable(title)
        table.add_column(Text(title), justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for row in rows(ledger):
        stage = row["stage"] + (" (cached)" if row["cached"] else "") if row["first"] else ""
        cells = row | {"stage": stage, "test": f"{row['test']} {row['delta'].removesuffix('-'):>5}"}
        table.add_row(*(Text(_printable(cells[key])) for key in titles))
    console.print(table, Text(_printable(caption(ledger)), style="dim"))
    near = floor_sentence(ledger)
    if near:
        console.print(Text(_printable(near)))


def rows(ledger: dict[str, Any]) -> Iterator[Row]:
    """The floor, then `result_rows` of the first target, as text; stages that report no model have a row too, so that their seconds show."""
    metric, reference, aim = primary(ledger), teacher(ledger["stages"]), aim_of(ledger)
    if ledger["floor"]:
        yield _floor_row(ledger["floor"], metric, aim)
    results = iter(result_rows(on_target(ledger, first(targets(ledger)))))
    for record in ledger["stages"]:
        made = [f"measurements: {len(record['measurements'])}"] if record["measurements"] else list(record["artifacts"])
        for index, subject in enumerate(record["subjects"] or [None]):
            raw: Row = next(results) if subject else {"name": ", ".join(made) or "-"}
            is_teacher = subject is not None and subject is reference
            yield {
                "stage": record["stage"], "cached": record["cached"], "first": index == 0, "what": raw["name"], "raw": raw,
                "teacher": is_teacher, "floor": False, "precision": subject and subject["precision"],
                "params": fixed(raw.get("unique_params"), 2, 1e6), "size": fixed(raw.get("size_bytes"), 2, 1e6),
                **_scores(metric, raw.get("validation"), raw.get("test"), None if is_teacher else aim),
                "p50": fixed(raw.get("p50_ms"), 3), "speedup": fixed(raw.get("speedup"), 1, suffix="x"),
                "seconds": fixed(record["seconds"] if index == 0 else None, 1),
            }  # fmt: skip


def caption(ledger: dict[str, Any]) -> str:
    """What the columns of the table compare, and where latency was measured."""
    reference, metric = teacher(ledger["stages"]), primary(ledger)
    direction = "" if metric.higher_is_better else ", lower is better"
    parts = [f"test: {metric.heading}, and {_difference_in(metric)} against {reference['name']}{direction}"] if reference else []
    for target in targets(ledger)[:1]:
        baseline = first(f"{m['name']} in {m['runtime']}" if m["baseline"] else None for m in measurements(ledger, target))
        parts.append(f"p50: per real test text, one thread, on {target}")
        parts.append(f"speed-up: against {baseline}" if baseline else "speed-up: no baseline was measured")
    done, reused = (sum(r["seconds"] for r in ledger["stages"] if r["cached"] is cached) for cached in (False, True))
    saved = f", {clock(reused)} saved by the cache" if reused else ""
    return "; ".join([*parts, f"time: {clock(done)} in this run{saved}"])


def headline(ledger: dict[str, Any]) -> tuple[str, Row | None]:
    """The run in a sentence, and the row it speaks of: the fastest int8 file, without latencies the smallest."""
    best, metric = best_row(ledger), primary(ledger)
    lead = "No bundle was published. " if ledger["outcome"].startswith("failed") else ""
    if best is None:
        return lead + ("Only the teacher was made." if teacher(ledger["stages"]) else "No model was made."), None
    raw, speedup = best["raw"], best["raw"]["speedup"]
    parts = [f"{short(raw['size_bytes'] / 1e6)} MB {best['precision']} {file_kind(raw['file'])}"]
    if speedup:
        parts.append(f"{short(max(speedup, 1 / speedup))}x {'faster' if speedup >= 1 else 'slower'} than the teacher")
    if best["delta"] != "-":
        parts.append(f"{best['delta']} {_difference_in(metric)} on test" + ("" if metric.higher_is_better else " (lower is better)"))
    return lead + ("Made so far: " if lead else "") + ", ".join(parts), best


def best_row(ledger: dict[str, Any]) -> Row | None:
    """The row that a headline speaks of."""
    baselines = {m["name"] for m in measurements(ledger) if m["baseline"]}
    models = [row for row in rows(ledger) if row["precision"] and not row["teacher"] and row["what"] not in baselines]
    files = [row for row in models if row["raw"]["file"]]
    pool = [row for row in files if row["precision"] != "fp32"] or files or models[-1:]
    return min(pool, key=lambda r: (r["raw"]["p50_ms"] is None, r["raw"]["p50_ms"] or 0, r["raw"]["size_bytes"]), default=None)


def floor_sentence(ledger: dict[str, Any]) -> str | None:
    """That the model of the headline is hardly better than the floor, where it is; else None."""
    best, metric, floor = best_row(ledger), primary(ledger), ledger["floor"]
    given, without = best and best["raw"]["test"], value_of(floor, "test", metric.name)
    if given is None or without is None:
        return None
    ahead = metric.lead(given, without)
    if ahead >= (NEAR_THE_FLOOR if metric.in_points else 0.0):
        return None
    figures = f"test {metric.title} {fixed(without, metric.digits)} against {fixed(given, metric.digits)} of {best['what']}"
    much = f"within {NEAR_THE_FLOOR:g} point of" if metric.in_points and abs(ahead) <= NEAR_THE_FLOOR else "better than"
    return f"A {floor['name']}, without a BERT, is {much} this model: {figures}. On this data it may be enough."


def file_kind(file: str | None) -> str:
    """Format of a file as people call it."""
    return {"tflite": "TFLite", "onnx": "ONNX"}.get(file.rpartition(".")[2], "file") if file else "PyTorch"


# --- measurements of a ledger -----------------------------------------------------------------------------------------


def targets(ledger: dict[str, Any]) -> list[str]:
    """Where the run measured, in order."""
    return list(dict.fromkeys(m["target"] for m in measurements(ledger)))


def measurements(ledger: dict[str, Any], target: str | None = None) -> list[dict[str, Any]]:
    """Those of a target; all if None."""
    return [m for record in ledger["stages"] for m in record["measurements"] if target in (None, m["target"])]


def on_target(ledger: dict[str, Any], target: str | None) -> dict[str, Any]:
    """The ledger with the measurements of this target only."""
    return ledger | {"stages": [r | {"measurements": measurements({"stages": [r]}, target)} for r in ledger["stages"]]}


def first(values: Iterable[Any]) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


# --- cells ------------------------------------------------------------------------------------------------------------


def _floor_row(floor: dict[str, Any], metric: Shown, aim: float | None) -> Row:
    unknown = dict.fromkeys(("params", "size", "p50", "speedup"), "-")
    values = {split: value_of(floor, split, metric.name) for split in ("validation", "test")}
    return unknown | {
        "stage": "floor", "cached": False, "first": True, "what": floor["name"], "raw": {"name": floor["name"], "file": None} | values,
        "teacher": False, "floor": True, "precision": None, **_scores(metric, values["validation"], values["test"], aim),
        "seconds": fixed(floor.get("seconds"), 1),
    }  # fmt: skip


def _scores(metric: Shown, validation: float | None, test: float | None, aim: float | None) -> dict[str, str]:
    """Cells of the metric; ``delta`` is the change from ``aim``, a dash where there is nothing to compare."""
    known = test is not None and aim is not None
    delta = f"{round(test - aim, metric.digits) + 0.0:+.{metric.digits}f}" if known else "-"  # + 0.0: no -0.0
    return {"validation": fixed(validation, metric.digits), "test": fixed(test, metric.digits), "delta": delta}


def _difference_in(metric: Shown) -> str:
    return "points" if metric.in_points else metric.title


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
