"""optimum: its ONNX export, quantized by its ORTQuantizer to dynamic int8, run by ONNX Runtime at each text's own length."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peer import Variant, agent_module, serve


def export(job: dict[str, Any]) -> Path:
    from optimum.onnxruntime import ORTModelForSequenceClassification

    folder = Path(job["folder"]) / "fp32"
    ORTModelForSequenceClassification.from_pretrained(job["model"], export=True).save_pretrained(folder)
    return folder


def build(job: dict[str, Any], per_channel: bool) -> list[Path]:
    """Export, and quantize for processors with AVX512-VNNI; one scale per tensor is optimum's own default."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    folder = Path(job["folder"]) / "int8"
    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=per_channel)
    ORTQuantizer.from_pretrained(export(job), file_name="model.onnx").quantize(save_dir=folder, quantization_config=config)
    return sorted(folder.glob("*.onnx"))


def build_fused(job: dict[str, Any]) -> list[Path]:
    """Optimum's ORTOptimizer at O2 (fused attention, skip-norm, GELU) before the quantizer of ONNX Runtime.

    ORTQuantizer refuses such a graph, because shape inference stops at fused operators; the function beneath it takes a
    default type for what has none.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from optimum.onnxruntime import AutoOptimizationConfig, ORTOptimizer

    folder = Path(job["folder"])
    config = AutoOptimizationConfig.O2()
    config.disable_shape_inference = True  # it stops at the fused operators too
    ORTOptimizer.from_pretrained(export(job)).optimize(save_dir=folder / "fused", optimization_config=config)
    target = folder / "model_quantized.onnx"
    quantize_dynamic(
        folder / "fused" / "model_optimized.onnx", target, per_channel=True, weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )  # fmt: skip
    return [target]


def load(files: list[str], job: dict[str, Any]):
    """The agent's own ONNX model: the very lines that time pocketbert's files."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return agent_module(job).OnnxModel(files[0], 1, onnxruntime)


VARIANTS = {
    "optimum_ort": Variant("avx512_vnni dynamic, per channel", lambda job: build(job, True), load),
    "optimum_ort_per_tensor": Variant("avx512_vnni dynamic, per tensor (the default)", lambda job: build(job, False), load),
    "optimum_ort_fused": Variant("ORTOptimizer O2, then dynamic int8, per channel", build_fused, load),
}

if __name__ == "__main__":
    sys.exit(serve(("optimum", "optimum-onnx", "onnxruntime", "transformers", "torch"), VARIANTS))
