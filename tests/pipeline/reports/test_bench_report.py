"""The bench page and the terminal tables, from documents written by hand."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.reports.bench_report import print_bench, quantile_curves, strips, view, write_bench_report
from pipeline.reports.drawing import NARROW, WIDE, axis, linear_ticks, lines, log_ticks

FILES = {"tflite/model_int8.tflite": 0.24, "onnx/model_quantized.onnx": 0.31, "onnx/model.onnx": 0.61}
TEXTS = 8


def row(file: str, p50: float, threads: int = 1, length: int | None = None, **changes: Any) -> dict[str, Any]:
    generator = np.random.default_rng(sum(file.encode()) + threads)
    rounds = [(p50 * np.exp(generator.normal(0, 0.02, 4 * TEXTS))).round(5).tolist() for _ in range(3)]
    quantiles = np.geomspace(0.8 * p50, 2 * p50, 101).round(5).tolist()
    return {
        "name": file, "file": file, "baseline": False, "target": "local", "runtime": "r 1", "threads": threads, "length": length,
        "case": "length" if length else "texts",
        "tokens_mean": 11.0, "count": 96, "p50_ms": p50, "p90_ms": 1.35 * p50, "p99_ms": 1.7 * p50, "mean_ms": 1.1 * p50,
        "min_ms": 0.8 * p50, "quantiles_ms": quantiles, "round_p50_ms": [p50] * 3, "noise": 0.013, "warmup_stable": threads == 1, "load_ms": 41.5,
        "first_inference_ms": 3.25, "memory": {"baseline_bytes": 31_000_000, "peak_bytes": 44_400_000, "model_bytes": 13_400_000, "pss_bytes": None},
        "conditions": {"cpu_model": "Cortex-A76", "governors": None, "clusters": CLUSTERS, "before": {"loadavg": [0.02]}, "after": {"throttled": 0}},
        "round_samples_ms": rounds, "repeat": False,
    } | changes  # fmt: skip


CLUSTERS = [{"cores": [0, 1], "capacity": 381, "max_frequency_khz": 1_800_000}, {"cores": [2], "capacity": 1024, "max_frequency_khz": None}]
EMPTY: dict[str, Any] = {
    "error": None, "conditions": {}, "formats": {}, "measurements": [], "refused": [], "sustained": [], "agreement": [], "instructions": [],
}  # fmt: skip


@pytest.fixture
def local() -> dict[str, Any]:
    rows = [row(file, p50 * (0.6 if threads == 2 else 1.0), threads) for file, p50 in FILES.items() for threads in (1, 2)]
    rows += [row(file, p50 * length / 12, threads, length) for file, p50 in FILES.items() for threads in (1, 2) for length in (16, 32, 64)]
    first = next(iter(FILES))
    rows.append(row(first, 0.25, name=f"{first} (again)", repeat=True))
    window = {"count": 90, "p90_ms": 0.3, "frequencies_khz": [1_800_000, 2_400_000]}
    windows = [window | {"at_s": 6.0 * i, "p50_ms": 0.24 + 0.002 * i, "temperatures_c": {"cpu": 50.0 + i, "skin": 30.0}} for i in range(50)]
    windows[20] |= {"temperatures_c": {"cpu": None, "skin": None}, "frequencies_khz": None}
    sustained = {"name": first, "file": first, "threads": 1, "windows": windows}
    return EMPTY | {"name": "local", "on": "local", "emulated": False, "measurements": rows, "sustained": [sustained]}


@pytest.fixture
def emulated() -> dict[str, Any]:
    file = "onnx/model_quantized.onnx"
    agreement = {"file": file, "texts": 35, "worst_difference": 0.0, "tolerance": 0.5, "same_bits": True, "inputs": 35, "decisions": 35}
    agreement["same_decisions"] = 35
    unknown, known = (
        {"scores": there and {"f1": there}, "scores_here": here and {"f1": here}} for there, here in ((None, None), (95.25, 95.5))
    )
    other = agreement | known | {"file": "onnx/model.onnx", "worst_difference": 0.75, "same_bits": False}
    by_class = {"load_store": 72_000_000, "dot": 84_900_000}
    count = {"file": file, "texts": 16, "total_per_text": 217_241_407, "totals": [217_241_407], "by_class": by_class}
    return EMPTY | {"name": "qemu:cortex-a76", "emulated": True, "agreement": [agreement | unknown, other], "instructions": [count]}


@pytest.fixture
def failed() -> dict[str, Any]:
    message = "adb:X <unauthorised> & offline; unlock the phone"
    return EMPTY | {"name": "adb:X", "emulated": False, "error": {"kind": "TargetUnreachable", "message": f"adb:X: {message}", "exit_code": 4}}


def document(*targets: dict[str, Any], **changes: Any) -> dict[str, Any]:
    known = {"format": "pocketbert bench 2", "bundle": {"name": "demo", "files": []}, "tier": "quick", "rounds": 3, "texts": TEXTS, "inputs": TEXTS}
    return known | {"texts_from": "golden cases", "targets": list(targets)} | changes


def page(folder: Path, *targets: dict[str, Any]) -> str:
    write_bench_report(document(*targets), folder / "bench.html")
    return (folder / "bench.html").read_text(encoding="utf-8")


def printed(width: int, *targets: dict[str, Any]) -> str:
    stream = StringIO()
    print_bench(document(*targets), Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def section(text: str, title: str) -> str:
    return text.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


class Shapes(HTMLParser):
    """Every coordinate of every plot, with the size of its plot."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.box: list[float] = []
        self.found: list[tuple[list[float], float, float]] = []
        self.polylines: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        if tag == "svg":
            self.box = [float(value) for value in values["viewbox"].split()]
        for x, y in (("x", "y"), ("x1", "y1"), ("x2", "y2"), ("cx", "cy")):
            if x in values:
                self.found.append((self.box, float(values[x]), float(values[y])))
        if tag == "polyline":
            self.polylines.append((values["class"], values["points"]))
            self.found += [(self.box, *map(float, point.split(","))) for point in values["points"].split()]


