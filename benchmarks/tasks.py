"""Every task on its preset: teacher, floor, the same weights in int8, and what the preset makes of it; ``results/tasks.json``.

    python -m benchmarks.tasks [PRESET ...] [--keep FOLDER] [--record]

Without names all presets run, one after another, which takes about two hours on two cores; nothing else should run. Each preset
runs twice: as a recipe of the teacher's own weights (export, int8, bench), and as it is. A preset that is measured goes into the
result at once, beside those measured before, so that one may go on later; ``--keep`` is the cache that makes it go on.

Every figure is written whether or not it reaches its mark; the exit code is 3 if one does not. A preset whose weights cannot be
quantized within its gate has no files to measure: it is told, counts as missed, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cli.console import quieten_libraries
from pipeline.flow.cache import Cache
from pipeline.flow.engine import run
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import BudgetSection, Recipe, load_recipe
from pipeline.reports.results import result_rows
from pipeline.reports.run_report import write_report
from runtimes.errors import GateFailed

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "tasks.json"
INT8 = ("ONNX int8", "TFLite int8")
SAME_WEIGHTS_STAGES = ("finetune", "adopt", "export", "quantize", "bench")
SAME_WEIGHTS_DROP = 0.5
"""Points of the teacher's metric on test that its int8 files may lose."""
LONGEST_MINUTES = 45.0


@dataclass(frozen=True)
class Mark:
    """``metric`` of ``row`` on test, in points, at least ``least``."""

    row: str
    metric: str
    least: float


@dataclass(frozen=True)
class Preset:
    """A preset, other data for its recipe if any, and what is expected of it."""

    recipe: str
    data: str | None = None
    marks: tuple[Mark, ...] = ()
    largest_mb: float | None = None
    fastest: float | None = None
    """Times that the compressed files are faster than the teacher in ONNX Runtime fp32."""


PRESETS = {
    "sst2": Preset("sst2", marks=(Mark("teacher", "accuracy", 90.5),)),
    "mrpc": Preset("mrpc", marks=(Mark("teacher", "f1", 87.0),)),
    "stsb": Preset("stsb", marks=(Mark("teacher", "spearman", 86.0),)),
    "conll2003": Preset("conll2003", marks=(Mark("teacher", "f1", 87.0),)),
    "wnut17": Preset("conll2003", data="wnut17"),
    "snips": Preset("snips", marks=(Mark("compressed", "intent_accuracy", 98.3), Mark("compressed", "slot_f1", 94.0)), largest_mb=4.0),
    "minilm-embeddings": Preset("minilm-embeddings", largest_mb=8.0, fastest=4.0),
    "squad": Preset("squad"),
}
EMBEDDING_KEPT = 0.97
"""Share of the original's Spearman that the distilled student keeps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"of {', '.join(PRESETS)}; all if left out")
    parser.add_argument("--keep", type=Path, default=ROOT / "out" / "tasks", help="cache and outputs")
    parser.add_argument("--record", action="store_true", help="write results/tasks.json")
    options = parser.parse_args()
    quieten_libraries()
    unknown = set(options.presets) - set(PRESETS)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(PRESETS)}")
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"presets": {}}
    missed = 0
    for name in options.presets or PRESETS:
        try:
            figures = measure(name, options.keep)
        except GateFailed as error:
            print(f"MISS {name}: {error}")
            missed += 1
            continue
        missed += sum(not check["ok"] for check in figures["checks"])
        for check in figures["checks"]:
            print(f"{'ok  ' if check['ok'] else 'MISS'} {name}: {check['what']}: {check['value']:.4g} ({check['bound']} {check['mark']:g})")
        known["presets"][name] = figures
        known["presets"] = {key: known["presets"][key] for key in PRESETS if key in known["presets"]}
        if options.record:
            RESULT.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 3 if missed else 0


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Both runs of one preset as figures, each against its mark."""
    preset = PRESETS[name]
    cache = Cache(folder / "cache")
    ledgers = {}
    for kind, recipe in (("same weights", same_weights(preset)), ("compressed", load_recipe(preset.recipe, data=preset.data))):
        print(f"== {name}: {kind}", file=sys.stderr, flush=True)
        recipe.budget = BudgetSection()  # what misses its mark is to be shown here, not refused
        ledgers[kind] = run(recipe, folder / name / kind.replace(" ", "-"), cache, Progress(), write_report).as_dict()
    figures = {
        "recipe": preset.recipe, "data": preset.data, "task": ledgers["compressed"]["task"], "rows": ledgers["compressed"]["rows"],
        "machine": machine(ledgers["compressed"]), "libraries": ledgers["compressed"]["libraries"], "floor": ledgers["compressed"]["floor"],
        "minutes": round(sum(record["seconds"] for record in ledgers["compressed"]["stages"]) / 60, 2),
        "same_weights": files(ledgers["same weights"]), "compressed": files(ledgers["compressed"]), "teacher": teacher(ledgers["compressed"]),
        "steps": [s | {"stage": r["stage"]} for r in ledgers["compressed"]["stages"] for s in r["subjects"] if s["file"] is None],
    }  # fmt: skip
    return figures | {"checks": checks(preset, figures)}


