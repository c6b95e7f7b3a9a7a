"""Write a TFLite file again so that its signatures share what they have in common.

Signatures share their weights, but serializers repeat for each of them what hangs on a tensor: for an int8 word table
of 17,000 rows that is 200 kB of scales and zero points per length bucket. A flatbuffer may point at one place from
many; here every distinct set of quantization parameters and every string is written once.

Buffers are written inside the flatbuffer, aligned to 16 bytes as the schema asks. The quantizer leaves them behind it,
where tools that add metadata lose them.

Tensor names lose the Python modules in them (``pipeline.models.encoder.Layer_3/...`` becomes ``Layer_3/...``).

What this file does not do: change an operator or a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

IDENTIFIER = b"TFL3"
ALIGNMENT_BYTES = 16


def compact(path: Path) -> None:
    """Rewrite the file at ``path`` in place."""
    data = path.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    for buffer in model.buffers:
        if buffer.offset and buffer.offset > 1:  # 0 and 1 mean: inside the flatbuffer
            buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    for graph in model.subgraphs:
        _shorten_names(graph.tensors)
    builder = flatbuffers.Builder(len(data))
    with _shared_parts():
        builder.Finish(model.Pack(builder), IDENTIFIER)
    path.write_bytes(bytes(builder.Output()))


def _shorten_names(tensors: list[schema.TensorT]) -> None:
    short = [re.sub(rb"(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", b"", tensor.name) for tensor in tensors]
    if len(set(short)) == len({tensor.name for tensor in tensors}):  # the quantizer tells tensors apart by name
        for tensor, name in zip(tensors, short, strict=True):
            tensor.name = name


@contextmanager
def _shared_parts() -> Iterator[None]:
    """While this lasts, generated serializers write equal quantization parameters and strings once, and align buffers."""
    plain_quantization, plain_buffer = schema.QuantizationParametersT.Pack, schema.BufferT.Pack
    plain_string = flatbuffers.Builder.CreateString
    written: dict[tuple, int] = {}
    strings: dict[str | bytes, int] = {}

    def quantization(self: schema.QuantizationParametersT, builder: flatbuffers.Builder) -> int:
        arrays = (self.scale, self.zeroPoint, self.min, self.max)
        if self.details is not None:
            return plain_quantization(self, builder)
        key = (self.quantizedDimension, *(None if a is None else np.asarray(a).tobytes() for a in arrays))
        if key not in written:
            written[key] = plain_quantization(self, builder)
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