def test_the_page_is_one_file_that_asks_for_nothing(local, emulated, failed, tmp_path):
    text = page(tmp_path, local, emulated, failed)
    for outside in ("http:", "https:", "src=", "<script", "@import", "url(", "<link"):
        assert outside not in text
    assert "None" not in text and "nan" not in re.sub(r"\w*nan\w+", "", text)
    first = (tmp_path / "bench.html").read_bytes()
    page(tmp_path, local, emulated, failed)
    assert (tmp_path / "bench.html").read_bytes() == first


def test_every_shape_lies_in_its_plot(local, tmp_path):
    shapes = Shapes(page(tmp_path, local))
    assert len(shapes.found) > 1000
    for (left, top, width, height), x, y in shapes.found:
        assert left <= x <= left + width and top <= y <= top + height


def test_one_table_compares_places_and_files(local, tmp_path):
    other = copy.deepcopy(local) | {"name": "ssh:pi"}
    table = section(page(tmp_path, local, other), "Latency per text, everywhere")
    for place in ("local", "ssh:pi"):
        assert table.count(f'<td class="stage">{place}</td>') == 6
    assert "0.240" in table and "0.186" in table
    assert "(again)" not in table
    told = view(document(local))["overview"]
    assert [cells["against"] for cells in told[:2]] == ["-", "-"]
    assert float(told[2]["against"].removesuffix(" %")) == pytest.approx(100 * (0.31 / 0.24 - 1), abs=3)


def test_a_difference_within_noise_is_not_shown_as_one(local):
    local["measurements"] = [row("a.onnx", 0.3), row("b.onnx", 0.301)]
    assert view(document(local))["overview"][1]["against"] == "no difference"


