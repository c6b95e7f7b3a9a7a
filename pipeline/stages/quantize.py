"""Quantize the model's files, measure the task's metric on the files themselves, and keep in float32 what does too much damage."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from pipeline.flow.ledger import GATE_SPLIT
from pipeline.flow.stage import Context, Stage, Subject
from pipeline.stages.export import DESCRIPTION, folded
from pipeline.stages.file_evaluation import encode_for_files, encodings, evaluate_file, file_outputs, file_score, make_decoder
from pipeline.tasks.base import better
from runtimes.errors import BadInput
from runtimes.text import Encoding

DEFAULTS = {"int8-dynamic": "int8", "int8-static": "int8-static", "int4": "int4"}
FILES = {
    "int8": (("onnx/model_quantized.onnx", "ONNX int8"), ("tflite/model_int8.tflite", "TFLite int8")),
    "int4": (("onnx/model_q4.onnx", "ONNX int4"), ("tflite/model_int4.tflite", "TFLite int4")),
}
"""Names by bits; those of ONNX files are what transformers.js looks for."""
OLD_RUNTIME_FILE = ("tflite/model_int8_tflite214.tflite", "TFLite int8 for 2.14")
FLOAT_FILES = {".onnx": "onnx/model.onnx", ".tflite": "tflite/model_fp32.tflite"}
QUANTIZATION = "quantization.json"
PROBE_TEXTS = 256


class Quantize(Stage):
    """Weights in 8 or 4 bits per output channel, the word table in 8 bits per row; activations by ``scheme``."""

    use: ClassVar[str] = "quantize"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("model", "exported")
    gives: ClassVar[tuple[str, ...]] = ("quantized",)
    paper: ClassVar[str] = (
        "Jacob et al. 2018, arXiv:1712.05877; Zafrir et al. 2019, Q8BERT, arXiv:1910.06188; Xiao et al. 2022, SmoothQuant, arXiv:2211.10438"
    )
    effect: ClassVar[str] = "About a quarter of the bytes (an eighth in 4 bits); faster where the processor multiplies 8-bit integers."

    scheme: Literal["int8-dynamic", "int8-static", "int4"] = "int8-dynamic"
    """``int8-dynamic`` takes the ranges of activations as they come; ``int8-static`` fixes them by calibration; ``int4`` stores
    matrices in 4 bits and computes in 8."""
    rules: list[tuple[str, Literal["float32", "int8", "int8-static", "int4"]]] = []
    """Exceptions as [pattern, precision], the first match decides: a regular expression on names like layers.0.ffns.1.up."""
    metric_drop: float = Field(0.5, ge=0)
    """Points of the task's primary metric on validation rows that a file may lose against its float32 form; beyond it the worst tensors
    stay in float32."""
    calibration_texts: int = Field(256, ge=1)
    """Training inputs that are run to find ranges (``int8-static``, ``smooth``)."""
    coverage: float = Field(1.0, ge=0.5, le=1)
    """Share of the calibration inputs whose extremes a range must hold; less than 1 ignores outliers."""
    smooth: float | None = Field(None, ge=0, le=1)
    """SmoothQuant's strength: moves uneven activations into weights wherever that costs no operator."""
    old_runtimes: bool = False
    """Write a TFLite file for tflite-runtime 2.14 too, int8-dynamic whatever the scheme, and run it there before it ships
    (see README, Old devices)."""

    @field_validator("rules")
    @classmethod
    def _expressions(cls, rules: list[tuple[str, str]]) -> list[tuple[str, str]]:
        for pattern, _ in rules:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern[:100]!r} is not a regular expression: {error}") from error
        return rules

    def run(self, context: Context) -> None:
        from exporters.calibration import calibrate, smooth
        from exporters.quant_plan import QuantPlan, tensor_names

        source, target = context.folder("exported"), context.output / "quantized"
        if self.old_runtimes:
            self._check_old_runtimes(source)
        shutil.copytree(source / "tokenizer", target / "tokenizer")
        described = json.loads((source / DESCRIPTION).read_text(encoding="utf-8"))
        model = folded(context.load("model"), context, described["output"])
        plan = QuantPlan(DEFAULTS[self.scheme], tuple((pattern, precision) for pattern, precision in self.rules))
        for warning in plan.unmatched(tensor_names(model)):
            context.note(f"warning: {warning}")
        if self.smooth is not None:
            model = smooth(model, calibrate(model, self._calibration_inputs(context, target)).channels, self.smooth)
        if "int8-static" in (plan.default, *(precision for _, precision in plan.rules)):
            ranges = calibrate(model, self._calibration_inputs(context, target), self.coverage).ranges
            plan = QuantPlan(plan.default, plan.rules, ranges)
        made: dict[str, Any] = {}
        for name, title in FILES["int4" if self.scheme == "int4" else "int8"]:
            if (source / FLOAT_FILES[Path(name).suffix]).is_file():
                made[name] = self._quantize(context, model, plan, described["buckets"], target, name, title)
        if self.old_runtimes:
            from pipeline.stages.old_runtime import check_on_old_runtime

            name, title = OLD_RUNTIME_FILE
            made[name] = self._quantize(context, model, plan.for_old_runtimes(), described["buckets"], target, name, title)
            check_on_old_runtime(context, target / name, target)
        (target / QUANTIZATION).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    def _check_old_runtimes(self, source: Path) -> None:
        """Refuse before any work what could not be checked at its end."""
        from pipeline.stages.old_runtime import old_python

        old_python()
        if not (source / FLOAT_FILES[".tflite"]).is_file():
            raise BadInput("quantize.old_runtimes: the export wrote no TFLite file; add tflite to export.formats")

    def _calibration_inputs(self, context: Context, target: Path) -> list[Encoding]:
        texts = encode_for_files(context, target, "train")
        return encodings(texts, np.random.default_rng(context.seed).permutation(len(texts))[: self.calibration_texts])

    def _quantize(self, context: Context, model: Any, plan: Any, buckets: list[int], target: Path, name: str, title: str) -> dict[str, Any]:
        """One file within its allowed drop, measured on the file; what was decided for the manifest."""
        from exporters.onnx_writer import write_onnx
        from exporters.quant_plan import tensor_bytes
        from exporters.sensitivity import quantize_within
        from exporters.tflite_writer import write_tflite

        texts = encode_for_files(context, target, GATE_SPLIT)
        probes = encodings(texts, np.linspace(0, len(texts) - 1, min(PROBE_TEXTS, len(texts))).astype(int))

        def write(chosen: Any, path: Path) -> None:
            if path.suffix == ".onnx":
                write_onnx(model, path, chosen)
            else:
                write_tflite(model, path, buckets, chosen, old_runtimes=name == OLD_RUNTIME_FILE[0])

        floor = self._float_score(context, name) - self.metric_drop
        outcome = quantize_within(
            write, target / name, plan, tensor_bytes(model), lambda path: file_outputs(path, probes), make_decoder(context).decisions,
            lambda path: file_score(context, path, texts, GATE_SPLIT), floor, context.note,
        )  # fmt: skip
        if outcome.kept:
            kept = ", ".join(damage.name for damage in outcome.kept)
            metric = context.task.primary
            before, after = (f"{better(metric, score):.2f} {metric.unit}" for score in (outcome.first_score, outcome.score))
            context.note(f"{title}: kept in float32: {kept}; {metric.title} {before} became {after}")
        self._report(context, target, name, title)
        return self._describe(outcome, floor)

    def _float_score(self, context: Context, name: str) -> float:
        """The float32 file's primary metric on validation rows, so that more is better."""
        metric, float_file = context.task.primary, FLOAT_FILES[Path(name).suffix]
        found = next(s["metrics"] for record in context.history for s in record["subjects"] if s["file"] == float_file)
        return better(metric, found[GATE_SPLIT][metric.name])

    def _describe(self, outcome: Any, floor: float) -> dict[str, Any]:
        """For the manifest: the plan, which tensors were kept in float32, and why (primary metric on validation rows)."""
        kept = [asdict(damage) for damage in outcome.kept]
        scheme = next(name for name, precision in DEFAULTS.items() if precision == outcome.plan.default)
        return {
            "scheme": scheme, "smooth": self.smooth, "rules": [list(rule) for rule in outcome.plan.rules], "kept_float32": kept,
            "validation": {"needed": round(floor, 3), "all_quantized": outcome.first_score, "shipped": outcome.score},
        }  # fmt: skip

    def _report(self, context: Context, target: Path, name: str, title: str) -> None:
        unique = next(s["unique_params"] for record in context.history for s in record["subjects"] if s["file"])
        precision = "int4" if title.endswith("int4") else "int8"
        metrics = evaluate_file(context, target / name, target)
        context.subjects.append(Subject(title, unique, (target / name).stat().st_size, metrics, name, precision))
