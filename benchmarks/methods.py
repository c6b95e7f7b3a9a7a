"""Every method of the survey's Prune, Factor and Weight-sharing columns on CLINC150 with MiniLM, side by side: ``results/methods.json``.

    python benchmarks/methods.py [--keep FOLDER] [--only PATTERN] [--train] [--record]

Each operating point is a recipe (fine-tune, the method, export, quantize) whose int8 files are measured beside those of the
model that only was fine-tuned, in the same rounds. Takes up to three hours on two cores; ``--keep`` names a cache folder with
which an interrupted run goes on. The latencies are those of the last part, when nothing trains; nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clinc150 import write
from files import machine

from device_bench.measurement import Candidate, measure
from device_bench.targets import LocalTarget
from pipeline.flow.cache import Cache, library_versions
from pipeline.flow.engine import run
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.learning.download import LEVEL, compressed_bytes
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.config import EncoderConfig, layer_shape
from pipeline.models.encoder import Encoder, count_unique_parameters
from pipeline.models.surgery import encoder_parameters
from pipeline.reports.run_report import write_report
from pipeline.stages.export import DESCRIPTION
from pipeline.tasks import load_data
from runtimes.text import Encoding, TextEncoder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "methods.json"
FILES = {"tflite": "tflite/model_int8.tflite", "onnx": "onnx/model_quantized.onnx"}
TIMED_TEXTS = 1000
WIDTHS = (704, 719, 720, 728, 736, 743, 744, 752, 760, 767, 768, 769, 776, 784)
"""Odd ones, multiples of 8, of 16, of 32, and of 256."""
WIDTH_TOKENS = 10
WIDTH_TEXTS = 300
HEAD = """
[model]
source = "sentence-transformers/all-MiniLM-L6-v2"
[task]
data = "clinc150"
max_length = 64
[[stage]]
use = "finetune"
epochs = 5
"""
TAIL = """
[[stage]]
use = "export"
[[stage]]
use = "quantize"
"""


@dataclass(frozen=True)
class Point:
    """One operating point: ``options`` are those of the stage ``use`` that differ from its defaults.

    ``kind``: ``structure`` (work goes), ``weights`` (zeros in dense matrices) or ``storage`` (fewer weights, the same work).
    """

    name: str
    use: str
    kind: str
    options: str = ""

    def recipe(self) -> str:
        lines = "\n".join(self.options.split("; ")) if self.options else ""
        table = f'[[stage]]\nuse = "{self.use}"\n{lines}\n' if self.use else ""
        return f'name = "{self.name}"\n{HEAD}{table}{TAIL}'


POINTS = (
    Point("unpruned", "", "structure"),
    Point("heads-25", "prune-heads", "structure", "fraction = 0.25"),
    Point("heads-50", "prune-heads", "structure", "fraction = 0.5"),
    Point("heads-75", "prune-heads", "structure", "fraction = 0.75; rounds = 3"),
    Point("gates-ffn-50", "prune-gates", "structure", "ffn = 0.5"),
    Point("gates-ffn-50-gain", "prune-gates", "structure", 'ffn = 0.5; select = "gain"'),
    Point("gates-ffn-50-random", "prune-gates", "structure", 'ffn = 0.5; select = "random"'),
    Point("gates-heads-50-ffn-50", "prune-gates", "structure", "heads = 0.5; ffn = 0.5"),
    Point("gates-hidden-25", "prune-gates", "structure", "ffn = 0.0; hidden = 0.25; heal = { epochs = 3 }"),
    Point("neurons-ffn-50", "prune-neurons", "structure", "ffn = 0.5"),
    Point("neurons-ffn-75-attention-25", "prune-neurons", "structure", "ffn = 0.75; attention = 0.25"),
    Point("layerdrop-4", "layerdrop", "structure", "layers = 4; drop_epochs = 1"),
    Point("layerdrop-3", "layerdrop", "structure", "layers = 3; drop_epochs = 1"),
    Point("layerdrop-2", "layerdrop", "structure", "layers = 2; drop_epochs = 1"),
    Point("magnitude-40", "prune-magnitude", "weights", "sparsity = 0.4"),
    Point("magnitude-60", "prune-magnitude", "weights", "sparsity = 0.6"),
    Point("magnitude-80", "prune-magnitude", "weights", "sparsity = 0.8"),
    Point("magnitude-80-one-shot", "prune-magnitude", "weights", 'sparsity = 0.8; schedule = "one-shot"'),
    Point("magnitude-80-random", "prune-magnitude", "weights", 'sparsity = 0.8; schedule = "random"'),
    Point("magnitude-60-blocks", "prune-magnitude", "weights", "sparsity = 0.6; block = [1, 4]"),
    Point("proximal-weights-60", "prune-proximal", "weights", 'form = "weights"; sparsity = 0.6'),
    Point("proximal-blocks-60", "prune-proximal", "weights", 'form = "blocks"; sparsity = 0.6'),
    Point("proximal-structures-40", "prune-proximal", "structure", 'form = "structures"; sparsity = 0.4'),
    Point("svd-35", "factorize-svd", "structure", "removed = 0.35"),
    Point("svd-35-healed", "factorize-svd", "structure", "removed = 0.35; heal = { epochs = 5 }"),
    Point("flop-35", "factorize-flop", "structure", "removed = 0.35"),
    Point("svd-60", "factorize-svd", "structure", "removed = 0.6"),
    Point("flop-60", "factorize-flop", "structure", "removed = 0.6; gate_epochs = 4; gate_learning_rate = 0.1"),
    Point("share-all-1", "share-layers", "storage", "groups = 1; transfer = { epochs = 3 }"),
    Point("share-all-2", "share-layers", "storage", "groups = 2; transfer = { epochs = 3 }"),
    Point("share-attention-1", "share-layers", "storage", 'share = "attention"; transfer = { epochs = 2 }; heal = { epochs = 3 }'),
    Point("share-ffn-1", "share-layers", "storage", 'share = "ffn"; transfer = { epochs = 3 }'),
    Point("quaternion", "quaternion", "storage", ""),
    Point("quaternion-shorter", "quaternion", "storage", "transfer = { epochs = 3 }; heal = { epochs = 2 }"),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--keep", type=Path, help="cache folder that stays, so that a second run goes on from the first")
    parser.add_argument("--only", default="", help="points whose name has this regular expression in it; the unpruned model is always one")
    parser.add_argument("--train", action="store_true", help="train, write and measure nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    chosen = [point for point in POINTS if point.name == "unpruned" or re.search(options.only, point.name)]
    with tempfile.TemporaryDirectory(prefix="pocketbert-methods-") as name:
        cache = Cache(options.keep or Path(name) / "cache")
        made = [Made(point, cache, Path(name), options.train) for point in chosen]
        if options.train:
            return 0
        rows = [one.row() for one in made]
        time_files(made, rows, options.rounds)
        widths = measure_widths(Path(name), options.rounds)
        figures = {
            "machine": machine(), "libraries": library_versions(), "rounds": options.rounds, "texts": TIMED_TEXTS, "zstd_level": LEVEL,
            "rows": rows, "widths": widths,
        }  # fmt: skip
    figures["checks"] = checks({row["name"]: row for row in rows})
    if options.record:
        write(RESULTS, figures)
    for row in rows:
        print(
            f"{row['name']:28s} {row['unique_params'] / 1e6:6.2f} M  {row['tflite']['size_bytes'] / 1e6:6.2f} MB  "
            f"test {row['tflite']['test']:.2f} %  tflite {row['tflite']['p50_ms']:.3f} ms  onnx {row['onnx']['p50_ms']:.3f} ms"
        )
    for check in figures["checks"]:
        print(f"{'ok  ' if check['ok'] else 'MISS'} {check['what']}: {check['value']:.3g} ({check['bound']} {check['mark']:g})")
    return 0 if all(check["ok"] for check in figures["checks"]) else 3


class Made:
    """A point that was run: its records, model and files."""

    def __init__(self, point: Point, cache: Cache, folder: Path, train_only: bool) -> None:
        self.point = point
        path = folder / f"{point.name}.toml"
        path.write_text(point.recipe(), encoding="utf-8")
        print(f"--- {point.name}", file=sys.stderr, flush=True)
        started = time.monotonic()
        recipe = load_recipe(str(path))
        if train_only:
            recipe.stages = [stage for stage in recipe.stages if stage.use in ("finetune", point.use)]
        self.ledger = run(recipe, folder / point.name, cache, Progress(), write_report)
        print(f"--- {point.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        self.folders = {}
        for record in self.ledger.records:
            self.folders |= {role: artifact.folder for role, artifact in cache.artifacts(record["key"], record).items()}

    def row(self) -> dict[str, Any]:
        """What is known without a clock."""
        from exporters.folding import fold

        method = next((r for r in self.ledger.records if r["stage"] == self.point.use), self.ledger.records[0])
        model = Checkpoint.load(self.folders["model"]).model
        recipe = self.ledger.recipe
        folded = fold(model, recipe.task.max_length)
        lengths = timed_lengths(self.folders, recipe)
        buckets = json.loads((self.folders["exported"] / DESCRIPTION).read_text(encoding="utf-8"))["buckets"]
        padded = np.asarray(buckets)[np.searchsorted(buckets, lengths)]
        row = {
            "name": self.point.name, "use": self.point.use, "kind": self.point.kind, "options": self.point.options, "notes": method["notes"],
            "seconds": method["seconds"], "unique_params": count_unique_parameters(model), "layer_params": encoder_parameters(model),
            **{f"torch_{split}": method["subjects"][0]["metrics"][split]["accuracy"] for split in ("test", "validation")},
            "multiply_adds": {"onnx": median_work(folded, lengths), "tflite": median_work(folded, padded)},
        }  # fmt: skip
        subjects = {s["file"]: s for r in self.ledger.records for s in r["subjects"] if s["file"]}
        for format_, file in FILES.items():
            path = self.folders["quantized"] / file
            row[format_] = {
                "size_bytes": path.stat().st_size, "download_bytes": compressed_bytes(path.read_bytes()),
                "test": subjects[file]["metrics"]["test"]["accuracy"], "validation": subjects[file]["metrics"]["validation"]["accuracy"],
            }  # fmt: skip
        return row


def median_work(folded: Any, lengths: np.ndarray) -> float:
    """Multiply-adds of the text in the middle of those timed."""
    return float(np.median([folded.multiply_adds(int(length)) for length in lengths]))


def timed_lengths(folders: dict[str, Path], recipe: Any) -> np.ndarray:
    return np.array([len(one.ids) for one in timed_texts(folders, recipe)])


def timed_texts(folders: dict[str, Path], recipe: Any) -> list[Encoding]:
    """Real test texts in an order in which every stretch is a fair mix."""
    rows = load_data(recipe.task, None).test
    drawn = np.random.default_rng(0).permutation(len(rows))[:TIMED_TEXTS]
    encoder = TextEncoder(folders["quantized"] / "tokenizer" / "tokenizer.json", recipe.task.max_length)
    return encoder.encode_batch([rows[i]["text"] for i in drawn], offsets=False)


def time_files(made: list[Made], rows: list[dict[str, Any]], rounds: int) -> None:
    """p50 and p90 of every int8 file, all in the same rounds."""
    texts = timed_texts(made[0].folders, made[0].ledger.recipe)
    candidates = [
        Candidate(f"{one.point.name} {format_}", one.folders["quantized"] / file, format_, "", texts, None, 0.0)
        for one in made for format_, file in FILES.items()
    ]  # fmt: skip
    measured = {m["name"]: m for m in measure(candidates, LocalTarget(), [1], [], rounds, 0.5, Progress().say)}
    for one, row in zip(made, rows, strict=True):
        for format_ in FILES:
            found = measured[f"{one.point.name} {format_}"]
            row[format_] |= {key: found[key] for key in ("p50_ms", "p90_ms", "mean_ms", "noise")} | {"memory_bytes": found["memory"]["model_bytes"]}


def measure_widths(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """p50 of MiniLM's shape with FFNs of neighbouring widths: which ones the kernels like. Weights are random."""
    from exporters.folding import fold
    from exporters.onnx_writer import write_onnx
    from exporters.quant_plan import QuantPlan
    from exporters.tflite_writer import write_tflite

    candidates, texts = [], [Encoding([101, *range(2000, 2000 + WIDTH_TOKENS - 2), 102], [0] * WIDTH_TOKENS)] * WIDTH_TEXTS
    for width in WIDTHS:
        torch.manual_seed(0)
        config = EncoderConfig(layers=[layer_shape(12, 32, [width]) for _ in range(6)], num_labels=150)
        folded = fold(Encoder(config).eval(), WIDTH_TOKENS)
        paths = {format_: folder / f"width-{width}.{format_}" for format_ in FILES}
        write_onnx(folded, paths["onnx"], QuantPlan())
        write_tflite(folded, paths["tflite"], [WIDTH_TOKENS], QuantPlan())
        candidates += [Candidate(f"{width} {format_}", path, format_, "", texts, None, 0.0) for format_, path in paths.items()]
    measured = {m["name"]: m["p50_ms"] for m in measure(candidates, LocalTarget(), [1], [], rounds, 0.5, Progress().say, memory=False)}
    return [{"width": width} | {format_: measured[f"{width} {format_}"] for format_ in FILES} for width in WIDTHS]


