"""The report page and the terminal table, from ledgers written by hand."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.reports.drawing import NARROW, WIDE, short, typeset
from pipeline.reports.results import check_ledger, metrics, read_ledger, result_rows
from pipeline.reports.run_report import conditions, view, write_report
from pipeline.reports.run_table import floor_sentence, headline, print_table, table_lines
from pipeline.reports.scatter import TALLEST, scatter
from runtimes.errors import BadInput

ACCURACY = {"name": "accuracy", "title": "accuracy", "unit": "%", "higher_is_better": True}
F1 = {"name": "f1", "title": "F1", "unit": "%", "higher_is_better": True}
LOG_LOSS = {"name": "log_loss", "title": "log loss", "unit": "", "higher_is_better": False}


def subject(
    name: str, params: int, size: int, accuracy: tuple[float, float], file: str | None = None, precision: str = "fp32"
) -> dict:
    known = {split: {"accuracy": value} for split, value in zip(("validation", "test"), accuracy, strict=True)}
    facts = {"unique_params": params, "size_bytes": size, "metrics": known, "precision": precision, "notes": []}
    return {"name": name, "file": file, **facts}


def stage(
    name: str, seconds: float, *subjects: dict, notes: tuple[str, ...] = (), measurements: tuple = (), cached: bool = False
) -> dict:
    artifacts = {name: {"folder": name, "sha256": "0" * 64}}
    return {
        "stage": name, "key": "0" * 64, "seconds": seconds, "notes": list(notes), "subjects": list(subjects),
        "measurements": list(measurements), "artifacts": artifacts, "cached": cached,
    }  # fmt: skip


def measurement(name: str, file: str, p50: float | None, length: int | None = None, threads: int = 1, **changes: Any) -> dict:
    scaled = {f"p{q}_ms": None if p50 is None else p50 * f for q, f in ((50, 1.0), (90, 1.35), (99, 1.7))}
    return {
        "name": name, "file": file, "baseline": False, "target": "local", "threads": threads, "length": length, "count": 500,
        "case": "length" if length else "texts",
        "runtime": "ai-edge-litert 2.3.0" if file.endswith("tflite") else "onnxruntime 1.31.1",
        **scaled, "mean_ms": p50 and p50 * 1.08, "quantiles_ms": [p50] * 101, "round_p50_ms": [p50] * 5,
        "noise": 0.013, "warmup_stable": threads == 1,
        "load_ms": 41.5, "first_inference_ms": 3.25,
        "memory": {"baseline_bytes": 31_000_000, "peak_bytes": 44_400_000, "model_bytes": 13_400_000},
        "conditions": {
            "cpu": {"model": "Intel Xeon, 2 cores", "features": ["avx512f", "avx512_vnni"], "governor": None, "smt": True},
            "before": {"loadavg": [0.02, 0.31] if length else [0.44, 0.3]}, "python": "3.11.2",
        },
    } | changes  # fmt: skip


@pytest.fixture
def full() -> dict[str, Any]:
    teacher = subject("MiniLM-L6 fine-tuned", 22_713_216, 90_852_864, (96.8, 96.0))
    small = subject("MobileBERT student", 2_210_000, 8_840_000, (96.1, 95.6))
    files = {
        "model.onnx": (8_990_000, 95.6, "fp32", 0.61), "model_quantized.onnx": (2_510_000, 95.4, "int8", 0.31),
        "model_fp32.tflite": (8_910_000, 95.6, "fp32", 0.55), "model_int8.tflite": (2_410_000, 95.6, "int8", 0.24),
    }  # fmt: skip
    made = {n: subject(n, 2_210_000, size, (96.0, test), n, precision) for n, (size, test, precision, _) in files.items()}
    base = subject("teacher.onnx", 22_713_216, 91_000_000, (96.8, 96.0), "teacher.onnx")
    bench = [measurement("teacher.onnx", "teacher.onnx", p50, threads=t, baseline=True) for t, p50 in ((1, 5.98), (2, 3.6))]
    for name, (_, _, _, p50) in files.items():
        bench += [measurement(name, name, p50), measurement(name, name, p50 * 0.7, threads=2)]
        bench += [measurement(name, name, p50 * n / 12, length=n, threads=t, memory=None) for n in (16, 32, 64) for t in (1, 2)]
    stages = [
        stage("finetune", 412.3, teacher, cached=True, notes=("15 texts are longer than 64 tokens and were cut",)),
        stage("prune-vocab", 3.2, subject("vocabulary pruned", 13_000_000, 52_000_000, (96.8, 96.0))),
        stage("distill-mobilebert", 1834.0, small), stage("export", 21.4, made["model.onnx"], made["model_fp32.tflite"], base),
        stage("quantize", 12.6, made["model_quantized.onnx"], made["model_int8.tflite"]),
        stage("bench", 95.0, measurements=tuple(bench)), stage("bundle", 1.1),
    ]  # fmt: skip
    gates = [
        {"gate": "metric_drop", "value": 0.8, "limit": 1.0, "unit": "points of validation accuracy"},
        {"gate": "size_mb", "value": 2.41, "limit": 4.0, "unit": "MB"},
    ]
    return {
        "format": 2, "name": "demo", "outcome": "published", "seed": 7, "stages": stages,
        "task": {"kind": "text-classification", "metrics": [ACCURACY, F1, LOG_LOSS]}, "floor": None,
        "rows": {"train": 15000, "validation": 3000, "test": 4500, "unlabeled": 0}, "libraries": {"torch": "2.13.0", "optimum": None},
        "recipe": 'name = "demo"\nseed = 7\n', "gates": [{"file": "model_int8.tflite", "ok": True} | gate for gate in gates],
    }  # fmt: skip


@pytest.fixture
def failed(full: dict[str, Any]) -> dict[str, Any]:
    gate = full["gates"][0] | {"value": 91.2, "ok": False}
    outcome = "failed: model_int8.tflite: metric_drop is 91.2 points"
    return full | {"outcome": outcome, "gates": [gate], "stages": full["stages"][:5]}


@pytest.fixture
def no_bench(full: dict[str, Any]) -> dict[str, Any]:
    return full | {"outcome": "ok", "stages": full["stages"][:5], "gates": []}


def page(ledger: dict[str, Any], folder: Path) -> str:
    write_report(ledger, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


class Plots(HTMLParser):
    """Collects the scatter plots of a page: viewBox, and each label as (text, left, top, right, bottom)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.plots: list[tuple[list[float], list[tuple[str, float, float, float, float]]]] = []
        self.label: dict[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        if tag == "svg" and values.get("class") in ("wide", "narrow"):
            self.plots.append(([float(v) for v in values["viewbox"].split()], []))
        self.label = values if tag == "text" and self.plots else None

    def handle_endtag(self, tag: str) -> None:
        self.label = None

    def handle_data(self, data: str) -> None:
        if self.label is not None and data.strip():
            size, x, y = (float(self.label[key]) for key in ("font-size", "x", "y"))
            width = 0.58 * size * len(data)
            left = x - {"start": 0.0, "middle": width / 2, "end": width}[self.label["text-anchor"]]
            self.plots[-1][1].append((data, left, y - 0.75 * size, left + width, y + 0.2 * size))


def assert_labels_are_apart(text: str, expected_plots: int) -> None:
    plots = Plots(text).plots
    assert len(plots) == expected_plots
    for (left, top, width, height), labels in plots:
        assert len(labels) > 4
        for index, (name, *box) in enumerate(labels):
            assert left <= box[0] and top <= box[1] and box[2] <= left + width and box[3] <= top + height, name
            for other, *b in labels[:index]:
                assert box[0] >= b[2] or b[0] >= box[2] or box[1] >= b[3] or b[1] >= box[3], f"{name!r} overlaps {other!r}"


def test_page_tells_every_model_and_its_figures(full: dict[str, Any], tmp_path: Path) -> None:
    text = page(full, tmp_path)
    for record in full["stages"]:
        assert record["stage"] in text
        for made in record["subjects"]:
            assert made["name"] in text
            assert f"{made['unique_params'] / 1e6:.2f}" in text and f"{made['size_bytes'] / 1e6:.2f}" in text
            assert f"{made['metrics']['test']['accuracy']:.1f}" in text
    assert "2.4 MB int8 TFLite, 24.9× faster than the teacher, −0.4 points on test" in text
    for told in ("published", "0.240", "24.9×", "412.3", "13.4", "✓ holds", "15 texts are", "2.13.0", "not installed"):
        assert told in text
    for condition in ("Intel Xeon, 2 cores", "avx512f, avx512_vnni", "not readable", "0.02 to 0.44"):
        assert condition in text


def test_page_is_self_contained_and_deterministic(full: dict[str, Any], tmp_path: Path) -> None:
    text = page(full, tmp_path)
    assert not re.search(r"https?:|src=|<link|<script|@import|url\(", text)
    (tmp_path / "again").mkdir()
    assert page(copy.deepcopy(full), tmp_path / "again") == text


def test_names_are_escaped(full: dict[str, Any], tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>&\'<svg onload=x>'
    full["stages"][4]["subjects"][1] |= {"name": evil, "notes": [evil]}
    for m in full["stages"][5]["measurements"]:
        m |= {"name": evil, "runtime": evil} if m["name"] == "model_int8.tflite" else {}
        m["conditions"] = {evil: {evil: evil}}
    full |= {"name": evil, "recipe": evil, "outcome": f"failed: {evil}", "libraries": {evil: evil}}
    full["gates"][0] |= {"file": evil, "unit": evil}
    text = page(full, tmp_path)
    assert "<script" not in text and "<svg onload" not in text
    assert text.count("&lt;script&gt;") >= 12


def test_failed_run_says_why_and_claims_nothing(failed: dict[str, Any], tmp_path: Path) -> None:
    text = page(failed, tmp_path)
    assert 'class="verdict bad"' in text and "model_int8.tflite: metric_drop is 91.2 points" in text
    assert "No bundle was published. Made so far: 2.4 MB int8 TFLite" in text and "✗ fails" in text


def test_failure_before_the_first_stage_still_renders(full: dict[str, Any], tmp_path: Path) -> None:
    empty = full | {"outcome": "failed: out of disk", "stages": [], "gates": []}
    text = page(empty, tmp_path)
    missing = ("No stage finished", "No gate was checked", "Nothing was measured", "No model was made", "No stage left a note")
    for told in ("out of disk", *missing):
        assert told in text
    assert len(table_lines(empty)) == 2


def test_page_without_bench_says_so(no_bench: dict[str, Any], tmp_path: Path) -> None:
    text = page(no_bench, tmp_path)
    assert "Nothing was measured" in text and "<svg" not in text and "no bundle stage" in text
    assert "2.4 MB int8 TFLite, −0.4 points on test" in text


def test_unknown_values_are_dashes_and_sentences(full: dict[str, Any], tmp_path: Path) -> None:
    for made in (s for r in full["stages"] for s in r["subjects"]):
        made["metrics"] = {}
    for m in full["stages"][5]["measurements"]:
        m |= dict.fromkeys(("noise", "load_ms", "first_inference_ms", "memory", "conditions", "mean_ms"))
    full["stages"][5]["measurements"][0] |= dict.fromkeys(("p50_ms", "p90_ms", "p99_ms"))
    text = page(full, tmp_path)
    assert "Without latency quantiles: teacher.onnx" in text and "Nothing to plot" in text
    assert "model_int8.tflite (no test accuracy)" in text and "carry no conditions" in text
    assert "None" not in text and "nan" not in text


def test_a_run_of_the_teacher_only(full: dict[str, Any], tmp_path: Path) -> None:
    assert "Only the teacher was made." in page(full | {"outcome": "ok", "stages": full["stages"][:1], "gates": []}, tmp_path)


def test_labels_lie_inside_and_apart(full: dict[str, Any], tmp_path: Path) -> None:
    assert_labels_are_apart(page(full, tmp_path), expected_plots=2)


def test_targets_are_never_mixed(full: dict[str, Any], tmp_path: Path) -> None:
    measured = full["stages"][5]["measurements"]
    measured += [m | {"target": "ssh:pi"} | {f"p{q}_ms": q * m["p50_ms"] for q in (50, 90, 99)} for m in measured]
    text = page(full, tmp_path)
    assert "Measured on local" in text and "Measured on ssh:pi" in text and "24.9× faster" in text
    assert "one thread, on local" in table_lines(full)[-1]
    assert_labels_are_apart(text, expected_plots=4)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("case", ["one", "same", "crowd"])
def test_crowded_plots_grow(case: str, width: int) -> None:
    crowd = [(0.1 * 1.4 ** (i % 9), 90 + i * 7 % 11 / 3) for i in range(36)]
    spread = {"one": [(0.2, 95.0)], "same": [(0.2, 95.0)] * 14, "crowd": crowd}
    point = {"size_mb": 2.0, "kind": "onnx", "detail": "0.200 ms · 95.0 % · 2.0 MB"}
    places = enumerate(spread[case])
    points = [point | {"name": f"a model with a long name {i}", "ms": ms, "value": value} for i, (ms, value) in places]
    plot = scatter(points, width)
    boxes = [p["box"] for p in plot["points"]]
    left, top, right, bottom = plot["frame"]
    assert len(boxes) == len(spread[case]) and len(plot["x_ticks"]) >= 2 and len(plot["y_ticks"]) >= 2
    for i, a in enumerate(boxes):
        assert left <= a[0] and top <= a[1] and a[2] <= right and a[3] <= bottom
        assert all(a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3] for b in boxes[:i])


def test_table_lines_are_aligned_and_tell_what_is_compared(full: dict[str, Any]) -> None:
    *lines, told = table_lines(full)
    header, shipped = lines[0], next(line for line in lines if "model_int8.tflite" in line)
    assert header.split() == "stage what params M size MB val accuracy % test accuracy % p50 ms speed-up seconds".split()
    assert shipped.split() == ["model_int8.tflite", "2.21", "2.41", "96.0", "95.6", "-0.4", "0.240", "24.9x", "-"]
    assert {len(line) for line in lines} == {len(header)}
    for title in ("size MB", "p50 ms", "speed-up"):
        end = header.index(title) + len(title)
        assert all(line[end - 1] != " " and line[end : end + 1] in (" ", "") for line in lines), title
    assert "finetune (cached)" in lines[1] and any(line.startswith("bench") and "95.0" in line for line in lines)
    assert "against teacher.onnx in onnxruntime 1.31.1" in told
    assert "one thread, on local" in told and "6:52 saved by the cache" in told


def test_terminal_table_keeps_figures_whole_and_takes_no_markup(full: dict[str, Any]) -> None:
    full["stages"][2]["subjects"][0]["name"] = "[red]student[/red] \x1b[31m:smile:"
    stream = StringIO()
    print_table(full, Console(file=stream, width=80, color_system=None))
    text = stream.getvalue()
    assert "\x1b" not in text and "[red]" in text and "24.9x" in text and "22.71" in text and "1834.0" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_table_on_a_pipe_is_as_wide_as_it_needs(full: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_table(full)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == table_lines(full)


FLOOR = {"name": "bag of words (linear model)", "metrics": {"validation": {"accuracy": 92.0}, "test": {"accuracy": 92.7}}, "seconds": 4.25}


def rescored(ledger: dict[str, Any], metric: dict[str, Any], values: dict[str, float], other: float) -> dict[str, Any]:
    """The ledger with this metric alone; ``values`` by name of the model, ``other`` for the rest."""
    made = copy.deepcopy(ledger) | {"task": {"kind": "of a test", "metrics": [metric]}}
    for one in (s for r in made["stages"] for s in r["subjects"]):
        one["metrics"] = {split: {metric["name"]: values.get(one["name"], other)} for split in ("validation", "test")}
    return made


def test_the_floor_is_the_first_row_and_has_no_size_and_no_speed(full: dict[str, Any], tmp_path: Path) -> None:
    full["floor"] = FLOOR
    first = table_lines(full)[1]
    assert first.split() == ["floor", "bag", "of", "words", "(linear", "model)", "-", "-", "92.0", "92.7", "-3.3", "-", "-", "4.2"]
    table = page(full, tmp_path).split("<tbody>")[1]
    assert table.index("bag of words (linear model)") < table.index("MiniLM-L6 fine-tuned")
    assert floor_sentence(full) is None, "95.6 is far from 92.7"
    assert len(table_lines(full)) == len(table_lines(full | {"floor": None})) + 1


@pytest.mark.parametrize(
    ("floor", "told"),
    [(95.0, "is within 1 point of this model: test accuracy 95.0 against 95.6 of model_int8.tflite"), (96.4, "within 1 point"),
     (98.0, "is better than this model: test accuracy 98.0 against 95.6"), (94.6, None), (94.5, None)],
)  # fmt: skip
def test_a_sentence_says_that_a_model_without_a_bert_would_do(full: dict[str, Any], floor: float, told: str | None, tmp_path: Path) -> None:
    full["floor"] = FLOOR | {"metrics": {"test": {"accuracy": floor}}}
    sentence = floor_sentence(full)
    assert (sentence is None) == (told is None)
    if told is not None:
        assert told in sentence and sentence in table_lines(full)[-1] and told in page(full, tmp_path)


def test_titles_and_units_are_those_of_the_task(full: dict[str, Any], tmp_path: Path) -> None:
    ledger = rescored(full, F1 | {"title": "span F1"}, {"MiniLM-L6 fine-tuned": 88.2}, 86.9)
    assert "val span F1 %" in table_lines(ledger)[0] and "test span F1 %" in table_lines(ledger)[0]
    text = page(ledger, tmp_path)
    for told in ("Test span F1", "↑ test span F1 %", "86.9 %", "−1.3 points; teacher 88.2 %", "Size, latency and span F1"):
        assert told in text
    assert "ccuracy" not in re.sub(r"<style>.*?</style>", "", text.split("<h3>Gates</h3>")[0], flags=re.DOTALL)
    assert not any("ccuracy" in line for line in table_lines(ledger))


def test_a_metric_of_which_less_is_better(full: dict[str, Any], tmp_path: Path) -> None:
    ledger = rescored(full, LOG_LOSS, {"MiniLM-L6 fine-tuned": 0.2, "model_int8.tflite": 0.25}, 0.31)
    ledger["floor"] = FLOOR | {"metrics": {"test": {"log_loss": 0.4}}}
    assert headline(ledger)[0].endswith("+0.050 log loss on test (lower is better)")
    assert "lower is better" in table_lines(ledger)[-1] and "0.250 +0.050" in "\n".join(table_lines(ledger))
    assert floor_sentence(ledger) is None
    ledger["floor"]["metrics"]["test"]["log_loss"] = 0.24
    assert "is better than this model: test log loss 0.240 against 0.250" in floor_sentence(ledger)
    (plot, _) = view(ledger)["targets"][0]["scatters"]
    heights = {p["name"]: p["y"] for p in plot["points"]}
    assert heights["model_int8.tflite"] < heights["model.onnx"], "better is higher up"
    assert len(plot["y_ticks"]) >= 2
    assert "lower values up" in page(ledger, tmp_path)


def test_correlations_without_a_unit_are_points_of_a_hundred(full: dict[str, Any]) -> None:
    spearman = {"name": "spearman", "title": "Spearman x 100", "unit": "", "higher_is_better": True}
    assert headline(rescored(full, spearman, {"MiniLM-L6 fine-tuned": 86.4}, 85.9))[0].endswith("-0.5 points on test")


def test_all_metrics_have_a_table_and_what_goes_further_unfolds(full: dict[str, Any], tmp_path: Path) -> None:
    assert "Every metric" not in page(full, tmp_path) and "more figures" not in page(full, tmp_path)
    for one in (s for r in full["stages"] for s in r["subjects"]):
        one["metrics"]["test"] |= {"f1": 94.25, "log_loss": 0.1234, "recall <on>": 91.0, "recall off": 3.0}
    assert [metric.name for metric in metrics(full)] == ["accuracy", "f1", "log_loss", "recall <on>", "recall off"]
    text = page(full, tmp_path)
    table = text.split("<h3>Every metric</h3>")[1].split("</table>")[0]
    assert "94.2" in table and "0.123" in table and "log loss (lower is better)" in table and "recall" not in table
    more = text.split("2 more figures, on test rows")[1].split("</table>")[0]
    assert "recall &lt;on&gt;" in more and ">3.0<" in more and "MiniLM-L6 fine-tuned" in more and "model_int8.tflite" in more
    assert "None" not in text and "recall" not in table_lines(full)[0]


def test_rows_for_benchmarks_have_the_primary_metric_and_all_of_them(full: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in result_rows(full)}
    shipped = rows["model_int8.tflite"]
    assert (shipped["validation"], shipped["test"], shipped["metrics"]["test"]) == (96.0, 95.6, {"accuracy": 95.6})
    assert shipped["speedup"] == pytest.approx(5.98 / 0.24)


def test_ledgers_of_another_format_are_refused(full: dict[str, Any], tmp_path: Path) -> None:
    assert check_ledger(full, "here") is full
    for found, told in ((1, "format 1, and this version reads format 2; run its recipe again"), (3, "update pocketbert"), (None, "update")):
        with pytest.raises(BadInput, match=re.escape(told)):
            check_ledger(full | {"format": found}, "here")
    with pytest.raises(BadInput, match="damaged ledger: task is missing"):
        check_ledger({key: value for key, value in full.items() if key != "task"}, "here")
    (tmp_path / "ledger.json").write_text("[]")
    with pytest.raises(BadInput, match="not a ledger"):
        read_ledger(tmp_path / "ledger.json")


def test_unsteady_measurements_are_named(full: dict[str, Any], tmp_path: Path) -> None:
    assert "Still drifting after warm-up: teacher.onnx (onnxruntime 1.31.1, 2 threads), model.onnx" in page(full, tmp_path)


def test_small_functions() -> None:
    assert [short(v) for v in (118.2, 24.08, 2.41, 0.2409)] == ["118", "24.1", "2.4", "0.241"]
    assert [typeset(v) for v in ("-", "-0.4 points", "24.1x faster")] == ["–", "−0.4 points", "24.1× faster"]
    assert typeset("int8-2 x-1 max") == "int8-2 x-1 max"
    first = {"a": {"b": 1, "c": None, "d": True}, "e": [], "f": ["performance", "performance"], "khz": [2400000, 2100000]}
    second = first | {"a": {"b": 3, "c": None, "d": [1, 2]}, "khz": [2400000, 2300000]}
    told = {"a.b": "1 to 3", "a.c": "not readable", "a.d": "yes; 1, 2", "e": "none", "f": "performance"}
    told["khz"] = "2100000 to 2400000"
    assert dict(conditions([{"conditions": first}, {"conditions": second}, {"conditions": None}])) == told


def test_a_plot_without_room_for_its_labels_still_ends():
    """Many bubbles on one spot: a crowded plot, not an endless search for a better one."""
    point = {"name": "the same place " * 2, "detail": "0.010 ms, 60.0 %, 0.1 MB", "ms": 0.01, "value": 60.0, "size_mb": 1.0}
    plot = scatter([dict(point, name=f"{point['name']}{i}") for i in range(60)], NARROW)
    assert plot["height"] <= TALLEST
    assert all("box" in p for p in plot["points"])
