"""Our files of the CLINC150 student against plain conversion of the same weights: ``results/files.json``.

    python benchmarks/files.py [--record] [--student FOLDER] [--rounds N]

    files      plain (optimum or litert-torch with their quantizers) and ours, in every precision: size, accuracy, latency
    static     a plain converter's static int8 with the calibration that everybody writes (padded texts), and ours
    fallback   a tensor that 8 bits destroy, planted in the real student: what the gate does about it, and how long it takes
    buckets    growth of the TFLite file with every further bucket
    operators  one matrix product and one attention in the forms that ONNX Runtime has; rows that TFLite computes together

The student is that of the clinc150 recipe, trained or from the cache. Everything runs on one thread; nothing else should
run. The exit code is 3 if a figure misses its mark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from device_bench.measurement import Candidate, measure
from device_bench.targets import LocalTarget
from exporters.buckets import choose_buckets
from exporters.calibration import calibrate, smooth
from exporters.converters import convert_onnx, convert_tflite, quantize_onnx, quantize_tflite
from exporters.folding import FoldedEncoder, fold
from exporters.onnx_writer import IR_VERSION, OPSET, write_onnx
from exporters.quant_plan import FLOAT32, INT4, INT8, INT8_STATIC, QuantPlan, rows_to_int8, tensor_bytes
from exporters.sensitivity import quantize_within
from exporters.tflite_writer import write_tflite
from pipeline.flow.cache import Cache, library_versions
from pipeline.flow.engine import run
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.models.hub import load_encoder
from pipeline.models.tokenizer_files import TOKENIZER
from pipeline.stages.file_evaluation import file_outputs
from pipeline.tasks import load_data
from runtimes.backends import load_model
from runtimes.errors import GateFailed
from runtimes.text import Encoding, TextEncoder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "files.json"
PLAIN_BUCKETS = [16, 32, 64]
CALIBRATION_TEXTS = 256
TIMED_TEXTS = 1000
ALLOWED_DROP = 0.5


class Student:
    """The model, its folded form, and the task's texts as token ids."""

    def __init__(self, folder: Path) -> None:
        recipe = load_recipe("clinc150")
        data = load_data(recipe.task, None)
        self.max_length = recipe.task.max_length
        self.model = load_encoder(folder).eval()
        self.folded = fold(self.model, self.max_length)
        encoder = TextEncoder(folder / TOKENIZER, self.max_length)
        texts = {split: [row["text"] for row in data.split(split)] for split in ("train", "validation", "test")}
        self.ids = {split: encoder.encode_batch(own, offsets=False) for split, own in texts.items()}
        self.labels = {split: [data.labels["logits"].index(row["label"]) for row in data.split(split)] for split in self.ids}
        drawn = np.random.default_rng(0).permutation(len(self.ids["train"]))[:CALIBRATION_TEXTS]
        self.calibration = [self.ids["train"][i] for i in drawn]
        self.buckets = choose_buckets([len(one.ids) for one in self.ids["train"]], self.folded.multiply_adds, 4, self.max_length)

    def accuracy(self, path: Path, split: str) -> float:
        answers = [int(one["logits"].argmax()) for one in file_outputs(path, self.ids[split])]
        return round(100 * float(np.mean(np.asarray(answers) == np.asarray(self.labels[split]))), 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--record", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--student", type=Path, help="model folder of a student fine-tuned on CLINC150, instead of the recipe's")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    student = Student(options.student or make_student())
    with tempfile.TemporaryDirectory(prefix="pocketbert-exporters-") as name:
        folder = Path(name)
        figures = {
            "machine": machine(), "student": "given" if options.student else "clinc150 recipe",
            "libraries": library_versions(), "rounds": options.rounds, "texts": TIMED_TEXTS,
            "files": compare_files(student, folder, options.rounds), "static": compare_static(student, folder),
            "fallback": measure_fallback(student, folder), "buckets": bucket_growth(student, folder), "operators": compare_operators(),
            "rows": row_steps(student, folder),
        }  # fmt: skip
    figures["checks"] = checks(figures)
    if options.record:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in figures["files"]:
        print(f"{row['name']:28s} {row['size_bytes'] / 1e6:7.3f} MB  {row['test']:.2f} %  p50 {row['p50_ms']:.4f} ms")
    for check in figures["checks"]:
        print(f"{'ok  ' if check['ok'] else 'MISS'} {check['what']}: {check['value']:.3g} ({check['bound']} {check['mark']:g})")
    return 0 if all(check["ok"] for check in figures["checks"]) else 3


