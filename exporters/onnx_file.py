"""torch module -> ONNX file, through optimum's exporter configuration.

The file has int64 inputs under the hub's names, dynamic batch and length, and the opset that browsers and phones of
the last years read. Batch 1 or 100, the same file.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
from optimum.exporters.onnx import export
from optimum.exporters.onnx.model_configs import BertOnnxConfig, DistilBertOnnxConfig
from torch import nn

OPSET = 17
"""The first with LayerNormalization as one operator; read by onnxruntime 1.17+ and onnxruntime-web."""
IR_VERSION = 9
"""The newest that onnxruntime 1.17 reads."""


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
        export(model.eval(), kind(model.config, task="text-classification"), path, opset=OPSET, do_constant_folding=True)
    graph = onnx.load(path)
    clean(graph)
    onnx.save(graph, path)


def clean(graph: onnx.ModelProto) -> None:
    """Make the file small and the same every time: stable names, no source paths, the intended IR version."""
    graph.ir_version = IR_VERSION
    graph.doc_string = ""
    graph.producer_name, graph.producer_version = "pocketbert", ""
    del graph.metadata_props[:]
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
