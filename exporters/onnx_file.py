"""torch module -> ONNX file, through optimum's exporter configuration.

The file has int64 inputs under the hub's names, dynamic batch and length, and the opset that browsers and phones of
the last years read. Batch 1 or 100, the same file.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from optimum.exporters.onnx import export
from optimum.exporters.onnx.model_configs import BertOnnxConfig, DistilBertOnnxConfig
from torch import nn

OPSET = 17
"""The first with LayerNormalization as one operator; read by onnxruntime 1.17+ and onnxruntime-web."""
IR_VERSION = 9
"""The newest that onnxruntime 1.17 reads."""
TRACE_TOKENS = 16
"""Length of the text that is traced, where the model has so many positions; the file takes any length."""


def export_onnx(model: nn.Module, path: Path) -> None:
    """Write ``model`` as ONNX.

    Args:
        model: takes ``input_ids``, ``attention_mask`` and, where its config has token types, ``token_type_ids``
            [b, n]; returns logits [b, C]. Its ``config`` is one of transformers.
        path: where the file goes; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind: Any = BertOnnxConfig if model.config.type_vocab_size else DistilBertOnnxConfig
    with warnings.catch_warnings():
        # optimum asks for the exporter that traces, which warns of its successor at every call.
        warnings.simplefilter("ignore")
        logging.getLogger("optimum").setLevel(logging.ERROR)
        export(
            model.eval(), kind(model.config, task="text-classification"), path, opset=OPSET,
            input_shapes={"batch_size": 2, "sequence_length": min(TRACE_TOKENS, model.config.max_position_embeddings)},
        )  # fmt: skip
    model_proto = onnx.load(path)
    fix_reshapes(model_proto)
    clean(model_proto)
    onnx.save(model_proto, path)


def fix_reshapes(model: onnx.ModelProto) -> None:
    """Give every Reshape that keeps its leading dimensions a constant target, in place.

    A traced ``x.reshape(x.shape[0], x.shape[1], 4, 32)`` asks for the sizes at run time, with five small operators
    for each of four reshapes in every layer. ONNX can say the same without asking: [0, 0, 4, 32], 0 for "as it is".
    """
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    known = {
        item.name: [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim]
        for item in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    graph = model.graph
    for node in graph.node:
        if node.op_type != "Reshape":
            continue
        before, after = known.get(node.input[0], []), known.get(node.output[0], [])
        target = [0 if i < len(before) and size == before[i] else size for i, size in enumerate(after)]
        if target and all(isinstance(size, int) for size in target) and target.count(0) != len(target):
            name = node.output[0] + "_shape"
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(target, dtype=np.int64), name))
            node.input[1] = name
    drop_unused(graph)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output depends on, in place."""
    wanted = {item.name for item in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    for field, items in (("node", kept[::-1]), ("initializer", [item for item in graph.initializer if item.name in wanted])):
        del getattr(graph, field)[:]
        getattr(graph, field).extend(items)


def clean(graph: onnx.ModelProto) -> None:
    """Make the file small and the same every time: stable names, no source paths, the intended IR version."""
    graph.ir_version = IR_VERSION
    graph.doc_string = ""
    graph.producer_name, graph.producer_version = "pocketbert", ""
    del graph.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