def test_emulated_processors_have_a_table_of_their_own_without_time(local, emulated, tmp_path):
    text = page(tmp_path, local, emulated)
    table = section(text, "Emulated processors")
    assert "217.241" in table and "84.900" in table and "same bits" in table and "95.25" in table and "35 of 35" in table
    assert not re.search(r"\d ?ms\b", table) and " ms" not in table
    assert 'class="n fails" data-label="worst difference">0.75<' in table
    assert "<h2>qemu:cortex-a76</h2>" not in text and "qemu" not in section(text, "Latency per text, everywhere")
    assert "1 emulated processor ran the files" in page(tmp_path, emulated)


def test_what_failed_is_named_with_its_reason_and_escaped(local, failed, tmp_path):
    local["refused"] = [{"file": "big.onnx", "error": {"kind": "OutOfMemory", "message": "local: out of memory", "exit_code": 4}}]
    text = page(tmp_path, local, failed)
    table = section(text, "What failed")
    assert "adb:X &lt;unauthorised&gt; &amp; offline; unlock the phone" in table and "local: big.onnx" in table and ">out of memory<" in table
    assert 'class="verdict bad"' in text and "2 failures" in text
    alone = page(tmp_path, failed)
    assert "Nothing was measured." in alone and "Nothing was timed." in alone and "<svg" not in alone


def test_a_place_without_extras_says_what_is_missing(tmp_path):
    bare = EMPTY | {"name": "local", "emulated": False, "measurements": [row("a.onnx", 0.3, memory=None, noise=None, conditions={})]}
    text = page(tmp_path, bare)
    for told in ("No file ran with two", "No fixed lengths", "Memory was not measured", "bench --sustained MINUTES", "carry no conditions"):
        assert told in text
    assert "every one answered" in text and "0.0 MB" not in text


def test_conditions_tell_what_could_not_be_read(local, tmp_path):
    text = page(tmp_path, local)
    assert "Not readable here: governors." in text
    assert "cores 0 1 · capacity 381 · 1.8 GHz; cores 2 · capacity 1024" in text
    assert "Still drifting after warm-up: tflite/model_int8.tflite, 2 threads" in text
    assert "against itself in the same rounds, p50: tflite/model_int8.tflite, 1 thread: +4.2 %" in text


def test_strips_are_in_order_on_a_log_axis(local):
    texts = [r for r in local["measurements"] if r["case"] == "texts" and not r["repeat"]]
    colours = {file: number for number, file in enumerate(FILES)}
    for width in (WIDE, NARROW):
        plot = strips(texts, colours, width)
        left, _, right, _ = plot["frame"]
        for one in plot["rows"]:
            places = [one[f"q{q}"] for q in (1, 25, 50, 75, 90, 99)]
            assert places == sorted(places) and left <= places[0] and places[-1] <= right
        twice = [one["q50"] for one in plot["rows"]]
        assert twice[0] - twice[1] == pytest.approx(twice[2] - twice[3], abs=0.1)  # both 1 / 0.6


def test_quantile_curves_never_fall(local):
    plot = quantile_curves(local["measurements"][:1], {next(iter(FILES)): 0}, WIDE)
    heights = [float(point.split(",")[1]) for point in plot["paths"][0][1].split()]
    assert len(heights) == 100 and heights == sorted(heights, reverse=True)


def test_threads_and_lengths(local):
    target = view(document(local))["targets"][0]
    assert target["threads"]["counts"] == [1, 2]
    assert target["threads"]["table"][0] == ("tflite/model_int8.tflite", [(0.24, 1.0), (0.144, pytest.approx(1 / 0.6))])
    assert target["buckets"]["lengths"] == [16, 32, 64]
    assert target["buckets"]["table"][0] == ("tflite/model_int8.tflite", 1, [pytest.approx(0.24 * n / 12) for n in (16, 32, 64)])
    assert len(target["buckets"]["plots"][0]["paths"]) == len(FILES)  # the fewest threads alone


