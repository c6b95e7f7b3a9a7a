"""What all graphs of one TFLite file share: operator codes and constants, each once, and how quantized tensors are described.

What this file does not do: serialize (:mod:`exporters.tflite_pack`), or know of encoders.
"""

from __future__ import annotations

import numpy as np
from ai_edge_litert import schema_py_generated as schema

Operator = schema.BuiltinOperator
SCHEMA_VERSION = 3


class TfliteFile:
    """A file in the making."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version, self.model.description = SCHEMA_VERSION, b"pocketbert"
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []  # buffer 0 means: computed
        self.model.subgraphs, self.model.signatureDefs = [], []
        self._codes: dict[tuple[int, int], int] = {}
        self._buffers: dict[tuple[str, bytes], int] = {}

    def code(self, operator: int, version: int) -> int:
        if (operator, version) not in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode, code.version = operator, version
            code.deprecatedBuiltinCode = min(operator, Operator.PLACEHOLDER_FOR_GREATER_OP_CODES)  # very old readers know it alone
            self._codes[operator, version] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(code)
        return self._codes[operator, version]

    def buffer(self, array: np.ndarray) -> int:
        content = array.tobytes()
        key = (array.dtype.str, content)
        if key not in self._buffers:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(content, np.uint8)
            self._buffers[key] = len(self.model.buffers)
            self.model.buffers.append(buffer)
        return self._buffers[key]


def mapped(name: str, tensor: int) -> schema.TensorMapT:
    """An entry of a signature: ``name`` is tensor number ``tensor``."""
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name.encode(), tensor
    return entry


def quantization(scales: np.ndarray, zero: int = 0) -> schema.QuantizationParametersT:
    """One scale for all, or one for each row."""
    parameters = schema.QuantizationParametersT()
    parameters.scale, parameters.zeroPoint = scales.astype(np.float32), np.full(len(scales), zero, np.int64)
    return parameters


def affine(low: float, high: float) -> schema.QuantizationParametersT:
    """int8 codes for low..high, in which 0 has a code of its own."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return quantization(np.array([scale], np.float32), round(-128 - low / scale))


def packed(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, two a byte, the first in the low half."""
    flat = (codes.reshape(-1) & 0xF).astype(np.uint8)
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return flat[0::2] | flat[1::2] << 4
