"""Model files that others wrote: where they leave the model that they were made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from exporters.parity import torch_inputs
from runtimes.errors import IntegrityError
from runtimes.text import Encoding

UNRELATED = 0.9
"""Relative error from which a tensor counts as another one and not as a bad copy: zeros have 1, and so about have unrelated values."""


def operator_errors(path: Path, module: nn.Module, encoding: Encoding) -> dict[str, float]:
    """Relative error ``|y - y'| / |y|`` of every matrix product, and of every layer's result, of ``module`` in an ONNX file.

    Nothing is known of the file's names. What stands in it for a result is found by its values: of all its float tensors with as
    many numbers, the nearest; of the first token alone where the file computes no more. A result that is near none (the file fuses
    it with what follows) is left out.

    Args:
        module: the encoder in PyTorch.
        encoding: one input.

    Returns:
        Name in ``module`` -> error, in the order of computing.

    Raises:
        IntegrityError: the file cannot be run with all its tensors as outputs.
    """
    wanted = torch_tensors(module, encoding)
    by_size: dict[int, list[np.ndarray]] = {}
    for value in file_tensors(path, encoding):
        by_size.setdefault(value.size, []).append(value.reshape(-1))
    errors = {}
    for name, value in wanted.items():
        nearest = min(relative_error(found, flat) for flat in (value.reshape(-1), value[0]) for found in [*by_size.get(flat.size, []), 0 * flat])
        if nearest < UNRELATED:
            errors[name] = nearest
    return errors


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted)) / (float(np.linalg.norm(wanted)) or 1.0)


@torch.no_grad()
def torch_tensors(module: nn.Module, encoding: Encoding) -> dict[str, np.ndarray]:
    """Results of matrix products and of whole layers in PyTorch, float32 [n, d] each."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> object:
        def hook(part: nn.Module, given: object, result: torch.Tensor) -> None:
            found[name] = result.flatten(0, -2).float().numpy()

        return hook

    hooks = [part.register_forward_hook(keep(name)) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    try:
        layers = module.eval()(*torch_inputs(module, encoding), output_hidden_states=True).hidden_states
    finally:
        for hook in hooks:
            hook.remove()
    return found | {f"layer {number}" if number else "embeddings": value[0].float().numpy() for number, value in enumerate(layers)}


def file_tensors(path: Path, encoding: Encoding) -> list[np.ndarray]:
    """Every float32 tensor that the file computes for one input."""
    import onnxruntime

    model = onnx.load(path)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for node in model.graph.node for name in node.output if name and name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    row = np.asarray([encoding.ids], np.int64)
    feeds = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.asarray([encoding.types], np.int64)}
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        types = {item.name: np.int32 if item.type == "tensor(int32)" else np.int64 for item in session.get_inputs()}
        values = session.run(None, {name: feeds[name].astype(kind) for name, kind in types.items()})
    except Exception as error:  # onnxruntime raises a family of its own that is not public
        raise IntegrityError(f"{path}: onnxruntime cannot show what it computes inside: {error}") from error
    return [value for value in values if isinstance(value, np.ndarray) and value.dtype == np.float32]
