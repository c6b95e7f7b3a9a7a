"""What Arm processors make of a bundle's files, without one: ``results/boards.json``.

    python -m benchmarks.boards BUNDLE [--record]      from the project's folder

    emulated  the outputs of 100 CLINC150 texts of the quantized files on three emulated processors against this machine's, and
              the instructions that sixteen of them take, counted twice
    machine   a virtual arm64 board, made from nothing (nothing is taken from the cache): packages, disk, boot, and two files
              proven on it over SSH by the Python agent and over ADB by the runner in C

It downloads (Debian packages, the runtimes' wheels). Nothing here is the speed of a device. The exit code is 3 if a figure
misses its mark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from device_bench import debian, emulator
from device_bench.bench import EMULATED_TEXTS, Plan, bench
from device_bench.lab import Place, parse_places
from device_bench.runner_build import build_runner
from device_bench.targets import LocalTarget
from pipeline.tasks import load_data
from pipeline.tasks.text_classification import TextClassification
from runtimes.bundle import Bundle, open_bundle
from tests.boards import vm
from tests.boards.conftest import OF_THE_HOST

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "boards.json"
CPUS = ("cortex-a72", "cortex-a76", "max")
TEXTS = 100
MOST_MACHINE_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("bundle", type=Path, help="a folder that `pocketbert run clinc150` made")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    conditions = LocalTarget().info()["conditions"]
    emulator.setup("aarch64", say)
    figures: dict[str, Any] = {
        "machine": {"cpu": conditions["cpu_model"], "isa": conditions["isa"], "cores": os.cpu_count(), "kernel": platform.release()},
        "emulated": emulated(bundle), "virtual_machine": virtual_machine(bundle),
    }  # fmt: skip
    figures["checks"] = checks(figures)
    if options.record:
        RESULTS.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for check in figures["checks"]:
        print(f"{'ok  ' if check['ok'] else 'MISS'} {check['what']}: {check['value']:.4g} ({check['bound']} {check['mark']:g})")
    return 0 if all(check["ok"] for check in figures["checks"]) else 3


def emulated(bundle: Bundle) -> dict[str, Any]:
    """Agreement and instructions of the quantized files on every processor, and whether a second count is the same."""
    task = TextClassification(data="clinc150", max_length=bundle.max_length)
    rows = load_data(task, None).test
    rows = rows[:: len(rows) // TEXTS][:TEXTS]
    plan = Plan(files=quantized(bundle), examples=[task.example(row) for row in rows], score=accuracy(bundle, [row["label"] for row in rows]))
    places = parse_places(",".join(f"qemu:{cpu}" for cpu in CPUS))
    targets = bench(bundle, places, plan, say)["targets"]
    few = replace(plan, examples=plan.examples[:EMULATED_TEXTS], score=None)
    again = bench(bundle, places, few, say)["targets"]
    return {
        "texts": TEXTS,
        "targets": [{key: target[key] for key in ("name", "formats", "error", "refused", "agreement", "instructions")} for target in targets],
        "counts_repeat": [target["instructions"] for target in again] == [target["instructions"] for target in targets],
    }


def accuracy(bundle: Bundle, answers: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    labels = bundle.labels["logits"]

    def score(outputs: Sequence[Sequence[dict[str, np.ndarray]]]) -> dict[str, float]:
        right = [labels[one["logits"].argmax()] == answer for (one,), answer in zip(outputs, answers, strict=True)]
        return {"accuracy": 100 * float(np.mean(right))}

    return score


def quantized(bundle: Bundle) -> list[str]:
    return [entry.file for entry in bundle.models if entry.precision == "int8"]


def virtual_machine(bundle: Bundle) -> dict[str, Any]:
    """Seconds of every step from an empty cache on, and what the two files gave over both ways."""
    seconds: dict[str, float] = {}
    files = quantized(bundle)
    with tempfile.TemporaryDirectory(prefix="pocketbert-boards-") as name, cache_in(Path(name) / "cache"):
        with timed(seconds, "packages"):
            for packages in (vm.board_packages(), vm.adbd_packages(), vm.qemu_packages()):
                packages.unpack(say)
            tools = debian.PackageSet(("adbd", "adb"), debian.host_architecture(), ("bookworm", "bookworm-backports"), OF_THE_HOST).unpack(say)
        with timed(seconds, "compiler_and_runner"):
            machine = emulator.setup("aarch64", say)
            runner = build_runner("aarch64", str(machine.compiler))
        with timed(seconds, "disk"):
            image = vm.build_image(say)
        (folder := Path(name) / "machine").mkdir()
        with timed(seconds, "boot"):
            board = vm.VirtualMachine(folder, image, vm.qemu_packages().folder, tools)
            board.connect_adb()
        try:
            plan, libraries = Plan(files=files), tuple(str(machine.library(kind)) for kind in ("onnx", "tflite"))
            places = {
                "ssh": Place("ssh:board", provision=True, emulated=True),
                "adb": Place(f"adb:{board.serial}", name="adb:board", runner=str(runner), libraries=libraries, emulated=True),
            }
            os.environ["POCKETBERT_SSH"] = f"ssh -F '{board.config}'"
            targets = []
            with board.adb.found_by_default():
                for way, place in places.items():
                    with timed(seconds, way):
                        targets += bench(bundle, [place], plan, say)["targets"]
        finally:
            board.stop()
    shown = [{key: target[key] for key in ("name", "formats", "error", "refused", "agreement")} for target in targets]
    return {"files": files, "seconds": seconds | {"all": round(sum(seconds.values()), 1)}, "targets": shown}


def checks(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The marks, each with its value and whether it holds."""
    emulated, machine = figures["emulated"], figures["virtual_machine"]
    rows = [row for target in emulated["targets"] for row in target["agreement"]]
    int8 = {kind: [row for row in rows if row["file"].startswith(kind)] for kind in ("onnx", "tflite")}
    proven = [row for target in machine["targets"] for row in target["agreement"]]
    failed = [target["name"] for target in [*emulated["targets"], *machine["targets"]] if target["error"] or target["refused"]]
    far = max(row["worst_difference"] / row["tolerance"] for row in int8["tflite"])
    return [
        {"what": what, "value": value, "bound": bound, "mark": mark, "ok": value <= mark if bound == "<=" else value >= mark}
        for what, value, bound, mark in (
            ("targets that failed or refused a file", len(failed), "<=", 0),
            ("texts answered otherwise, of all files and processors", sum(row["decisions"] - row["same_decisions"] for row in rows), "<=", 0),
            ("files whose accuracy is another", sum(row["scores"] != row["scores_here"] for row in rows), "<=", 0),
            ("int8 ONNX files equal to this machine's in every bit", sum(row["same_bits"] for row in int8["onnx"]), ">=", len(int8["onnx"])),
            ("int8 TFLite files, worst difference in tolerances", far, "<=", 1.0),
            ("counts that repeat exactly", int(emulated["counts_repeat"]), ">=", 1),
            ("files proven over SSH and over ADB on the virtual board", len(proven), ">=", 2 * len(machine["files"])),
            ("virtual board from nothing, s", machine["seconds"]["all"], "<=", MOST_MACHINE_SECONDS),
        )
    ]


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[what] = round(time.monotonic() - started, 1)


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """An empty cache of its own; the user's is not touched."""
    before = os.environ.get("POCKETBERT_CACHE")
    os.environ["POCKETBERT_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["POCKETBERT_CACHE"]
        if before is not None:
            os.environ["POCKETBERT_CACHE"] = before


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
