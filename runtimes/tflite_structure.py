"""Whether the bytes of a .tflite file hold together, checked before a native runtime sees them.

Runtimes follow the offsets of a flatbuffer as they are: one that leads out of the file, or an operator that reads a tensor nobody has computed,
ends the process with a signal, which no caller can catch. Here every offset is followed first, in Python:

- tables, vectors and strings lie inside the file, and tables are at addresses divisible by 4;
- numbers of tensors, buffers, operator codes and graphs exist;
- a constant has as many bytes as its shape and type need, and a tensor per channel as many scales as channels;
- an operator reads constants, inputs of its graph and what earlier operators computed, and no tensor is computed twice.

What this file does not do: know what an operator needs; a runtime checks that, mostly.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

from runtimes.errors import IntegrityError

IDENTIFIER = b"TFL3"
MOST_TABLES = 300_000
"""More than a hundred times what an encoder of 12 layers has for a signature: a damaged file could name one table millions of times."""
MOST_TENSOR_BYTES = 2**31
BITS = {
    0: 32, 1: 16, 2: 32, 3: 8, 4: 64, 6: 8, 7: 16, 8: 64, 9: 8, 10: 64, 11: 128, 12: 64, 15: 32, 16: 16, 17: 4, 18: 16, 19: 2, 20: 4,
    21: 8, 22: 8,
}  # fmt: skip
"""Bits of an element by the schema's TensorType; text, resources and variants have no fixed size."""
LEAVES_OUT = {16, 44, 52}
"""Operators, those of LSTMs, whose second input may be left out; of all others only inputs from the third on."""

Table = dict[str, Any]
"""Fields of a table by name, None where the file leaves one out, and how many bytes the file has, as ``file_bytes``."""
SCALARS = {"bool": "?", "i8": "b", "u8": "B", "i32": "i", "u32": "I", "u64": "Q"}
SCHEMA: dict[str, dict[int, tuple[str, str]]] = {
    "Model": {
        0: ("version", "u32"), 1: ("operator_codes", "[OperatorCode]"), 2: ("subgraphs", "[SubGraph]"), 3: ("description", "[u8]"),
        4: ("buffers", "[Buffer]"), 5: ("metadata_buffer", "[i32]"), 6: ("metadata", "[Metadata]"), 7: ("signatures", "[Signature]"),
    },
    "OperatorCode": {0: ("deprecated_code", "i8"), 1: ("custom_code", "[u8]"), 2: ("version", "i32"), 3: ("code", "i32")},
    "SubGraph": {
        0: ("tensors", "[Tensor]"), 1: ("inputs", "[i32]"), 2: ("outputs", "[i32]"), 3: ("operators", "[Operator]"), 4: ("name", "[u8]"),
    },
    "Tensor": {
        0: ("shape", "[i32]"), 1: ("type", "i8"), 2: ("buffer", "u32"), 3: ("name", "[u8]"), 4: ("quantization", "Quantization"),
        5: ("is_variable", "bool"), 6: ("sparsity", "Any"), 7: ("shape_signature", "[i32]"),
    },
    "Quantization": {
        0: ("min", "[4]"), 1: ("max", "[4]"), 2: ("scale", "[4]"), 3: ("zero_point", "[8]"), 4: ("details_type", "u8"), 5: ("details", "Any"),
        6: ("dimension", "i32"),
    },
    "Operator": {
        0: ("code_index", "u32"), 1: ("inputs", "[i32]"), 2: ("outputs", "[i32]"), 3: ("options_type", "u8"), 4: ("options", "Any"),
        5: ("custom_options", "[u8]"), 7: ("mutating", "[u8]"), 8: ("intermediates", "[i32]"), 12: ("options_2", "Any"),
    },
    "Buffer": {0: ("data", "[u8]"), 1: ("offset", "u64"), 2: ("size", "u64")},
    "Metadata": {0: ("name", "[u8]"), 1: ("buffer", "u32")},
    "Signature": {0: ("inputs", "[TensorMap]"), 1: ("outputs", "[TensorMap]"), 2: ("key", "[u8]"), 4: ("subgraph", "u32")},
    "TensorMap": {0: ("name", "[u8]"), 1: ("tensor", "u32")},
    "Any": {},
    "ReshapeOptions": {0: ("new_shape", "[i32]")},
    "SqueezeOptions": {0: ("squeeze_dims", "[i32]")},
}  # fmt: skip
"""Table -> number of a field -> its name and type; ``[4]`` is a vector of elements of 4 bytes that nobody reads here."""
OPTIONS = {17: "ReshapeOptions", 30: "SqueezeOptions"}
"""Options with a vector in them; those of other operators are scalars."""


