"""The bench report: a bench document as one HTML page for people, and as a table for the terminal.

Every place has a section: latency per text as strips and quantile curves, thread scaling, what a length costs, memory, what
lasting load does, and the conditions. Emulated processors have a section of their own with agreement and instruction counts,
because their time says nothing about a device. Places that failed, and files that a place refused, are named with the reason.

It measures nothing; ``device_bench.comparison`` judges the files of one place against each other. What could not be read is a
dash or a sentence, never 0. The same document gives the same bytes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_bench.comparison import Comparison, Verdict, compare_files
from pipeline.reports.drawing import NARROW, WIDE, axis, clip, fixed, lines, render, score, short
from pipeline.reports.run_report import conditions
from pipeline.reports.run_table import UNBOUNDED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = {
    "target": "target", "file": "file", "threads": "threads", "p50_ms": "p50 ms", "p90_ms": "p90", "p99_ms": "p99", "against": "against first",
    "noise": "noise %", "load_ms": "load ms", "first_inference_ms": "first ms", "model_bytes": "model MB", "peak_bytes": "peak MB",
}  # fmt: skip
OFFICIAL = {
    "target": "benchmark_model", "file": "file", "threads": "threads", "length": "tokens", "p50_ms": "p50 ms", "mean_ms": "mean ms",
    "std_ms": "± ms", "init_ms": "init ms", "overall_bytes": "grows MB",
}  # fmt: skip
"""What TFLite's own binary measured; older ones print no median."""
EXPENDABLE = ("first_inference_ms", "load_ms", "model_bytes", "noise", "p99_ms")
EMULATED_CAPTION = (
    "worst: largest difference of an output from this machine's; decisions: equal ones; there and here: the task's metric; "
    "M instr.: million instructions of the median text, which are not time"
)
IDEAL, PALE = -1, -2  # lines that belong to no file
COLOURS = 6  # of lines in bench_report.html.j2; further files take them again
CURVE_PERCENTS = range(0, 100)  # the slowest inference of all is another process's doing
STRIP, STRIP_GAP = 12, 38  # pixels of a latency strip, and from one to the next

Row = dict[str, Any]


def write_bench_report(document: dict[str, Any], path: Path) -> None:
    """Write the page for a bench document (as :func:`device_bench.comparison.read_bench` gives it) to ``path``."""
    path.write_text(render("bench_report.html.j2", view(document)), encoding="utf-8", newline="\n")


