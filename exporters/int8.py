"""Model files -> int8 files: weights in 8 bits per channel, word tables too, activations quantized as they come.

ONNX through onnxruntime's quantizer, TFLite through ai-edge-quantizer. "Dynamic" means that an activation's range is
taken from itself at run time, so no calibration data is needed.

Source of the scheme: Jacob et al. 2018, arXiv:1712.05877 (affine quantization); Zafrir et al. 2019, Q8BERT,
arXiv:1910.06188 §4 (its post-training dynamic form).
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import onnx

from exporters.onnx_file import clean, drop_unused
from exporters.tflite_compact import compact

ONNX_OPERATORS = ["MatMul", "Gather"]


def quantize_onnx(source: Path, target: Path) -> None:
    """Write the int8 form of an ONNX file."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target.parent.mkdir(parents=True, exist_ok=True)
    prepared = target.with_suffix(".prepared.onnx")
    graph = onnx.load(source)
    gemm_to_matmul(graph.graph)
    onnx.save(graph, prepared)
    # The quantizer advises to pre-process every model; a file of ours needs none.
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(prepared, target, op_types_to_quantize=ONNX_OPERATORS, per_channel=True, weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
        prepared.unlink()
    made = onnx.load(target)
    clean(made)
    onnx.save(made, target)


def gemm_to_matmul(graph: onnx.GraphProto) -> None:
    """Rewrite Gemm (x W^T + b) as MatMul and Add in place: the dynamic quantizer knows no Gemm."""
    weights = {item.name: item for item in graph.initializer}
    nodes = []
    for node in graph.node:
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights or len(node.input) != 3:
            nodes.append(node)
            continue
        name = node.input[1]
        if options.get("transB", 0):
            turned = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights[name]).T.copy(), name + "_transposed")
            graph.initializer.append(turned)
            name = turned.name
        product = node.output[0] + "_product"
        nodes.append(onnx.helper.make_node("MatMul", [node.input[0], name], [product], name=node.name + "_matmul"))
        nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], list(node.output), name=node.name + "_add"))
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)


def quantize_tflite(source: Path, target: Path) -> None:
    """Write the int8 form of a TFLite file; all its signatures go on sharing their weights."""
    from ai_edge_quantizer import quantizer, recipe

    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        job = quantizer.Quantizer(str(source))
        job.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        job.quantize().export_model(str(target), overwrite=True)
    target.chmod(0o644)  # the quantizer makes it executable
    compact(target)