def check_tflite(path: Path) -> None:
    """Read the structure of ``path``.

    Raises:
        IntegrityError: naming what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 8:
                raise IntegrityError(f"{path}: not a TFLite file: it has {path.stat().st_size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if data[4:8] != IDENTIFIER:
                    raise IntegrityError(f"{path}: not a TFLite file: bytes 4 to 8 are not {IDENTIFIER.decode()}")
                _check_model(_Reader(data).root())
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from error
    except _Damaged as error:
        raise IntegrityError(f"{path}: the TFLite file is damaged or cut off: {error}") from error


class _Damaged(Exception):
    """What does not hold, without the name of the file."""


class _Reader:
    """Tables of one flatbuffer. Every address is checked before it is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size = data, len(data)
        self._tables: dict[tuple[str, int], Table] = {}

    def root(self) -> Table:
        return self._table("Model", self._offset(0))

    def _bytes(self, at: int, count: int) -> None:
        if at < 0 or at + count > self.size:
            raise _Damaged(f"{count} bytes at address {at} of {self.size}")

    def _number(self, form: str, at: int) -> int:
        self._bytes(at, struct.calcsize(form))
        return struct.unpack_from(f"<{form}", self.data, at)[0]

    def _offset(self, at: int) -> int:
        """The address to which the offset at ``at`` leads."""
        return at + self._number("I", at)

    def _table(self, kind: str, at: int) -> Table:
        if (kind, at) in self._tables:
            return self._tables[kind, at]
        if len(self._tables) >= MOST_TABLES:
            raise _Damaged(f"more than {MOST_TABLES} tables")
        if at % 4:
            raise _Damaged(f"{kind} at address {at}, which 4 does not divide")
        layout = at - self._number("i", at)
        self._bytes(layout, 4)
        layout_bytes, table_bytes = struct.unpack_from("<HH", self.data, layout)
        self._bytes(layout, layout_bytes)
        self._bytes(at, table_bytes)
        if layout_bytes < 4 or layout_bytes % 2 or table_bytes < 4:
            raise _Damaged(f"{kind} at address {at} has no layout")
        places = struct.unpack_from(f"<{layout_bytes // 2 - 2}H", self.data, layout + 4)
        if any(place >= table_bytes for place in places):
            raise _Damaged(f"a field of {kind} at address {at} lies outside of it")
        read: Table = {"file_bytes": self.size}
        self._tables[kind, at] = read
        for number, (name, form) in SCHEMA[kind].items():
            place = places[number] if number < len(places) else 0
            if kind == "Operator" and name == "options" and place:
                form = OPTIONS.get(read["options_type"] or 0, form)
            read[name] = self._field(form, at + place) if place else None
        return read

    def _field(self, form: str, at: int) -> Any:
        if form in SCALARS:
            return self._number(SCALARS[form], at)
        if not form.startswith("["):
            return self._table(form, self._offset(at))
        start = self._offset(at)
        count, element = self._number("I", start), form[1:-1]
        if element in ("4", "8", "u8"):  # that many; what they hold is of no concern
            self._bytes(start + 4, count * {"4": 4, "8": 8, "u8": 1}[element])
            return count
        self._bytes(start + 4, 4 * count)
        if element == "i32":
            return struct.unpack_from(f"<{count}i", self.data, start + 4)
        if count > MOST_TABLES:
            raise _Damaged(f"more than {MOST_TABLES} tables")
        return [self._table(element, self._offset(start + 4 + 4 * i)) for i in range(count)]


