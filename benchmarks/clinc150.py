"""The figures that the README quotes: run the clinc150 recipe from nothing, measure, write ``results/clinc150.json``.

    python benchmarks/clinc150.py [--results FOLDER] [--keep FOLDER]

Takes about 40 minutes on two cores; nothing else should run. Every figure is of this run and this machine, and is
written whether or not it reaches its mark; the exit code is 3 if one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.reports.results import result_rows

ROOT = Path(__file__).parent.parent
POCKETBERT = [sys.executable, "-m", "pipeline.cli"]
STARTS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--keep", type=Path, help="a folder for the caches and outputs, which are removed otherwise; it must not exist yet")
    options = parser.parse_args()
    results = options.results
    with tempfile.TemporaryDirectory(prefix="pocketbert-benchmark-") as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=folder == Path(name))
        recipe_run = measure_run("clinc150", folder)
        ledger = json.loads((folder / "clinc150" / "ledger.json").read_text(encoding="utf-8"))
        results.mkdir(exist_ok=True)
        write(results / "clinc150.ledger.json", ledger)
        figures = {
            "machine": machine(ledger), "libraries": ledger["libraries"], "run": recipe_run, "help": measure_help(),
            "teacher_cache": measure_teacher_cache(folder), "demo": measure_run("demo", folder), "rows": result_rows(ledger),
        }  # fmt: skip
    figures["checks"] = checks(figures)
    write(results / "clinc150.json", figures)
    for check in figures["checks"]:
        print(f"{'ok  ' if check['ok'] else 'MISS'} {check['what']}: {check['value']:.3g} ({check['bound']} {check['mark']:g})")
    return 0 if all(check["ok"] for check in figures["checks"]) else 3


def measure_run(preset: str, folder: Path) -> dict[str, float]:
    """Seconds of a run from an empty cache, and of the same run again."""
    environment = os.environ | {"POCKETBERT_CACHE": str(folder / f"cache-{preset}")}
    seconds = []
    for out in (preset, f"{preset}-again"):
        started = time.monotonic()
        subprocess.run([*POCKETBERT, "run", preset, "--out", str(folder / out)], env=environment, check=True, cwd=ROOT)
        seconds.append(round(time.monotonic() - started, 1))
    return {"empty_cache_seconds": seconds[0], "cached_seconds": seconds[1]}


def measure_help() -> dict[str, float]:
    """Seconds of ``pocketbert --help`` as a whole process, median of several."""
    seconds = []
    for _ in range(STARTS):
        started = time.monotonic()
        subprocess.run([*POCKETBERT, "--help"], stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
        seconds.append(time.monotonic() - started)
    return {"median_seconds": round(statistics.median(seconds), 3), "max_seconds": round(max(seconds), 3)}


def measure_teacher_cache(folder: Path) -> dict[str, float]:
    """A distillation epoch with the teacher's outputs on disk against one that runs the teacher at every step."""
    command = [sys.executable, str(ROOT / "benchmarks" / "teacher_cache.py"), str(folder / "cache-clinc150")]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def machine(ledger: dict[str, Any]) -> dict[str, Any]:
    conditions = next(m["conditions"] for r in ledger["stages"] for m in r["measurements"])
    return {
        "cpu": conditions["cpu_model"], "isa": conditions["isa"], "cores": os.cpu_count(),
        "kernel": platform.release(), "python": platform.python_version(),
    }  # fmt: skip


def checks(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure against its mark."""
    rows = {row["name"]: row for row in figures["rows"]}
    teacher, onnx, tflite = rows["teacher"], rows["ONNX int8"], rows["TFLite int8"]
    run, demo = figures["run"], figures["demo"]
    listed = [
        ("teacher, % of the test texts", teacher["test"], ">=", 95.5),
        ("TFLite int8, points below the teacher on test", teacher["test"] - tflite["test"], "<=", 1.0),
        ("ONNX int8, points below the teacher on test", teacher["test"] - onnx["test"], "<=", 1.0),
        ("TFLite int8, MB", tflite["size_bytes"] / 1e6, "<=", 4.0),
        ("ONNX int8, MB", onnx["size_bytes"] / 1e6, "<=", 4.0),
        ("TFLite int8, times faster at p50 than the teacher in ONNX Runtime fp32", tflite["speedup"], ">=", 15.0),
        ("ONNX int8, times faster at p50 than the teacher in ONNX Runtime fp32", onnx["speedup"], ">=", 9.0),
        ("run from an empty cache, minutes", run["empty_cache_seconds"] / 60, "<=", 45.0),
        ("run with everything cached, seconds", run["cached_seconds"], "<", 20.0),
        ("demo from an empty cache, minutes", demo["empty_cache_seconds"] / 60, "<=", 6.0),
        ("pocketbert --help, seconds", figures["help"]["median_seconds"], "<", 0.5),
        ("distillation epoch with cached teacher, share of one without", figures["teacher_cache"]["ratio"], "<=", 0.5),
    ]
    passed = {">=": lambda v, m: v >= m, "<=": lambda v, m: v <= m, "<": lambda v, m: v < m}
    return [{"what": what, "value": value, "bound": bound, "mark": mark, "ok": passed[bound](value, mark)} for what, value, bound, mark in listed]


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
