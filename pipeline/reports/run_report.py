"""The report: a ledger as one HTML page for people, and as a table for the terminal.

The page is a single file without script, fonts or addresses: it opens from a mail, a zip or a board without network,
prints, and follows the reader's light or dark mode. This file turns the ledger into text and plot geometry;
``report.html.j2`` beside it draws both, with every value escaped. Plots are laid out twice, for desks and for phones.

It measures and judges nothing: figures come from the ledger, verdicts from its gates; the same ledger gives the same
bytes. What is unknown is a dash, or a sentence that says what is missing. Table and headline compare files on one and
the same target, the first that was measured; every target has plots of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.flow.ledger import result_rows, teacher
from pipeline.flow.progress import clock
from pipeline.reports.drawing import NARROW, WIDE, Box, clip, fixed, render, short, text_width

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = {
    "stage": "stage", "what": "what", "params": "params M", "size": "size MB", "validation": "val %", "test": "test %",
    "p50": "p50 ms", "speedup": "speed-up", "seconds": "seconds",
}  # fmt: skip
TALLEST = 4000  # pixels that a plot may grow to for the sake of its labels
UNBOUNDED = 100_000  # columns of a pipe


def write_report(ledger: dict[str, Any], path: Path) -> None:
    """Write the page for ``ledger`` (the content of ``ledger.json``) to ``path``."""
    path.write_text(render("run_report.html.j2", view(ledger)), encoding="utf-8", newline="\n")


def table_lines(ledger: dict[str, Any]) -> list[str]:
    """The ledger as aligned lines of plain text, as wide as they need to be; the last says what is compared with what."""
    from rich.console import Console

    page = StringIO()
    print_table(ledger, Console(file=page, width=UNBOUNDED, color_system=None))
    return [line.rstrip() for line in page.getvalue().splitlines()]


def print_table(ledger: dict[str, Any], console: Console | None = None) -> None:
    """The same table on a terminal, standard output if None is given; names wrap where it is narrow, figures never do."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else UNBOUNDED)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for key, title in COLUMNS.items():
        is_name = key in ("stage", "what")
        table.add_column(title, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for row in rows(ledger):
        stage = row["stage"] + (" (cached)" if row["cached"] else "") if row["first"] else ""
        cells = row | {"stage": stage, "test": f"{row['test']} {row['delta'].removesuffix('-'):>5}"}
        table.add_row(*(Text("".join(c if c.isprintable() else "?" for c in cells[key])) for key in COLUMNS))
    console.print(table, Text(caption(ledger), style="dim"))


def rows(ledger: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`result_rows` of the first target as text, with a row for each stage that reports no model, so that its seconds show."""
    reference = teacher(ledger["stages"])
    results = iter(result_rows(_on(ledger, _first(targets(ledger)))))
    aim = reference["accuracy"].get("test") if reference else None
    for record in ledger["stages"]:
        made = [f"measurements: {len(record['measurements'])}"] if record["measurements"] else list(record["artifacts"])
        for index, subject in enumerate(record["subjects"] or [None]):
            raw: dict[str, Any] = next(results) if subject else {"name": ", ".join(made) or "-"}
            is_teacher, test = subject is not None and subject is reference, raw.get("test")
            yield {
                "stage": record["stage"], "cached": record["cached"], "first": index == 0, "what": raw["name"], "raw": raw,
                "teacher": is_teacher, "precision": subject and subject["precision"],
                "params": fixed(raw.get("unique_params"), 2, 1e6), "size": fixed(raw.get("size_bytes"), 2, 1e6),
                "validation": fixed(raw.get("validation"), 1), "test": fixed(test, 1),
                "delta": "-" if test is None or aim is None or is_teacher else f"{round(test - aim, 1) + 0.0:+.1f}",
                "p50": fixed(raw.get("p50_ms"), 3), "speedup": fixed(raw.get("speedup"), 1, suffix="x"),
                "seconds": fixed(record["seconds"] if index == 0 else None, 1),
            }  # fmt: skip


def caption(ledger: dict[str, Any]) -> str:
    """What the columns of the table compare, and where latency was measured."""
    reference = teacher(ledger["stages"])
    parts = [f"test: % and points against {reference['name']}"] if reference else []
    for target in targets(ledger)[:1]:
        baseline = _first(f"{m['name']} in {m['runtime']}" if m["baseline"] else None for m in _measurements(ledger, target))
        parts.append(f"p50: per real test text, one thread, on {target}")
        parts.append(f"speed-up: against {baseline}" if baseline else "speed-up: no baseline was measured")
    done, reused = (sum(r["seconds"] for r in ledger["stages"] if r["cached"] is cached) for cached in (False, True))
    return "; ".join([*parts, f"time: {clock(done)} in this run" + f", {clock(reused)} saved by the cache" * bool(reused)])


def headline(ledger: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """The run in a sentence, and the row it speaks of: the fastest int8 file, without latencies the smallest."""
    baselines = {m["name"] for m in _measurements(ledger) if m["baseline"]}
    models = [row for row in rows(ledger) if row["precision"] and not row["teacher"] and row["what"] not in baselines]
    files = [row for row in models if row["raw"]["file"]]
    pool = [row for row in files if row["precision"] != "fp32"] or files or models[-1:]
    lead = "No bundle was published. " if ledger["outcome"].startswith("failed") else ""
    if not pool:
        return lead + ("Only the teacher was made." if teacher(ledger["stages"]) else "No model was made."), None
    row = min(pool, key=lambda r: (r["raw"]["p50_ms"] is None, r["raw"]["p50_ms"] or 0, r["raw"]["size_bytes"]))
    raw, speedup = row["raw"], row["raw"]["speedup"]
    parts = [f"{short(raw['size_bytes'] / 1e6)} MB {row['precision']} {_format(raw['file'])}"]
    if speedup:
        parts.append(f"{short(max(speedup, 1 / speedup))}x {'faster' if speedup >= 1 else 'slower'} than the teacher")
    parts += [f"{row['delta']} points on test"] if row["delta"] != "-" else []
    return lead + "Made so far: " * bool(lead) + ", ".join(parts), row


def view(ledger: dict[str, Any]) -> dict[str, Any]:
    """Everything the template shows."""
    table, (sentence, best) = list(rows(ledger)), headline(ledger)
    return {
        "ledger": ledger, "rows": table, "caption": caption(ledger), "headline": sentence, "best": best,
        "teacher": _first(row if row["teacher"] else None for row in table),
        "targets": [_target_view(ledger, target) for target in targets(ledger)],
    }  # fmt: skip


def _target_view(ledger: dict[str, Any], target: str) -> dict[str, Any]:
    measured = _measurements(ledger, target)
    subjects = {s["name"]: s for r in ledger["stages"] for s in r["subjects"]}
    texts = [m for m in measured if m["case"] == "texts"]
    single = [m["name"] for m in texts if m["threads"] == 1]
    points, unplotted = [], []
    for m in (m for m in texts if m["threads"] == 1):
        accuracy = subjects[m["name"]]["accuracy"].get("test") if m["name"] in subjects else None
        if accuracy is None or not m["p50_ms"]:
            unplotted.append(f"{m['name']} ({'no test accuracy' if accuracy is None else 'no latency'})")
            continue
        size_mb, runtime = subjects[m["name"]]["size_bytes"] / 1e6, f" · {m['runtime']}" if single.count(m["name"]) > 1 else ""
        points.append({
            "name": m["name"] + runtime, "ms": m["p50_ms"], "accuracy": accuracy, "size_mb": size_mb,
            "kind": "baseline" if m["baseline"] else _format(m["file"]).lower(),
            "detail": f"{short(m['p50_ms'])} ms · {accuracy:.1f} % · {short(size_mb)} MB" + " · baseline" * m["baseline"],
        })  # fmt: skip
    timed = [m for m in texts if None not in (m["p50_ms"], m["p90_ms"], m["p99_ms"])]
    at_length = [m for m in measured if m["case"] == "length"]
    lengths = sorted({m["length"] for m in at_length})
    return {
        "name": target, "timed": timed, "untimed": [m["name"] for m in texts if m not in timed], "unplotted": unplotted,
        "scatters": [scatter(points, width) for width in (WIDE, NARROW)] if points else [], "lengths": lengths,
        "at_length": [(s, [_first(m["p50_ms"] for m in g if m["length"] == n) for n in lengths]) for s, g in by_setup(at_length)],
        "setups": [(setup, _costs(group)) for setup, group in by_setup(measured)], "conditions": conditions(measured),
    }  # fmt: skip


def by_setup(measured: list[dict[str, Any]]) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """Measurements by file, runtime and threads, in order of appearance."""
    setups = dict.fromkeys((m["name"], m["runtime"], m["threads"]) for m in measured)
    return [(setup, [m for m in measured if (m["name"], m["runtime"], m["threads"]) == setup]) for setup in setups]


def _costs(group: list[dict[str, Any]]) -> dict[str, float | None]:
    """What a setup costs beside its latency quantiles: the first reading of each."""
    found = {key: _first(m[key] for m in group if m["case"] == "texts") for key in ("count", "mean_ms", "noise")}
    found |= {key: _first(m[key] for m in group) for key in ("load_ms", "first_inference_ms")}
    return found | {k: _first((m["memory"] or {}).get(k) for m in group) for k in ("baseline_bytes", "model_bytes", "peak_bytes")}


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
    texts = [", ".join(map(str, one[:1] if one[1:] == one[:-1] else one)) for one in lists]
    return "; ".join(words.get(text, text) for text in texts)


def scatter(points: list[dict[str, Any]], width: int) -> dict[str, Any]:
    """Bubbles over log latency and accuracy. The plot grows taller until every label has a place of its own."""
    for height in range(400, TALLEST, 60):
        plot = _bubbles(points, width, height)
        if place_labels(plot["points"], plot["frame"]):
            return plot
    place_labels(plot["points"], plot["frame"], crowded=True)
    return plot


def _bubbles(points: list[dict[str, Any]], width: int, height: int) -> dict[str, Any]:
    left, top, right, bottom = frame = (44.0, 24.0, width - 4.0, height - 44.0)
    largest = 34.0 if width == WIDE else 20.0
    inner_width, inner_height = right - left - 2 * largest - 16, bottom - top - 2 * largest - 16
    heaviest, room = max(p["size_mb"] for p in points), min(right - left - 16, 260)
    low, high = (math.log10(pick(p["ms"] for p in points)) for pick in (min, max))
    worst, best = (pick(p["accuracy"] for p in points) for pick in (min, max))
    decades, reach = max(high - low, math.log10(4)), max(best - worst, 1.0)

    def x_of(ms: float) -> float:
        return (left + right) / 2 + (math.log10(ms) - (low + high) / 2) / decades * inner_width

    def y_of(accuracy: float) -> float:
        return (top + bottom) / 2 - (accuracy - (worst + best) / 2) / reach * inner_height

    x_ticks = [10.0**e * s for e in range(math.floor(low) - 2, math.ceil(high) + 3) for s in ((1, 2, 5) if decades < 2 else (1,))]
    step = next(s for s in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if reach * (bottom - top) / inner_height / s <= 7)
    y_ticks, placed = [i * step for i in range(round(100 / step) + 1)], []
    for p in sorted(points, key=lambda p: -p["size_mb"]):
        name, detail = clip(p["name"], 13, room), clip(p["detail"], 11, room)
        placed.append(p | {
            "x": x_of(p["ms"]), "y": y_of(p["accuracy"]), "r": max(2.5, largest * math.sqrt(p["size_mb"] / heaviest)),
            "label": name, "detail": detail, "label_width": max(text_width(name, 13), text_width(detail, 11)),
        })  # fmt: skip
    return {
        "width": width, "height": height, "frame": frame, "points": placed,
        "x_ticks": [(x_of(t), f"{t:g}") for t in x_ticks if left + 10 <= x_of(t) <= right - 10],
        "y_ticks": [(y_of(t), f"{t:.{int(step < 1)}f}") for t in y_ticks if top + 6 <= y_of(t) <= bottom - 6],
    }  # fmt: skip


def place_labels(points: list[dict[str, Any]], frame: Box, crowded: bool = False) -> bool:
    """Give each point a label box inside ``frame`` that touches no bubble or label; False if one finds no room.

    ``crowded`` takes the nearest box for a label without room, whatever it touches.
    """
    taken = [(p["x"] - p["r"], p["y"] - p["r"], p["x"] + p["r"], p["y"] + p["r"]) for p in points]
    labels: list[Box] = []
    for p in reversed(points):
        free = [box for box in _spots(p, frame) if not any(overlap(box, t) for t in taken)]
        if not free and not crowded:
            return False
        free = free or list(_spots(p, frame))[:1]
        clear = (box for box in free if not any(overlap(dot, label) for dot in _leader(p, box) for label in labels))
        box = next(clear, free[0])
        line = _leader(p, box)
        labels, taken = [*labels, box], [*taken, box, *line]
        anchor = "end" if box[2] <= p["x"] else "start" if box[0] >= p["x"] else "middle"
        label_x = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
        p |= {"box": box, "anchor": anchor, "label_x": label_x, "leader": (*line[0][:2], *line[-1][:2]) if line else None}
    return True


def _spots(p: dict[str, Any], frame: Box, height: float = 30.0) -> Iterator[Box]:
    """Label boxes around the bubble that lie in the frame: beside it first, then further and further off."""
    for gap in range(5, int(frame[3]), 12):
        for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), *product((1, -1, 0.5, -0.5), (-1, 1)), (1, -0.5), (-1, -0.5)):
            x = p["x"] + across * (p["r"] + gap + p["label_width"] / 2)
            if down:  # above or below, a label may lean to the side that has room
                half = p["label_width"] / 2 + 3
                x = min(max(x, frame[0] + half), frame[2] - half)
            y = p["y"] + down * (p["r"] + gap + height / 2)
            box = (x - p["label_width"] / 2, y - height / 2, x + p["label_width"] / 2, y + height / 2)
            if box[0] > frame[0] + 2 and box[1] > frame[1] and box[2] < frame[2] - 2 and box[3] < frame[3] - 2:
                yield box


def _leader(p: dict[str, Any], box: Box) -> list[Box]:
    """Dots along the line from a bubble's edge to a label that is not right beside it."""
    dx, dy = min(max(p["x"], box[0]), box[2]) - p["x"], min(max(p["y"], box[1]), box[3]) - p["y"]
    distance = math.hypot(dx, dy)
    steps = [(p["r"] + (distance - p["r"] - 3) * i / 12) / distance for i in range(13)] if distance - p["r"] > 14 else []
    return [(p["x"] + dx * t, p["y"] + dy * t, p["x"] + dx * t, p["y"] + dy * t) for t in steps]


def overlap(a: Box, b: Box, gap: float = 2.0) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def targets(ledger: dict[str, Any]) -> list[str]:
    """Where the run measured, in order."""
    return list(dict.fromkeys(m["target"] for m in _measurements(ledger)))


def _measurements(ledger: dict[str, Any], target: str | None = None) -> list[dict[str, Any]]:
    return [m for record in ledger["stages"] for m in record["measurements"] if target in (None, m["target"])]


def _on(ledger: dict[str, Any], target: str | None) -> dict[str, Any]:
    """The ledger with the measurements of this target only."""
    return ledger | {"stages": [r | {"measurements": _measurements({"stages": [r]}, target)} for r in ledger["stages"]]}


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _format(file: str | None) -> str:
    return {"tflite": "TFLite", "onnx": "ONNX"}.get(file.rpartition(".")[2], "file") if file else "PyTorch"
