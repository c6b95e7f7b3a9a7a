"""The signatures of a TFLite file with their inputs in the order of the graph, read from its flatbuffer without any runtime.

A signature lists its inputs by name, sorted; tools that take inputs by position go by the order of the subgraph, which no
Python runtime tells for any but the first.

What this does not do: verify the file; read operators, weights or metadata.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import BadInput, IntegrityError

# Field numbers of schema.fbs, version 3.
_MODEL_SUBGRAPHS, _MODEL_SIGNATURES = 2, 7
_SUBGRAPH_TENSORS, _SUBGRAPH_INPUTS = 0, 1
_TENSOR_SHAPE, _TENSOR_NAME = 0, 3
_SIGNATURE_INPUTS, _SIGNATURE_KEY, _SIGNATURE_SUBGRAPH = 0, 2, 4
_MAP_NAME, _MAP_TENSOR = 0, 1


@dataclass(frozen=True)
class Input:
    """
    Args:
        name: in the signature, such as "input_ids".
        tensor: in the subgraph, such as "serving_16_input_ids".
        shape: [1, length].
    """

    name: str
    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """``subgraph`` 0 is what a tool runs that knows nothing of signatures. ``inputs`` are in the order of the subgraph."""

    key: str
    subgraph: int
    inputs: tuple[Input, ...]


def read_signatures(path: Path) -> list[Signature]:
    """In the order of the file; [] if it has none.

    Raises:
        BadInput: there is no such file.
        IntegrityError: it is no TFLite file, or cut off.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    if data[4:8] != b"TFL3":
        raise IntegrityError(f"{path}: is no TFLite file")
    try:
        model = _follow(data, 0)
        subgraphs = _tables(data, model, _MODEL_SUBGRAPHS)
        return [_signature(data, signature, subgraphs) for signature in _tables(data, model, _MODEL_SIGNATURES)]
    except (struct.error, IndexError) as error:
        raise IntegrityError(f"{path}: its structure is damaged; was it copied whole?") from error


def _signature(data: bytes, signature: int, subgraphs: list[int]) -> Signature:
    index = _integer(data, signature, _SIGNATURE_SUBGRAPH)
    tensors = _tables(data, subgraphs[index], _SUBGRAPH_TENSORS)
    names = {_integer(data, entry, _MAP_TENSOR): _string(data, entry, _MAP_NAME) for entry in _tables(data, signature, _SIGNATURE_INPUTS)}
    inputs = [
        Input(names.get(number, ""), _string(data, tensors[number], _TENSOR_NAME), _integers(data, tensors[number], _TENSOR_SHAPE))
        for number in _integers(data, subgraphs[index], _SUBGRAPH_INPUTS)
    ]
    return Signature(_string(data, signature, _SIGNATURE_KEY), index, tuple(inputs))


# --- flatbuffers --------------------------------------------------------------------------------------------------


def _follow(data: bytes, at: int) -> int:
    return at + struct.unpack_from("<I", data, at)[0]


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where a field of a table lies; None if it has its default."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    (length,) = struct.unpack_from("<H", data, vtable)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", data, vtable + place)[0] if place < length else 0
    return table + offset if offset else None


def _vector(data: bytes, table: int, number: int) -> tuple[int, int]:
    """(where the elements begin, how many)"""
    field = _field(data, table, number)
    if field is None:
        return 0, 0
    start = _follow(data, field)
    return start + 4, struct.unpack_from("<I", data, start)[0]


def _tables(data: bytes, table: int, number: int) -> list[int]:
    start, count = _vector(data, table, number)
    return [_follow(data, start + 4 * index) for index in range(count)]


def _integers(data: bytes, table: int, number: int) -> tuple[int, ...]:
    start, count = _vector(data, table, number)
    return struct.unpack_from(f"<{count}i", data, start)


def _integer(data: bytes, table: int, number: int) -> int:
    field = _field(data, table, number)
    return 0 if field is None else struct.unpack_from("<I", data, field)[0]


def _string(data: bytes, table: int, number: int) -> str:
    start, count = _vector(data, table, number)
    return data[start : start + count].decode("utf-8", errors="replace")
