"""Serialize a TFLite model so that equal parts are written once.

Signatures share their weights, but the schema's own serializer repeats for each of them what hangs on a tensor: for an
8-bit table of 17,000 rows that was 200 kB of scales and zero points per length bucket. A flatbuffer may point at one
place from many; here every distinct set of quantization parameters and every string is written once.

Buffers are written inside the flatbuffer, aligned to 16 bytes as the schema asks; tools that add metadata lose buffers
that lie behind it.

What this file does not do: change an operator or a weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

IDENTIFIER = b"TFL3"
ALIGNMENT_BYTES = 16


def pack(model: schema.ModelT) -> bytes:
    """The bytes of a .tflite file."""
    builder = flatbuffers.Builder(1 << 20)
    with _shared_parts():
        builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


@contextmanager
def _shared_parts() -> Iterator[None]:
    """While this lasts, generated serializers write equal quantization parameters and strings once, and align buffers."""
    plain_quantization, plain_buffer = schema.QuantizationParametersT.Pack, schema.BufferT.Pack
    plain_string = flatbuffers.Builder.CreateString
    written: dict[tuple, int] = {}
    vectors: dict[bytes, int] = {}
    strings: dict[str | bytes, int] = {}

    def vector(builder: flatbuffers.Builder, values: np.ndarray) -> int:
        key = values.dtype.str.encode() + values.tobytes()
        if key not in vectors:
            vectors[key] = builder.CreateNumpyVector(values)
        return vectors[key]

    def quantization(self: schema.QuantizationParametersT, builder: flatbuffers.Builder) -> int:
        if self.details is not None or self.min is not None or self.max is not None:
            return plain_quantization(self, builder)
        key = (self.quantizedDimension, *(None if a is None else np.asarray(a).tobytes() for a in (self.scale, self.zeroPoint)))
        if key not in written:
            scale = None if self.scale is None else vector(builder, np.asarray(self.scale, np.float32))
            # Zero points are mostly vectors of zeros: 8 bytes for each channel of the model, or for the widest matrix only.
            zero_point = None if self.zeroPoint is None else vector(builder, np.asarray(self.zeroPoint, np.int64))
            schema.QuantizationParametersStart(builder)
            if scale is not None:
                schema.QuantizationParametersAddScale(builder, scale)
            if zero_point is not None:
                schema.QuantizationParametersAddZeroPoint(builder, zero_point)
            schema.QuantizationParametersAddQuantizedDimension(builder, self.quantizedDimension)
            written[key] = schema.QuantizationParametersEnd(builder)
        return written[key]

    def buffer(self: schema.BufferT, builder: flatbuffers.Builder) -> int:
        if self.data is None:
            return plain_buffer(self, builder)
        content = np.asarray(self.data, dtype=np.uint8).tobytes()
        builder.StartVector(1, len(content), ALIGNMENT_BYTES)
        builder.head -= len(content)
        builder.Bytes[builder.head : builder.head + len(content)] = content
        vector = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)

    def string(self: flatbuffers.Builder, text: str | bytes, encoding: str = "utf-8", errors: str = "strict") -> int:
        if text not in strings:
            strings[text] = plain_string(self, text, encoding, errors)
        return strings[text]

    schema.QuantizationParametersT.Pack, schema.BufferT.Pack = quantization, buffer
    flatbuffers.Builder.CreateString = string
    try:
        yield
    finally:
        schema.QuantizationParametersT.Pack, schema.BufferT.Pack = plain_quantization, plain_buffer
        flatbuffers.Builder.CreateString = plain_string