def make_student() -> Path:
    """The student of the clinc150 recipe: the stages before ``export``, from the pipeline's cache if they are there."""
    recipe, cache = load_recipe("clinc150"), Cache()
    recipe.stages = recipe.stages[: [stage.use for stage in recipe.stages].index("export")]
    record = run(recipe, ROOT / "out" / "student", cache, Progress()).records[-1]
    return cache.artifacts(record["key"], record)["model"].folder


def machine() -> dict[str, Any]:
    conditions = LocalTarget().info()["conditions"]
    return {
        "cpu": conditions["cpu_model"], "isa": conditions["isa"], "cores": os.cpu_count(), "kernel": platform.release(),
        "python": platform.python_version(),
    }  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- files --------------------------------------------------------------------------------------------------------


def compare_files(student: Student, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Plain and ours in every precision: size, accuracy of the file, latency per real text."""
    say("files: plain conversion")
    convert_onnx(student.model, folder / "plain.onnx")
    quantize_onnx(folder / "plain.onnx", folder / "plain_int8.onnx")
    convert_tflite(student.model, folder / "plain.tflite", PLAIN_BUCKETS)
    quantize_tflite(folder / "plain.tflite", folder / "plain_int8.tflite")
    calibration = calibrate(student.folded, student.calibration)
    smoothed = smooth(student.folded, calibration.channels, 0.5)
    plans = {
        "float32": (student.folded, QuantPlan(FLOAT32)), "int8": (student.folded, QuantPlan(INT8)),
        "int8-static": (student.folded, QuantPlan(INT8_STATIC, (), calibration.ranges)),
        "int8-static, smooth 0.5": (smoothed, QuantPlan(INT8_STATIC, (), calibrate(smoothed, student.calibration).ranges)),
        "int4": (student.folded, QuantPlan(INT4)),
    }  # fmt: skip
    files = [
        ("plain ONNX float32", folder / "plain.onnx"), ("plain ONNX int8", folder / "plain_int8.onnx"),
        ("plain TFLite float32", folder / "plain.tflite"), ("plain TFLite int8", folder / "plain_int8.tflite"),
    ]  # fmt: skip
    for number, (precision, (model, plan)) in enumerate(plans.items()):
        for title, suffix in (("ONNX", "onnx"), ("TFLite", "tflite")):
            path = folder / f"ours_{number}.{suffix}"
            if suffix == "onnx":
                write_onnx(model, path, plan)
            else:
                write_tflite(model, path, student.buckets, plan)
            files.append((f"ours {title} {precision}", path))
    drawn = np.random.default_rng(0).permutation(len(student.ids["test"]))[:TIMED_TEXTS]
    inputs = [student.ids["test"][i] for i in drawn]
    candidates = []
    for name, path in files:
        golden = file_outputs(path, inputs[:16])
        tolerance = 0.01 * max(1.0, max(float(np.abs(one["logits"]).max()) for one in golden))
        candidates.append(Candidate(name, path, path.suffix[1:], "", inputs, golden, tolerance))
    measured = {m["name"]: m for m in measure(candidates, LocalTarget(), [1], [], rounds, 0.5, say) if m["case"] == "texts"}
    rows = []
    for name, path in files:
        say(f"files: {name}: accuracy")
        latency = {key: measured[name][key] for key in ("p50_ms", "p90_ms", "p99_ms", "mean_ms", "round_p50_ms", "load_ms")}
        scores = {split: student.accuracy(path, split) for split in ("validation", "test")}
        memory = measured[name]["memory"]["model_bytes"]
        rows.append({"name": name, "size_bytes": path.stat().st_size, **scores, **latency, "memory_bytes": memory})
    return rows


# --- int8 that breaks ---------------------------------------------------------------------------------------------


def compare_static(student: Student, folder: Path) -> dict[str, Any]:
    """Static int8 by onnxruntime's quantizer from texts padded to the longest, and ours from the same texts."""
    import logging

    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Padded(CalibrationDataReader):
        def __init__(self, inputs: Sequence[Encoding], length: int) -> None:
            self._feeds = iter([pad(one.ids, length) for one in inputs])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    found: dict[str, Any] = {"calibration_texts": len(student.calibration), "float32_test": student.accuracy(folder / "plain.onnx", "test")}
    logging.disable(logging.WARNING)
    for name, length in (("unpadded", 0), ("padded", student.max_length)):
        say(f"static: plain, {name} calibration")
        path = folder / f"plain_static_{name}.onnx"
        reader = Padded(student.calibration, length)
        quantize_static(folder / "plain.onnx", path, reader, per_channel=True, weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8)
        found[f"plain_{name}_test"] = student.accuracy(path, "test")
    logging.disable(logging.NOTSET)
    plan = QuantPlan(INT8_STATIC, (), calibrate(student.folded, student.calibration).ranges)
    write_onnx(student.folded, folder / "static.onnx", plan)
    write_tflite(student.folded, folder / "static.tflite", student.buckets, plan)
    return found | {f"ours_{suffix}_test": student.accuracy(folder / f"static.{suffix}", "test") for suffix in ("onnx", "tflite")}


def pad(ids: Sequence[int], length: int) -> dict[str, np.ndarray]:
    """Feeds of one text, filled up to ``length`` as calibration loaders do; not at all for 0."""
    row = np.zeros((1, max(length, len(ids))), np.int64)
    feeds = {"input_ids": row, "attention_mask": row.copy()}
    feeds["input_ids"][0, : len(ids)], feeds["attention_mask"][0, : len(ids)] = ids, 1
    return feeds


def measure_fallback(student: Student, folder: Path) -> dict[str, Any]:
    """A hidden unit that never matters but is always huge, planted in the real student's FFNs: 8 bits see nothing beside it."""
    broken = plant_outlier(student.folded)
    found: dict[str, Any] = {"allowed_drop": ALLOWED_DROP}
    probes = student.ids["validation"][:256]
    for name, write in (("onnx", write_onnx), ("tflite", lambda m, p, plan: write_tflite(m, p, student.buckets, plan))):
        path = folder / f"fallback.{name}"
        write(broken, path, QuantPlan(FLOAT32))
        floor = student.accuracy(path, "validation") - ALLOWED_DROP
        started = time.monotonic()
        try:
            outcome = quantize_within(
                lambda plan, to, write=write: write(broken, to, plan), path, QuantPlan(INT8), tensor_bytes(broken),
                lambda p: file_outputs(p, probes), lambda one: one["logits"].argmax(keepdims=True),
                lambda p: student.accuracy(p, "validation"), floor, say,
            )  # fmt: skip
        except GateFailed as error:
            found[name] = {"error": str(error), "seconds": round(time.monotonic() - started, 1)}
            continue
        found[name] = {
            "seconds": round(time.monotonic() - started, 1), "floor": floor, "first_validation": outcome.first_score,
            "validation": outcome.score, "test": student.accuracy(path, "test"), "kept": [asdict(d) for d in outcome.kept],
            "ranking": [asdict(d) for d in outcome.ranking[:5]], "size_bytes": path.stat().st_size,
        }  # fmt: skip
    return found


def plant_outlier(model: FoldedEncoder) -> FoldedEncoder:
    """The same function with one unit of every layer's first FFN at 10,000 for every token, which nothing reads."""
    layers = []
    for layer in model.layers:
        ffn = layer.ffns[0]
        bias, column = ffn.up.bias.copy(), ffn.down.weight.copy()
        bias[0], column[:, 0] = 1e4, 0.0
        ffn = replace(ffn, up=replace(ffn.up, bias=bias), down=replace(ffn.down, weight=column))
        layers.append(replace(layer, ffns=(ffn, *layer.ffns[1:])))
    return replace(model, layers=tuple(layers))


# --- shapes -------------------------------------------------------------------------------------------------------


def bucket_growth(student: Student, folder: Path) -> list[dict[str, Any]]:
    """Size of the int8 TFLite file with one to six buckets."""
    rows = []
    for count in range(1, 7):
        lengths = [len(ids) for ids in student.ids["train"]]
        buckets = choose_buckets(lengths, student.folded.multiply_adds, count, student.max_length)
        path = folder / "buckets.tflite"
        write_tflite(student.folded, path, buckets, QuantPlan(INT8))
        padded = np.asarray(buckets)[np.searchsorted(buckets, lengths)]
        rows.append({"buckets": buckets, "size_bytes": path.stat().st_size, "padded_tokens_mean": round(float(padded.mean()), 2)})
    return rows


def row_steps(student: Student, folder: Path) -> list[dict[str, Any]]:
    """Latency of the int8 TFLite student at every length up to 32: the kernel's tiles show as steps."""
    lengths = list(range(2, 33, 1))
    path = folder / "lengths.tflite"
    models = {}
    for length in lengths:
        write_tflite(student.folded, path, [length], QuantPlan(INT8))
        models[length] = load_model(path)
    samples: dict[int, list[int]] = {length: [] for length in lengths}
    for _ in range(4):
        for length, model in models.items():
            ids = student.ids["test"][0].ids[:1] * length
            timed(lambda model=model, ids=ids: model.run(ids), 60, samples[length])
    return [{"tokens": length, "p50_us": round(statistics.median(values) / 1e3, 2)} for length, values in samples.items()]


# --- operators ----------------------------------------------------------------------------------------------------


def compare_operators() -> list[dict[str, Any]]:
    """Forms of one matrix with its bias [width, width], chained eight times, and of one attention; microseconds each."""
    rows = []
    for width in (128, 256, 384, 768):
        for tokens in (1, 11, 128):
            forms = {form: matrix_session(form, width) for form in MATRIX_FORMS}
            rows.append({"what": "matrix", "width": width, "tokens": tokens} | race(forms, {"x": (tokens, width)}, CHAIN))
    for heads, size in ((4, 32), (12, 32), (12, 64)):
        for tokens in (11, 128):
            forms = {form: attention_session(form, heads, size) for form in ("separate operators", "MultiHeadAttention")}
            us = race(forms, {"x": (1, tokens, heads * size)}, CHAIN)
            rows.append({"what": "attention", "heads": heads, "head_size": size, "tokens": tokens} | us)
    for width in (256, 384, 768):
        for tokens in (11, 128):
            forms = {form: norm_session(form, width) for form in ("Add, LayerNormalization", "SkipLayerNormalization")}
            rows.append({"what": "norm", "width": width, "tokens": tokens} | race(forms, {"x": (1, tokens, width)}, CHAIN))
    return rows


CHAIN = 8
MATRIX_FORMS = ("float32", "separate operators", "DynamicQuantizeMatMul", "MatMulNBits 8", "MatMulNBits 4")


def race(forms: dict[str, Any], shapes: dict[str, tuple[int, ...]], per_run: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    feeds = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    samples: dict[str, list[int]] = {form: [] for form in forms}
    for _ in range(5):
        for form, session in forms.items():
            known = {item.name for item in session.get_inputs()}
            own = feeds | ({"mask": np.ones((1, shapes["x"][1]), np.int32)} if "mask" in known else {})
            timed(lambda session=session, own=own: session.run(None, own), 100, samples[form])
    return {"us": {form: round(statistics.median(values) / 1e3 / per_run, 3) for form, values in samples.items()}}


def timed(call: Callable[[], Any], count: int, samples: list[int]) -> None:
    for number in range(count + 10):
        start = time.perf_counter_ns()
        call()
        if number >= 10:
            samples.append(time.perf_counter_ns() - start)


def matrix_session(form: str, width: int) -> Any:
    draw = np.random.default_rng(0)
    nodes, constants, x = [], [], "x"
    for step in range(CHAIN):
        weight = (draw.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        codes, scales = rows_to_int8(weight)
        name = {part: f"{part}{step}" for part in ("w", "s", "b", "y", "p", "q", "qs", "qz", "m", "f", "c")}
        constants += [numpy_helper.from_array(scales, name["s"]), numpy_helper.from_array(np.zeros(width, np.float32), name["b"])]
        if form == "float32":
            constants.append(numpy_helper.from_array(np.ascontiguousarray(weight.T), name["w"]))
            nodes += [helper.make_node("MatMul", [x, name["w"]], [name["p"]]), helper.make_node("Add", [name["p"], name["b"]], [name["y"]])]
        elif form.startswith("MatMulNBits"):
            bits = int(form[-1])
            block = 32
            packed = draw.integers(0, 256, (width, width // block, block * bits // 8)).astype(np.uint8)
            spread = np.full(width * width // block, 0.5 / 2 ** (bits - 1) / np.sqrt(width), np.float32)
            constants += [numpy_helper.from_array(packed, name["w"]), numpy_helper.from_array(spread, name["q"])]
            options = {"K": width, "N": width, "bits": bits, "block_size": block, "accuracy_level": 4}
            inputs = [x, name["w"], name["q"], "", "", name["b"]]
            nodes.append(helper.make_node("MatMulNBits", inputs, [name["y"]], domain="com.microsoft", **options))
        else:
            constants.append(numpy_helper.from_array(np.ascontiguousarray(codes.T), name["w"]))
            if form == "DynamicQuantizeMatMul":
                nodes.append(helper.make_node(form, [x, name["w"], name["s"], "", name["b"]], [name["y"]], domain="com.microsoft"))
            else:
                nodes += [
                    helper.make_node("DynamicQuantizeLinear", [x], [name["q"], name["qs"], name["qz"]]),
                    helper.make_node("MatMulInteger", [name["q"], name["w"], name["qz"]], [name["m"]]),
                    helper.make_node("Cast", [name["m"]], [name["c"]], to=TensorProto.FLOAT),
                    helper.make_node("Mul", [name["qs"], name["s"]], [name["f"]]),
                    helper.make_node("Mul", [name["c"], name["f"]], [name["p"]]),
                    helper.make_node("Add", [name["p"], name["b"]], [name["y"]]),
                ]
        x = name["y"]
    return make_session(nodes, constants, [("x", TensorProto.FLOAT, ["n", width])], (x, ["n", width]))


def attention_session(form: str, heads: int, size: int) -> Any:
    width = heads * size
    shapes = {"apart": np.array([0, 0, heads, size]), "together": np.array([0, 0, width])}
    nodes, constants, x = [], [numpy_helper.from_array(value, name) for name, value in shapes.items()], "x"
    inputs: list[tuple[str, int, list[Any]]] = [("x", TensorProto.FLOAT, ["b", "n", width])]
    if form == "MultiHeadAttention":
        inputs.append(("mask", TensorProto.INT32, ["b", "n"]))
    else:
        constants.append(numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "hidden"))
    for step in range(CHAIN):
        y = f"y{step}"
        if form == "MultiHeadAttention":
            nodes.append(helper.make_node(form, [x, x, x, "", "mask"], [y], domain="com.microsoft", num_heads=heads, scale=1.0))
        else:
            for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
                nodes += [
                    helper.make_node("Reshape", [x, "apart"], [f"{part}r{step}"]),
                    helper.make_node("Transpose", [f"{part}r{step}"], [f"{part}{step}"], perm=order),
                ]
            nodes += [
                helper.make_node("MatMul", [f"q{step}", f"k{step}"], [f"s{step}"]),
                helper.make_node("Add", [f"s{step}", "hidden"], [f"h{step}"]),
                helper.make_node("Softmax", [f"h{step}"], [f"a{step}"], axis=-1),
                helper.make_node("MatMul", [f"a{step}", f"v{step}"], [f"c{step}"]),
                helper.make_node("Transpose", [f"c{step}"], [f"t{step}"], perm=[0, 2, 1, 3]),
                helper.make_node("Reshape", [f"t{step}", "together"], [y]),
            ]
        x = y
    return make_session(nodes, constants, inputs, (x, ["b", "n", width]))


def norm_session(form: str, width: int) -> Any:
    constants = [numpy_helper.from_array(np.full(width, value, np.float32), name) for name, value in (("g", 1.0), ("b", 0.0))]
    nodes, x = [], "x"
    for step in range(CHAIN):
        y = f"y{step}"
        if form == "SkipLayerNormalization":
            nodes.append(helper.make_node(form, [x, "x", "g", "b"], [y], domain="com.microsoft", epsilon=1e-12))
        else:
            nodes.append(helper.make_node("Add", [x, "x"], [f"s{step}"]))
            nodes.append(helper.make_node("LayerNormalization", [f"s{step}", "g", "b"], [y], axis=-1, epsilon=1e-12))
        x = y
    return make_session(nodes, constants, [("x", TensorProto.FLOAT, ["b", "n", width])], (x, ["b", "n", width]))


def make_session(nodes: list[Any], constants: list[Any], inputs: list[tuple[str, int, list[Any]]], output: tuple[str, list[Any]]) -> Any:
    import onnxruntime

    graph = helper.make_graph(
        nodes, "operators", [helper.make_tensor_value_info(*item) for item in inputs],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])], constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# --- marks --------------------------------------------------------------------------------------------------------


def checks(figures: dict[str, Any]) -> list[dict[str, Any]]:
    rows = {row["name"]: row for row in figures["files"]}
    sizes = [row["size_bytes"] for row in figures["buckets"]]
    growth = max(after / before - 1 for before, after in pairwise(sizes))
    static, fallback = figures["static"], figures["fallback"]

    def speed(kind: str) -> float:
        return rows[f"plain {kind} int8"]["p50_ms"] / rows[f"ours {kind} int8"]["p50_ms"]

    listed = [
        ("ONNX int8, times faster at p50 than its plain quantization", speed("ONNX"), ">=", 1.5),
        ("TFLite int8, times faster at p50 than its plain quantization", speed("TFLite"), ">=", 1.0),
        ("growth of the TFLite file with a further bucket", growth, "<", 0.02),
        ("static int8 with padded calibration: points that plain conversion loses", static["float32_test"] - static["plain_padded_test"], ">=", 5.0),
        ("static int8 with the same texts: points that our ONNX file loses", static["float32_test"] - static["ours_onnx_test"], "<=", 0.5),
        ("static int8 with the same texts: points that our TFLite file loses", static["float32_test"] - static["ours_tflite_test"], "<=", 0.5),
    ]
    for name in ("onnx", "tflite"):
        told = fallback[name]
        listed.append((f"fallback, {name}: seconds", told["seconds"], "<=", 300.0))
        listed.append((f"fallback, {name}: points above the floor", told.get("validation", 0.0) - told.get("floor", 100.0), ">=", 0.0))
    passed = {">=": lambda v, m: v >= m, "<=": lambda v, m: v <= m, "<": lambda v, m: v < m}
    return [{"what": what, "value": value, "bound": bound, "mark": mark, "ok": passed[bound](value, mark)} for what, value, bound, mark in listed]


if __name__ == "__main__":
    sys.exit(main())