def _check_model(model: Table) -> None:
    buffers = [_buffer_bytes(buffer, number) for number, buffer in enumerate(model["buffers"] or ())]
    codes = [max(code["code"] or 0, code["deprecated_code"] or 0) for code in model["operator_codes"] or ()]
    graphs = model["subgraphs"] or ()
    for number, graph in enumerate(graphs):
        _check_graph(graph, f"graph {number}", buffers, codes)
    for metadata in model["metadata"] or ():
        _index(metadata["buffer"] or 0, buffers, "metadata: buffer")
    for number, signature in enumerate(model["signatures"] or ()):
        place = f"signature {number}"
        _index(signature["subgraph"] or 0, graphs, f"{place}: graph")
        graph = graphs[signature["subgraph"] or 0]
        for side in ("inputs", "outputs"):
            named = [entry["tensor"] or 0 for entry in signature[side] or ()]
            if sorted(named) != sorted(graph[side] or ()):
                raise _Damaged(f"{place}: its {side} are not those of its graph")
            if any(entry["name"] is None for entry in signature[side] or ()):
                raise _Damaged(f"{place}: an entry of its {side} has no name")
        if signature["key"] is None:
            raise _Damaged(f"{place}: no name")


def _buffer_bytes(buffer: Table, number: int) -> int:
    """How many bytes a buffer holds, in its table or behind the flatbuffer."""
    if (buffer["offset"] or 0) > 1:  # 0 and 1 mean: none there
        if buffer["offset"] + (buffer["size"] or 0) > buffer["file_bytes"]:
            raise _Damaged(f"buffer {number} ends behind the end of the file")
        return buffer["size"] or 0
    return buffer["data"] or 0


def _check_graph(graph: Table, place: str, buffers: list[int], codes: list[int]) -> None:
    tensors = graph["tensors"] or ()
    there = {i for i, tensor in enumerate(tensors) if _check_tensor(tensor, f"{place}: tensor {i}", buffers) or tensor["is_variable"]}
    computed: set[int] = set()
    for number in graph["inputs"] or ():
        _index(number, tensors, f"{place}: input")
        _computes(number, there, computed, f"{place}: its inputs")
    for i, operator in enumerate(graph["operators"] or ()):
        own = f"{place}: operator {i}"
        _index(operator["code_index"] or 0, codes, f"{own}: code")
        may_lack = 1 if codes[operator["code_index"] or 0] in LEAVES_OUT else 2
        for at, number in enumerate(operator["inputs"] or ()):
            if number == -1 and at >= may_lack:
                continue
            _index(number, tensors, f"{own}: tensor")
            if number not in there and number not in computed:
                raise _Damaged(f"{own} reads tensor {number}, which nothing computes before it")
        for number in (*(operator["outputs"] or ()), *(n for n in operator["intermediates"] or () if n != -1)):
            _index(number, tensors, f"{own}: tensor")
        for number in operator["outputs"] or ():
            _computes(number, there, computed, own)
    for number in graph["outputs"] or ():
        _index(number, tensors, f"{place}: output")
        if number not in there and number not in computed:
            raise _Damaged(f"{place}: nothing computes output {number}")


def _computes(number: int, there: set[int], computed: set[int], who: str) -> None:
    if number in there or number in computed:
        raise _Damaged(f"{who} write tensor {number}, which is there already" if who.endswith("inputs") else f"{who} writes tensor {number} again")
    computed.add(number)


def _check_tensor(tensor: Table, place: str, buffers: list[int]) -> bool:
    """Whether the tensor is a constant."""
    shape, bits = tensor["shape"] or (), BITS.get(tensor["type"] or 0)
    if any(size < 0 for size in shape):
        raise _Damaged(f"{place} has the shape {list(shape)}")
    needed = 0 if bits is None else -(-prod(shape) * bits // 8)
    if needed > MOST_TENSOR_BYTES:
        raise _Damaged(f"{place} has the shape {list(shape)}, which is {needed} bytes")
    _index(tensor["buffer"] or 0, buffers, f"{place}: buffer")
    held = buffers[tensor["buffer"] or 0]
    if held and bits is not None and not tensor["sparsity"] and held != needed:
        raise _Damaged(f"{place} of shape {list(shape)} needs {needed} bytes and has {held}")
    quantization = tensor["quantization"]
    if quantization is not None and (quantization["scale"] or 0) > 1:
        scales, dimension = quantization["scale"], quantization["dimension"] or 0
        if not 0 <= dimension < len(shape) or shape[dimension] != scales:
            raise _Damaged(f"{place} of shape {list(shape)} has {scales} scales on axis {dimension}")
        if (quantization["zero_point"] or 0) not in (0, 1, scales):
            raise _Damaged(f"{place} has {scales} scales and {quantization['zero_point']} zero points")
    return held > 0


def _index(number: int, of: Any, what: str) -> None:
    if not 0 <= number < len(of):
        raise _Damaged(f"{what} {number} of {len(of)}")