def print_bench(document: dict[str, Any], console: Console | None = None) -> None:
    """Tables on a terminal, standard output if None is given: latency per text, emulated processors, what failed.

    Names wrap where it is narrow, figures never do; the columns that matter least are left out first.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else UNBOUNDED)
    timed = [cells for target in document["targets"] for cells in _overview(document, target)]
    if timed:
        columns, left_out = _fitting(timed, console.width)
        console.print(_table(list(columns.values()), 2, [[cells[key] for key in columns] for cells in timed]))
        more = f"; on a wider terminal also: {', '.join(left_out)}" if left_out else ""
        console.print(Text(_caption(document) + more, style="dim"))
    official = [cells for target in document["targets"] for cells in _official(target)]
    if official:
        console.print("", _table(list(OFFICIAL.values()), 2, [[cells[key] for key in OFFICIAL] for cells in official]), sep="\n")
    emulated = [row for target in document["targets"] for row in _emulated_rows(target)]
    if emulated:
        header = ["emulated", "file", "worst", "tolerance", "decisions", "there", "here", "M instr."]
        console.print(*([""] if timed else []), _table(header, 2, [_emulated_cells(row) for row in emulated]), sep="\n")
        console.print(Text(EMULATED_CAPTION, style="dim"))
    for failure in _failures(document):
        console.print(Text(_clean(f"{failure['who']}: {failure['message']}"), style="red"))
    if not timed and not emulated:
        console.print("nothing was measured")


def _fitting(rows: list[dict[str, str]], width: int) -> tuple[dict[str, str], list[str]]:
    """(columns that fit beside names of 14 characters, titles of those that do not)."""
    columns, left_out = dict(COLUMNS), []
    for key in EXPENDABLE:
        figures = sum(1 + max(len(title), *(len(row[k]) for row in rows)) for k, title in columns.items() if k not in ("target", "file"))
        if figures + 2 * 15 <= width:
            break
        left_out.append(columns.pop(key))
    return columns, left_out


def _table(header: list[str], names: int, rows: list[list[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index < names else "right", no_wrap=index >= names, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_clean(cell)) for cell in row))
    return table


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def view(document: dict[str, Any]) -> dict[str, Any]:
    """Everything the template shows."""
    names = dict.fromkeys(_file(row) for target in document["targets"] for row in [*target["measurements"], *target["sustained"]])
    colours = {name: number % COLOURS for number, name in enumerate(names)}
    timed = [target for target in document["targets"] if target["measurements"]]
    emulated = [row for target in document["targets"] for row in _emulated_rows(target)]
    failures = _failures(document)
    return {
        "document": document, "headline": headline(document), "failures": failures, "caption": _caption(document),
        "overview": [cells for target in timed for cells in _overview(document, target)], "columns": COLUMNS,
        "targets": [_target_view(document, target, colours) for target in timed],
        "emulated": emulated, "agreement": [row for row in emulated if row["agreement"]], "counted": [row for row in emulated if row["total"]],
        "classes": list(dict.fromkeys(key for row in emulated for key in row["by_class"])),
    }  # fmt: skip


def headline(document: dict[str, Any]) -> str:
    """The measurement in a sentence."""
    parts = []
    for target in document["targets"]:
        texts = _plain_texts(target)
        if texts:
            best = min(texts, key=lambda row: row["p50_ms"])
            parts.append(f"{target['name']}: {_file(best)}, {short(best['p50_ms'])} ms per text")
    if parts:
        return "Fastest at p50. " + "; ".join(parts) + "."
    counted = sum(bool(target["instructions"] or target["agreement"]) for target in document["targets"])
    return f"Nothing was timed; {counted} emulated processor{'s' * (counted != 1)} ran the files." if counted else "Nothing was measured."


def _caption(document: dict[str, Any]) -> str:
    tier = f"tier {document['tier']}, " if document.get("tier") else ""
    where = {"golden cases": " of the bundle's golden cases"}.get(document.get("texts_from", ""), "")
    return (
        f"p50, p90, p99: ms per text; {document['texts']} texts{where}, {tier}{document['rounds']} rounds in turns; against first: change of the "
        "typical text from the place's first file, where it is more than noise; noise: spread of p50 between rounds; memory: on one thread"
    )


def _measured(target: dict[str, Any]) -> list[Row]:
    """Rows of a place without the second measurement of its first file, which only tells the noise."""
    return [row for row in target["measurements"] if not row.get("repeat")]


def _file(row: Row) -> str:
    return row["file"] or row["name"]


def _plain_texts(target: dict[str, Any]) -> list[Row]:
    """One row a file: texts at the fewest threads."""
    texts = [row for row in _measured(target) if row["case"] == "texts"]
    fewest: dict[str, Row] = {}
    for row in sorted(texts, key=lambda row: row["threads"]):
        fewest.setdefault(row["name"], row)
    return [row for row in texts if fewest[row["name"]] is row]


def _overview(document: dict[str, Any], target: dict[str, Any]) -> list[dict[str, str]]:
    """A line of text cells for every file and thread count of a place."""
    judged = {(one.file, one.threads): one for one in compare_files(document | {"targets": [target]}) if one.case == "texts"}
    return [
        {
            "target": target["name"], "file": _file(row), "threads": str(row["threads"]),
            **{key: fixed(row[key], 3) for key in ("p50_ms", "p90_ms", "p99_ms", "first_inference_ms")},
            "load_ms": fixed(row["load_ms"], 1), "noise": fixed(row["noise"], 1, 0.01),
            "against": _told(judged.get((_file(row), row["threads"]))),
            **{key: fixed((row["memory"] or {}).get(key), 1, 1e6) for key in ("model_bytes", "peak_bytes")},
        }
        for row in _measured(target)
        if row["case"] == "texts"
    ]  # fmt: skip


def _official(target: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "target": target["name"], "file": row["file"], "threads": str(row["threads"]), "length": str(row["length"]),
            **{key: fixed(row[key], 3) for key in ("p50_ms", "mean_ms", "std_ms", "init_ms")},
            "overall_bytes": fixed((row["memory"] or {}).get("overall_bytes"), 1, 1e6),
        }
        for row in target.get("benchmark_model", ())
    ]  # fmt: skip


def _told(judged: Comparison | None) -> str:
    if judged is None or judged.change is None:
        return "-"
    return f"{100 * judged.change:+.1f} %" if judged.verdict != Verdict.NOT_SEEN else "no difference"


def _failures(document: dict[str, Any]) -> list[dict[str, str]]:
    """Places without an answer, and files that a place refused."""
    found = []
    for target in document["targets"]:
        told = [(target["name"], target["error"])] if target["error"] is not None else []
        told += [(f"{target['name']}: {refused['file']}", refused["error"]) for refused in target.get("refused", ())]
        for who, error in told:
            found.append({"who": who, "kind": error["kind"], "message": error["message"].removeprefix(f"{target['name']}: ")})
    return found


# --- emulated -----------------------------------------------------------------------------------------------------


def _emulated_rows(target: dict[str, Any]) -> list[dict[str, Any]]:
    """Agreement and instruction counts of each file, whichever of the two are there."""
    agreement = {one["file"]: one for one in target["agreement"]}
    counts = {one["file"]: one for one in target["instructions"]}
    return [
        {
            "target": target["name"], "file": file, "agreement": agreement.get(file), "total": counts.get(file, {}).get("total_per_text"),
            "by_class": counts.get(file, {}).get("by_class") or {}, "texts": counts.get(file, {}).get("texts"),
        }
        for file in dict.fromkeys([*agreement, *counts])
    ]  # fmt: skip


def _emulated_cells(row: dict[str, Any]) -> list[str]:
    found = row["agreement"] or {}
    decisions = f"{found['same_decisions']}/{found['decisions']}" if found.get("decisions") else "-"
    worst = "same bits" if found.get("same_bits") else "-" if found.get("worst_difference") is None else f"{found['worst_difference']:.3g}"
    tolerance = "-" if found.get("tolerance") is None else f"{found['tolerance']:.3g}"
    scores = [score(found.get(key)) for key in ("scores", "scores_here")]
    return [row["target"], row["file"], worst, tolerance, decisions, *scores, fixed(row["total"], 3, 1e6)]




# --- one place ----------------------------------------------------------------------------------------------------


def _target_view(document: dict[str, Any], target: dict[str, Any], colours: dict[str, int]) -> dict[str, Any]:
    rows = _measured(target)
    texts = [row for row in rows if row["case"] == "texts"]
    curves = _plain_texts(target)
    names = list(dict.fromkeys(_file(row) for row in rows))
    return {
        "name": target["name"], "legend": [(name, colours[name]) for name in names],
        "strips": [strips(texts, colours, width) for width in (WIDE, NARROW)] if texts else [],
        "curves": [quantile_curves(curves, colours, width) for width in (WIDE, NARROW)] if curves else [],
        "repeats": _repeat_notes(target), "restless": [_setup(row) for row in texts if row.get("warmup_stable") is False],
        "threads": _thread_scaling(texts, colours), "buckets": _bucket_costs(rows, colours), "memory": _memory(rows),
        "official": _official(target), "official_columns": OFFICIAL,
        "sustained": [_sustained(one, colours) for one in target["sustained"] if one["windows"]],
        **_conditions(rows),
    }  # fmt: skip


def _conditions(rows: Sequence[Row]) -> dict[str, Any]:
    """What the place said of itself, and the names of what it did not say."""
    told = conditions([{"conditions": _spelled(row["conditions"] or {})} for row in rows])
    return {
        "conditions": [(key, value) for key, value in told if value != "not readable"],
        "unreadable": [key for key, value in told if value == "not readable"],
    }  # fmt: skip


def _spelled(known: dict[str, Any]) -> dict[str, Any]:
    """Conditions with clusters of cores in words."""
    if not known.get("clusters"):
        return known
    clusters = []
    for cluster in known["clusters"]:
        parts = ["cores " + " ".join(map(str, cluster["cores"]))]
        parts += [f"capacity {cluster['capacity']}"] if cluster["capacity"] is not None else []
        parts += [f"{cluster['max_frequency_khz'] / 1e6:g} GHz"] if cluster["max_frequency_khz"] is not None else []
        clusters.append(" · ".join(parts))
    return known | {"clusters": "; ".join(clusters)}


def _setup(row: Row) -> str:
    return f"{_file(row)}, {row['threads']} thread{'s' * (row['threads'] != 1)}"


def _repeat_notes(target: dict[str, Any]) -> list[str]:
    """What the first file and its second measurement in the same rounds differ by at p50."""
    first = {(row["file"], row["threads"], row["case"], row["length"]): row for row in _measured(target)}
    notes = []
    for row in target["measurements"]:
        twin = first.get((row["file"], row["threads"], row["case"], row["length"]))
        if row.get("repeat") and row["case"] == "texts" and twin is not None:
            notes.append(f"{_setup(row)}: {100 * (row['p50_ms'] / twin['p50_ms'] - 1):+.1f} %")
    return notes


def strips(texts: Sequence[Row], colours: dict[str, int], width: int) -> dict[str, Any]:
    """A strip for each file and thread count: p1 to p99 as a line, p25 to p75 as a box, p50 and p90 as marks, over log latency."""
    left, right, top = 6.0, width - 6.0, 8.0
    quantiles = [row["quantiles_ms"] for row in texts]
    x = axis((value for one in quantiles for value in (one[1], one[99])), left, right, log=True)
    rows = []
    for number, (row, one) in enumerate(zip(texts, quantiles, strict=True)):
        every = " · ".join(f"{row[key]:.3f}" for key in ("p50_ms", "p90_ms", "p99_ms")) + " ms"
        figures = every if width == WIDE else f"{row['p50_ms']:.3f} ms"
        y = top + number * STRIP_GAP + 14
        rows.append({
            "y": y, "label": clip(_setup(row), 12, width - 12 - 7 * len(figures)), "figures": figures, "full": f"{_setup(row)}: {every}",
            "colour": colours[_file(row)], **{f"q{q}": x.at(one[q]) for q in (1, 25, 50, 75, 90, 99)},
        })  # fmt: skip
    bottom = top + len(rows) * STRIP_GAP + 4
    return {
        "width": width, "height": bottom + 38, "frame": (left, top, right, bottom), "rows": rows, "thick": STRIP,
        "x_ticks": [(at, label) for at, label in x.ticks(9 if width == WIDE else 5) if left + 8 <= at <= right - 8],
    }  # fmt: skip


def quantile_curves(texts: Sequence[Row], colours: dict[str, int], width: int) -> dict[str, Any]:
    """Latency over the share of inferences that took no longer; buckets and a second clock show as steps."""
    series = [(colours[_file(row)], [(q, row["quantiles_ms"][q]) for q in CURVE_PERCENTS]) for row in texts]
    titles = ("share of inferences, % →", "↑ latency, ms (log scale)")
    return lines((width, 340), series, titles, log=(False, True), x_values=(0, 10, 25, 50, 75, 90, 99))


def _thread_scaling(texts: Sequence[Row], colours: dict[str, int]) -> dict[str, Any] | None:
    """p50 by thread count and the speed-up against the fewest; None if no file ran at two counts."""
    counts = sorted({row["threads"] for row in texts})
    by_file: dict[str, dict[int, float]] = {}
    for row in texts:
        by_file.setdefault(_file(row), {})[row["threads"]] = row["p50_ms"]
    several = {name: found for name, found in by_file.items() if len(found) > 1}
    if not several:
        return None
    table = [(name, [(found.get(n), found[min(found)] / found[n] if n in found else None) for n in counts]) for name, found in several.items()]
    series = [(colours[name], [(n, found[min(found)] / found[n]) for n in sorted(found)]) for name, found in several.items()]
    ideal, titles = [(n, n / counts[0]) for n in counts], ("threads →", "↑ times the speed of the fewest threads")
    return {
        "counts": counts, "table": table,
        "plots": [
            lines((width, 300), [*series, (IDEAL, ideal)], titles, zero=(False, True), x_values=counts, dots=True) for width in (WIDE, NARROW)
        ],
    }  # fmt: skip


def _bucket_costs(rows: Sequence[Row], colours: dict[str, int]) -> dict[str, Any] | None:
    """p50 by fixed length at the fewest threads of each file; None where no length was measured."""
    fixed_lengths = [row for row in rows if row["case"] == "length"]
    if not fixed_lengths:
        return None
    lengths = sorted({row["length"] for row in fixed_lengths})
    setups: dict[tuple[str, int], dict[int, float]] = {}
    for row in fixed_lengths:
        setups.setdefault((_file(row), row["threads"]), {})[row["length"]] = row["p50_ms"]
    fewest = {name: min(threads for other, threads in setups if other == name) for name, _ in setups}
    series = [(colours[name], sorted(found.items())) for (name, threads), found in setups.items() if threads == fewest[name]]
    drawn = len(lengths) > 1
    titles = ("tokens →", "↑ p50, ms")
    return {
        "lengths": lengths, "table": [(name, threads, [found.get(n) for n in lengths]) for (name, threads), found in setups.items()],
        "plots": [lines((width, 300), series, titles, zero=(True, True), x_values=lengths, dots=True) for width in (WIDE, NARROW)] if drawn else [],
    }  # fmt: skip


def _memory(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Resident bytes of each file: the process before the model was loaded, what the model adds, the peak; shares of the largest peak."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["memory"] and None not in (row["memory"]["baseline_bytes"], row["memory"]["peak_bytes"]):
            found.setdefault(_file(row), row["memory"])
    most = max((memory["peak_bytes"] for memory in found.values()), default=0)
    return [
        {
            "name": name, **{f"{key}_mb": fixed(memory.get(f"{key}_bytes"), 1, 1e6) for key in ("baseline", "model", "peak", "pss", "dumpsys_pss")},
            "baseline": 100 * memory["baseline_bytes"] / most, "peak": 100 * memory["peak_bytes"] / most,
        }
        for name, memory in found.items()
    ]  # fmt: skip


# --- lasting load -------------------------------------------------------------------------------------------------


def _sustained(one: dict[str, Any], colours: dict[str, int]) -> dict[str, Any]:
    """Panels over minutes: p50 and p90, then temperature and clock as far as the place gives them."""
    windows = one["windows"]
    minutes = [window["at_s"] / 60 for window in windows]
    colour = colours[_file(one)]
    zones = {name for window in windows for name in window["temperatures_c"] or {}}
    hottest = max(zones, key=lambda name: max(_known(window["temperatures_c"] or {}, name) for window in windows), default=None)
    temperature = [(window["temperatures_c"] or {}).get(hottest) for window in windows]
    clocks = [[khz for khz in window["frequencies_khz"] or () if khz is not None] for window in windows]
    panels = [("latency", "↑ p50 and p90 (pale), ms", [(colour, [w["p50_ms"] for w in windows]), (PALE, [w["p90_ms"] for w in windows])])]
    missing = []
    if any(value is not None for value in temperature):
        panels.append(("temperature", f"↑ {hottest}, °C", [(colour, temperature)]))
    else:
        missing.append("temperature")
    if any(clocks):
        fastest, slowest = ([choose(each) / 1e6 if each else None for each in clocks] for choose in (max, min))
        panels.append(("clock", "↑ clock of the fastest and the slowest (pale) core, GHz", [(colour, fastest), (PALE, slowest)]))
    else:
        missing.append("clock")
    return {
        "name": _file(one), "threads": one["threads"], "told": _told_sustained(windows), "missing": missing,
        "panels": [
            (what, [_panel(title, minutes, values, width, last=number == len(panels) - 1) for width in (WIDE, NARROW)])
            for number, (what, title, values) in enumerate(panels)
        ],
    }  # fmt: skip


def _known(temperatures: dict[str, float | None], name: str) -> float:
    value = temperatures.get(name)
    return -300.0 if value is None else value


def _panel(title: str, minutes: list[float], values: list[tuple[int, list[float | None]]], width: int, last: bool) -> dict[str, Any]:
    series = [(colour, [None if v is None else (m, v) for m, v in zip(minutes, each, strict=True)]) for colour, each in values]
    return lines((width, 210), series, ("minutes →" if last else "", title))


def _told_sustained(windows: list[dict[str, Any]]) -> str:
    """What the last tenth of the time took against the first."""
    tenth = max(1, len(windows) // 10)
    start, end = (statistics.median(w["p50_ms"] for w in part) for part in (windows[:tenth], windows[-tenth:]))
    seconds = windows[-1]["at_s"]
    length = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    return f"p50 {start:.3f} ms at the start, {end:.3f} ms at the end of {length} ({100 * (end / start - 1):+.1f} %)."