def same_weights(preset: Preset) -> Recipe:
    """The preset's recipe without what compresses."""
    recipe = load_recipe(preset.recipe, data=preset.data)
    recipe.stages = [stage for stage in recipe.stages if stage.use in SAME_WEIGHTS_STAGES]
    return recipe


def files(ledger: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Size, metrics and latency of the files of a run."""
    subjects = {s["name"]: s for r in ledger["stages"] for s in r["subjects"] if s["file"]}
    timed = {row["name"]: row for row in result_rows(ledger)}
    return {
        name: {
            "size_bytes": subject["size_bytes"], "unique_params": subject["unique_params"], "metrics": subject["metrics"],
            "p50_ms": timed[name]["p50_ms"], "speedup": timed[name]["speedup"],
        }
        for name, subject in subjects.items()
    }  # fmt: skip


def teacher(ledger: dict[str, Any]) -> dict[str, Any]:
    subject = next(s for r in ledger["stages"] for s in r["subjects"] if s["file"] is None)
    row = next(row for row in result_rows(ledger) if row["name"] == subject["name"])
    return {"metrics": subject["metrics"], "size_bytes": subject["size_bytes"], "p50_ms": row["p50_ms"]}


def checks(preset: Preset, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure against its mark, on the worse of the two int8 files."""
    metric = figures["task"]["metrics"][0]["name"]
    best = figures["teacher"]["metrics"]["test"]
    same, small = ([figures[kind][name] for name in INT8] for kind in ("same_weights", "compressed"))
    listed = [(
        f"{metric}, points that int8 of the same weights loses on test",
        best[metric] - min(one["metrics"]["test"][metric] for one in same), "<=", SAME_WEIGHTS_DROP,
    )]  # fmt: skip
    for mark in preset.marks:
        rows = [figures["teacher"]] if mark.row == "teacher" else small
        listed.append((f"{mark.row}: {mark.metric} on test", min(row["metrics"]["test"][mark.metric] for row in rows), ">=", mark.least))
    if preset.largest_mb is not None:
        listed.append(("compressed: MB", max(one["size_bytes"] for one in small) / 1e6, "<=", preset.largest_mb))
    if preset.fastest is not None:
        listed.append(("compressed: times faster than the teacher in ONNX Runtime fp32", min(one["speedup"] for one in small), ">=", preset.fastest))
    if figures["task"]["kind"] == "sentence-embedding":
        kept = min(one["metrics"]["test"][metric] for one in small) / best[metric]
        listed.append(("compressed: share of the original's Spearman on test", kept, ">=", EMBEDDING_KEPT))
    listed.append(("minutes from an empty cache", figures["minutes"], "<=", LONGEST_MINUTES))
    passed = {">=": lambda v, m: v >= m, "<=": lambda v, m: v <= m}
    return [{"what": what, "value": value, "bound": bound, "mark": mark, "ok": passed[bound](value, mark)} for what, value, bound, mark in listed]


def machine(ledger: dict[str, Any]) -> dict[str, Any]:
    conditions = next(m["conditions"] for r in ledger["stages"] for m in r["measurements"])
    return {
        "cpu": conditions["cpu_model"], "isa": conditions["isa"], "cores": os.cpu_count(),
        "kernel": platform.release(), "python": platform.python_version(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
