"""The ecosystem's own converters, with their defaults: optimum, onnxruntime's quantizer, litert-torch, ai-edge-quantizer.

What a torch module becomes without this package. The baseline is written this way, comparisons start from it, and a
module that is no encoder of :mod:`pipeline.models.encoder` has no other.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.backends import SIGNATURE_PREFIX

OPSET = 17
TRACE_TOKENS = 16
"""Length of the text that is traced, where the model has so many positions; the ONNX file takes any length."""


def convert_onnx(model: nn.Module, path: Path, segments: int = 1) -> None:
    """Write ``model`` as ONNX through optimum.

    Args:
        model: as in :class:`_Named`. Its ``config`` is one of transformers, with ``heads``.
        path: where the file goes; its folder is made.
        segments: 2 if token types matter; the file takes ``token_type_ids`` then, if the model has two of them.
    """
    from optimum.exporters.onnx import export

    path.parent.mkdir(parents=True, exist_ok=True)
    positions = model.config.max_position_embeddings - getattr(model.config, "position_offset", 0)
    shapes = {"batch_size": 2, "sequence_length": min(TRACE_TOKENS, positions)}
    with _quiet():
        export(_Named(model).eval(), _export_config(model.config, _inputs(model, segments)), path, opset=OPSET, input_shapes=shapes)


def _export_config(config: Any, inputs: Sequence[str]) -> Any:
    """optimum's description of a model whose outputs are those of ``config.heads``."""
    from optimum.exporters.onnx.model_configs import BertOnnxConfig

    class HeadsOnnxConfig(BertOnnxConfig):
        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return {name: {0: "batch_size", 1: "sequence_length"} for name in inputs}

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            axes = {True: {0: "batch_size", 1: "sequence_length"}, False: {0: "batch_size"}}
            return {name: axes[head["tokens"] == "all"] for head in config.heads for name in head["outputs"]}

    return HeadsOnnxConfig(config, task="feature-extraction")


def _inputs(model: nn.Module, segments: int) -> list[str]:
    """Names of the inputs of a file, in order."""
    return ["input_ids", "attention_mask"] + (["token_type_ids"] if segments > 1 and model.config.type_vocab_size > 1 else [])


def quantize_onnx(source: Path, target: Path) -> None:
    """Write the int8 form of an ONNX file: weights per channel, activations as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


class _Named(nn.Module):
    """The model with outputs by name, as converters want them.

    ``model`` takes ``input_ids``, ``attention_mask`` and ``token_type_ids`` [b, n]; what it returns has ``outputs``, tensors by name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> dict[str, Tensor]:
        return self.model(input_ids, attention_mask, token_type_ids).outputs


def convert_tflite(model: nn.Module, path: Path, buckets: list[int], segments: int = 1) -> None:
    """Write ``model`` as TFLite through litert-torch with one signature for each length in ``buckets``; see :func:`convert_onnx`."""
    import litert_torch  # pulls jax: seconds to import, and nothing else here needs it

    named = _Named(model).eval()
    converter = litert_torch
    for length in buckets:
        sample = {name: torch.full((1, length), int(name != "token_type_ids"), dtype=torch.int32) for name in _inputs(model, segments)}
        converter = converter.signature(f"{SIGNATURE_PREFIX}{length}", named, sample_kwargs=sample)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        converter.convert().export(str(path))


def quantize_tflite(source: Path, target: Path) -> None:
    """Write the int8 form of a TFLite file: weights per channel, activations as they come."""
    from ai_edge_quantizer import quantizer, recipe

    target.parent.mkdir(parents=True, exist_ok=True)
    with _quiet():
        job = quantizer.Quantizer(str(source))
        job.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        job.quantize().export_model(str(target), overwrite=True)
    target.chmod(0o644)  # the quantizer makes it executable


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The converters tell every pass they run and warn of their own successors; errors come as exceptions all the same."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