def checks(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the methods' papers, and the arithmetic, let one expect."""
    base = rows["unpruned"]
    listed: list[tuple[str, float, str, float]] = []
    marks = {"heads-50": 1.0, "gates-ffn-50": 1.0, "neurons-ffn-50": 1.0, "layerdrop-3": 1.5, "magnitude-40": 0.5, "flop-35": 1.0}
    for name, points in marks.items():
        if name in rows:
            lost = max(base[f]["test"] - rows[name][f]["test"] for f in FILES)
            listed.append((f"{name}: points of test accuracy lost by the worse int8 file", lost, "<=", points))
    for flop, svd in (("flop-35", "svd-35"), ("flop-35", "svd-35-healed"), ("flop-60", "svd-60")):
        if flop in rows and svd in rows:
            better = min(rows[flop][f]["test"] - rows[svd][f]["test"] for f in FILES)
            listed.append((f"{flop} above {svd}, points of test accuracy", better, ">", 0.0))
    for name, row in rows.items():
        for format_ in FILES if name != "unpruned" else ():
            ratio = row[format_]["p50_ms"] / base[format_]["p50_ms"]
            if row["kind"] == "structure":
                work = row["multiply_adds"][format_] / base["multiply_adds"][format_]
                listed.append((f"{name}, {format_}: time over time unpruned, per work over work unpruned", ratio / work, "<=", 1.25))
            else:
                listed.append((f"{name}, {format_}: time over time unpruned", ratio, "<=", 1.05))
    passed = {">": lambda v, m: v > m, "<=": lambda v, m: v <= m}
    return [{"what": what, "value": value, "bound": bound, "mark": mark, "ok": passed[bound](value, mark)} for what, value, bound, mark in listed]


if __name__ == "__main__":
    sys.exit(main())
