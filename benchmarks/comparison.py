"""Whether a comparison tells a slow-down from noise: ``results/comparison.json``.

    python benchmarks/comparison.py BUNDLE [--record] [--runs N]

The smallest file of the bundle is measured N + 1 times as it is and N times by an agent that really spins for a tenth longer
(slowed_agent.py), in turns, each time into a bench document of its own, with tier quick, on its golden texts and one thread.
Then each plain document is compared with the next (the same file, so any difference is wrong), and with the slowed one between
them. Takes ten minutes for 20; nothing else should run. The exit code is 3 if a figure misses its mark.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from device_bench.bench import FORMAT, TIERS
from device_bench.comparison import Comparison, Verdict, compare, read_bench
from device_bench.measurement import Candidate, measure
from device_bench.targets import AGENT, LocalTarget
from runtimes.bundle import Bundle, open_bundle
from runtimes.text import Encoding

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "comparison.json"
SLOWED_AGENT = ROOT / "benchmarks" / "slowed_agent.py"
TIER = "quick"
RUNS = 20
RIGHT = 19 / 20
MOST_SECONDS = 900


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("bundle", type=Path, help="a folder that `pocketbert run` made")
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"comparisons of each kind; {RUNS} for the record")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    candidate = smallest(bundle)
    conditions = LocalTarget().info()["conditions"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pocketbert-comparison-") as name:
        plain = [Path(name) / f"plain-{number}.json" for number in range(options.runs + 1)]
        slowed = [Path(name) / f"slowed-{number}.json" for number in range(options.runs)]
        for number in range(options.runs):
            write_document(bundle, candidate, AGENT, plain[number])
            write_document(bundle, candidate, SLOWED_AGENT, slowed[number])
        write_document(bundle, candidate, AGENT, plain[-1])
        seconds = time.monotonic() - started
        same = [verdict(a, b) for a, b in pairwise(plain)]
        planted = [verdict(a, b) for a, b in zip(plain, slowed, strict=False)]
    figures: dict[str, Any] = {
        "machine": {"cpu": conditions["cpu_model"], "isa": conditions["isa"], "cores": os.cpu_count(), "kernel": platform.release()},
        "file": candidate.file, "texts": len(candidate.inputs), "tier": TIER, "rounds": TIERS[TIER].rounds, "seconds": round(seconds, 1),
        "same": summary(same, Verdict.NOT_SEEN), "planted": summary(planted, Verdict.SLOWER),
    }  # fmt: skip
    figures["checks"] = checks(figures, options.runs)
    if options.record:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for kind in ("same", "planted"):
        for row in figures[kind]["comparisons"]:
            interval = f"{row['low_percent']:+6.2f} to {row['high_percent']:+6.2f}"
            told = f"{row['change_percent']:+6.2f} % ({interval}), floor {row['floor_percent']:.2f} %, p50 {row['p50_percent']:+6.2f} %"
            print(f"{kind:8s} {told}: {row['verdict']}")
    for kind in ("same", "planted"):
        told = figures[kind]
        print(f"{kind:8s} standard deviation of the change {told['change_sd_percent']:.2f} %, of that of p50 {told['p50_sd_percent']:.2f} %")
    for check in figures["checks"]:
        print(f"{'ok  ' if check['ok'] else 'MISS'} {check['what']}: {check['value']:g} ({check['bound']} {check['mark']:g})")
    return 0 if all(check["ok"] for check in figures["checks"]) else 3


def smallest(bundle: Bundle) -> Candidate:
    """The smallest file with the inputs of its golden cases, shuffled, so that every stretch of them is a fair mix."""
    entry = min(bundle.models, key=lambda entry: bundle.path(entry).stat().st_size)
    cases = [(given, wanted) for case in bundle.golden_cases() for given, wanted in zip(case["inputs"], case["outputs"][entry.file], strict=True)]
    cases = [cases[i] for i in np.random.default_rng(0).permutation(len(cases))]
    return Candidate(
        name=entry.file, path=bundle.path(entry), format=entry.format, file=entry.file, tolerance=entry.tolerance, session=entry.session,
        inputs=[Encoding(given["ids"], given["types"]) for given, _ in cases],
        golden=[{name: np.array(values, np.float32) for name, values in wanted.items()} for _, wanted in cases],
    )  # fmt: skip


def write_document(bundle: Bundle, candidate: Candidate, agent: Path, path: Path) -> None:
    """Measure once and keep it as ``pocketbert bench --out`` does."""
    tier, target = TIERS[TIER], LocalTarget(agent=agent)
    rows = measure(
        [candidate], target, threads=[1], lengths=[], rounds=tier.rounds, min_seconds=tier.seconds / tier.rounds, say=lambda message: None,
        memory=False, keep_samples=True, text_inferences=math.ceil(tier.inferences / tier.rounds),
    )  # fmt: skip
    print(f"{path.stem}: p50 {rows[0]['p50_ms']:.4f} ms", file=sys.stderr, flush=True)
    found = {"name": target.name, "emulated": False, "error": None, "conditions": rows[0]["conditions"], "measurements": rows}
    found |= {"refused": [], "sustained": [], "agreement": [], "instructions": []}
    document = {"format": FORMAT, "bundle": {"name": bundle.manifest["name"], "files": []}, "tier": TIER, "rounds": tier.rounds}
    document |= {"texts": len(candidate.inputs), "inputs": len(candidate.inputs), "targets": [found]}
    path.write_text(json.dumps(document), encoding="utf-8")


def verdict(a: Path, b: Path) -> Comparison:
    (found,) = compare(read_bench(a), read_bench(b))
    return found


def summary(comparisons: list[Comparison], right: Verdict) -> dict[str, Any]:
    rows = [
        {
            "verdict": one.verdict, "change_percent": percent(one.change), "low_percent": percent(one.low), "high_percent": percent(one.high),
            "floor_percent": percent(one.floor), "p50_percent": percent(one.new / one.base - 1), "base_p50_ms": one.base, "new_p50_ms": one.new,
        }
        for one in comparisons
    ]  # fmt: skip
    spreads = {f"{key}_sd_percent": round(statistics.stdev(row[f"{key}_percent"] for row in rows), 3) for key in ("change", "p50")}
    return {"right": sum(one.verdict == right for one in comparisons), "of": len(rows), **spreads, "comparisons": rows}


def percent(fraction: float) -> float:
    return round(100 * fraction, 3)


def checks(figures: dict[str, Any], runs: int) -> list[dict[str, Any]]:
    needed = math.ceil(RIGHT * runs)
    listed = [
        ("A/A comparisons that say no difference seen", figures["same"]["right"], ">=", needed),
        ("planted slow-downs of 10 % that are found", figures["planted"]["right"], ">=", needed),
        ("seconds", figures["seconds"], "<=", MOST_SECONDS),
    ]
    passed = {">=": lambda v, m: v >= m, "<=": lambda v, m: v <= m}
    return [{"what": what, "value": value, "bound": bound, "mark": mark, "ok": passed[bound](value, mark)} for what, value, bound, mark in listed]


if __name__ == "__main__":
    sys.exit(main())