def test_memory_bars_are_shares_of_the_largest_peak(local):
    local["measurements"][0]["memory"] = {"baseline_bytes": 10e6, "peak_bytes": 22.2e6, "model_bytes": 12.2e6, "pss_bytes": 9e6}
    bars = view(document(local))["targets"][0]["memory"]
    assert [bar["peak"] for bar in bars] == [pytest.approx(50), 100, 100]
    assert (bars[0]["baseline"], bars[0]["pss_mb"], bars[1]["pss_mb"]) == (pytest.approx(100 * 10 / 44.4), "9.0", "-")


def test_lasting_load_leaves_gaps_where_nothing_was_read(local):
    (one,) = view(document(local))["targets"][0]["sustained"]
    assert [what for what, _ in one["panels"]] == ["latency", "temperature", "clock"]
    latency, temperature, clock = (plots[0] for _, plots in one["panels"])
    assert len(latency["paths"]) == 2 and latency["titles"] == ("", "↑ p50 and p90 (pale), ms")
    assert len(temperature["paths"]) == 2 and "cpu, °C" in temperature["titles"][1]  # one zone, the hottest, in two pieces
    assert len(clock["paths"]) == 4 and clock["titles"][0] == "minutes →"
    assert one["told"] == "p50 0.244 ms at the start, 0.334 ms at the end of 5 minutes (+36.9 %)."
    for window in local["sustained"][0]["windows"]:
        window |= {"temperatures_c": None, "frequencies_khz": None}
    (one,) = view(document(local))["targets"][0]["sustained"]
    assert one["missing"] == ["temperature", "clock"] and len(one["panels"]) == 1


def test_more_files_than_colours(tmp_path):
    rows = [row(f"{number}.onnx", 0.1 + number) for number in range(8)]
    text = page(tmp_path, EMPTY | {"name": "local", "emulated": False, "measurements": rows})
    assert 'class="curve c5"' in text and "c6" not in re.findall(r'class="curve (\w+)"', text)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_terminal_tables_keep_figures_whole(local, emulated, failed, width):
    text = printed(width, local, emulated, failed)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    for figure in ("0.240", "0.366", "44.4", "217.241", "same bits", "35/35"):
        assert figure in text
    assert ("load ms" in text.splitlines()[0]) == (width == 200)
    assert ("on a wider terminal also" in " ".join(text.split())) == (width < 200)
    assert "unlock the phone" in " ".join(text.split())


def test_terminal_takes_no_markup_or_control_characters_from_a_document(local):
    local["name"] = "[red]x\x1b[31m"
    text = printed(300, local)
    assert "\x1b" not in text and "[red]x?[31m" in text


def test_terminal_says_that_nothing_was_measured():
    assert printed(80).strip() == "nothing was measured"


def test_ticks_are_round_and_few():
    assert linear_ticks(0, 1.05, 6) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert log_ticks(0.12, 60, 9) == [0.2, 0.5, 1, 2, 5, 10, 20, 50]
    assert log_ticks(0.3, 0.5, 5) == [0.3, 0.35, 0.4, 0.45, 0.5]
    for low, high in ((1e-4, 1e5), (0.11, 0.13), (3, 3.3), (0.9, 4), (99, 1001)):
        found = log_ticks(low, high, 7)
        assert 1 <= len(found) <= 8 and all(low <= value <= high for value in found) and found == sorted(set(found))


def test_an_axis_of_one_value_has_room():
    assert axis([3.0], 0.0, 100.0).at(3.0) == pytest.approx(50)
    assert axis([0.0], 0.0, 100.0).at(0.0) == pytest.approx(50)
    assert axis([3.0], 0.0, 100.0, log=True).at(3.0) == pytest.approx(50)
    assert lines((WIDE, 200), [(0, [(1.0, 1.0)])], ("", ""))["paths"]
