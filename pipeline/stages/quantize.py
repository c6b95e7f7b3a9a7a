"""Quantize the exported files to int8 and measure the task's metric on the int8 files themselves."""

from __future__ import annotations

import shutil
from typing import ClassVar, Literal

from pipeline.stage import Context, Stage, Subject
from pipeline.stages.export import file_accuracy


class Quantize(Stage):
    """Weights in int8 per channel, word tables too; activations in int8 with ranges taken at run time."""

    use: ClassVar[str] = "quantize"
    needs: ClassVar[tuple[str, ...]] = ("exported",)
    gives: ClassVar[tuple[str, ...]] = ("quantized",)
    paper: ClassVar[str] = "Jacob et al. 2018, arXiv:1712.05877; Zafrir et al. 2019, Q8BERT, arXiv:1910.06188"
    effect: ClassVar[str] = "About a quarter of the bytes; faster where the processor multiplies 8-bit integers."

    scheme: Literal["int8-dynamic"] = "int8-dynamic"
    """``int8-dynamic`` needs no calibration data."""

    def run(self, context: Context) -> None:
        from exporters.int8 import quantize_onnx, quantize_tflite

        source, target = context.folder("exported"), context.output / "quantized"
        shutil.copytree(source / "tokenizer", target / "tokenizer")
        unique = {s["file"]: s["unique_params"] for record in context.history for s in record["subjects"] if s["file"]}
        for name, made, title, quantize in (
            ("onnx/model.onnx", "onnx/model_quantized.onnx", "ONNX int8", quantize_onnx),
            ("tflite/model_fp32.tflite", "tflite/model_int8.tflite", "TFLite int8", quantize_tflite),
        ):
            if not (source / name).is_file():
                continue
            quantize(source / name, target / made)
            scores, notes = file_accuracy(context, target / made, target / "tokenizer" / "tokenizer.json")
            context.subjects.append(Subject(title, unique[name], (target / made).stat().st_size, scores, made, "int8", notes))
