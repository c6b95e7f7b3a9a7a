"""The C runner against a loop in C such as an app would have: ``results/runner.json``.

    python benchmarks/runner.py BUNDLE [--record] [--rounds N]

    latency   one input over and over on one thread, in turns: the loop (runner_loop.c, linked to the runtime, its clock read
              around batches alone), the runner, and the Python agent for information
    memory    the peak of each with the same file and input; what the runner takes on top of the loop is its own, and what the
              Python agent takes on top of Python with the runtime (bare_python.py)

A round has every program once, in an order that turns; its figure is the median of its batches' means, so that somebody
else's burst of work costs a batch and no more. The exit code is 3 if a figure misses its mark. Nothing else should run.
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
from pathlib import Path
from typing import Any

import numpy as np

from device_bench.agent.agent import write_inputs
from device_bench.runner_build import SOURCES, build_runner, runner_arguments, runtime_library
from device_bench.targets import AGENT, LocalTarget, parse_answer
from runtimes.bundle import Bundle, ModelEntry, open_bundle

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "runner.json"
LOOP = ROOT / "benchmarks" / "runner_loop.c"
BARE_PYTHON = ROOT / "benchmarks" / "bare_python.py"
PROGRAMS = ("loop", "runner", "agent")
ROUNDS, BATCHES, BATCH_SECONDS = 15, 20, 0.05
WARMUP_SECONDS = 0.5
MOST_DIFFERENCE, MOST_MEMORY_MB = 0.03, 15.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("bundle", type=Path, help="a folder that `pocketbert run` made")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batches", type=int, default=BATCHES)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    conditions = LocalTarget().info()["conditions"]
    runner = build_runner(platform.machine())
    with tempfile.TemporaryDirectory(prefix="pocketbert-runner-") as name:
        figures: dict[str, Any] = {
            "machine": {"cpu": conditions["cpu_model"], "isa": conditions["isa"], "cores": os.cpu_count(), "kernel": platform.release()},
            "rounds": options.rounds, "batches": options.batches, "runner_bytes": runner.stat().st_size,
            "sources_lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.glob("*.[ch]")),
            "files": [compare(bundle, entry, runner, Path(name), options.rounds, options.batches) for entry in bundle.models],
        }  # fmt: skip
    figures["checks"] = checks(figures)
    if options.record:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in figures["files"]:
        times = ", ".join(f"{program} {row['latency_ms'][program]:.4f} ms" for program in PROGRAMS)
        print(
            f"{row['file']:28s} {times}; runner against loop {row['runner_ratio']:.4f} (rounds {min(row['ratios']):.4f} to {max(row['ratios']):.4f})"
        )
        print(f"{'':28s} own memory: runner {row['own_memory_mb']['runner']:.1f} MB, agent {row['own_memory_mb']['agent']:.1f} MB")
    for check in figures["checks"]:
        print(f"{'ok  ' if check['ok'] else 'MISS'} {check['what']}: {check['value']:.3g} (<= {check['mark']:g})")
    return 0 if all(check["ok"] for check in figures["checks"]) else 3


def compare(bundle: Bundle, entry: ModelEntry, runner: Path, folder: Path, rounds: int, batches: int) -> dict[str, Any]:
    """One file: latency in turns, then memory."""
    inputs = sorted((one for case in bundle.golden_cases() for one in case["inputs"]), key=lambda one: len(one["ids"]))
    middle, library = inputs[len(inputs) // 2], runtime_library(entry.format)
    ids, types = middle["ids"], middle["types"]
    write_inputs(folder / "one.inputs", [(ids, types)])
    loop = build_loop(entry.format, library, folder)
    job = {
        "model": str(bundle.path(entry)), "format": entry.format, "threads": 1, "cores": None, "inputs": str(folder / "one.inputs"),
        "golden": None, "tolerance": 0.0, "mode": "latency", "cases": [{"case": "texts"}],
        "warmup": {"window": 16, "tolerance": 0.05, "max_seconds": WARMUP_SECONDS},
    }  # fmt: skip
    rough_ns = statistics.median(run_loop(loop, job, 10, 5, 10)["batch_mean_ns"])
    inferences, warmup = max(1, int(BATCH_SECONDS * 1e9 / rough_ns)), max(1, int(WARMUP_SECONDS * 1e9 / rough_ns))
    timed = {**job, "min_inferences": batches * inferences, "min_seconds": 0.0}
    medians: dict[str, list[float]] = {program: [] for program in PROGRAMS}
    for number in range(rounds):
        say(f"{entry.file}: round {number + 1}/{rounds}, {batches} batches of {inferences}")
        turn = number % len(PROGRAMS)
        for program in (*PROGRAMS[turn:], *PROGRAMS[:turn]):
            if program == "loop":
                means = run_loop(loop, job, warmup, batches, inferences)["batch_mean_ns"]
            else:
                means = batch_means(run_agent(program, runner, library, timed, folder)["cases"][0]["samples_ns"], batches, inferences)
            medians[program].append(statistics.median(means) / 1e6)
    ratios = [ours / loops for ours, loops in zip(medians["runner"], medians["loop"], strict=True)]
    weighed = {**job, "mode": "memory"}
    peaks = {program: run_agent(program, runner, library, weighed, folder)["memory"]["peak_bytes"] for program in ("runner", "agent")}
    bare = {"loop": run_loop(loop, job, 1, 0, 1)["peak_bytes"], "python": peak_of_python(bundle.path(entry), ids, types)}
    own = {"runner": peaks["runner"] - bare["loop"], "agent": peaks["agent"] - bare["python"]}
    return {
        "file": entry.file, "tokens": len(ids), "latency_ms": {program: round(statistics.median(ms), 5) for program, ms in medians.items()},
        "ratios": [round(ratio, 4) for ratio in ratios], "runner_ratio": round(statistics.median(ratios), 4),
        "peak_bytes": {**bare, **peaks}, "own_memory_mb": {program: round(more / 1e6, 2) for program, more in own.items()},
    }  # fmt: skip


def build_loop(format: str, library: Path, folder: Path) -> Path:
    program = folder / f"loop-{format}"
    linked = [str(library), f"-Wl,-rpath,{library.parent}", "-Wl,--allow-shlib-undefined"]
    # ONNX Runtime's wheel holds it under its whole version, and it asks to be found under another name.
    (folder / "libonnxruntime.so.1").unlink(missing_ok=True)
    if format == "onnx":
        (folder / "libonnxruntime.so.1").symlink_to(library)
        linked.append(f"-Wl,-rpath,{folder}")
    command = ["cc", "-O2", "-std=c11", "-Wall", "-Wextra", f"-D{format.upper()}", "-o", str(program), str(LOOP), *linked]
    subprocess.run(command, check=True)
    return program


def run_loop(loop: Path, job: dict[str, Any], warmup: int, batches: int, inferences: int) -> dict[str, Any]:
    command = [str(part) for part in (loop, job["model"], job["inputs"], warmup, batches, inferences)]
    quiet = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}  # as the runner; its uploader takes 2 MB
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def peak_of_python(model: Path, ids: list[int], types: list[int]) -> int:
    command = [sys.executable, str(BARE_PYTHON), str(model), ",".join(map(str, ids)), ",".join(map(str, types))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def run_agent(program: str, runner: Path, library: Path, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    if program == "runner":
        command = [str(runner), *runner_arguments(job, library)]
    else:
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, str(AGENT), str(folder / "job.json")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return parse_answer(program, done.returncode, done.stdout, done.stderr)


def batch_means(samples_ns: list[int], batches: int, inferences: int) -> list[float]:
    """Means over as many inferences as a batch of the loop has."""
    return np.asarray(samples_ns[: batches * inferences], dtype=np.float64).reshape(batches, inferences).mean(axis=1).tolist()


def checks(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure against its mark."""
    listed = []
    for row in figures["files"]:
        listed.append((f"{row['file']}: runner's latency off the loop's", abs(row["runner_ratio"] - 1), MOST_DIFFERENCE))
        listed += [(f"{row['file']}: {program}'s own memory, MB", more, MOST_MEMORY_MB) for program, more in row["own_memory_mb"].items()]
    return [{"what": what, "value": value, "bound": "<=", "mark": mark, "ok": value <= mark} for what, value, mark in listed]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
