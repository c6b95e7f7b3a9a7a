"""Whether the bytes of an .onnx file hold together, checked before a native runtime sees them.

The messages of the file's protobuf are walked: the model, its graph and the graph's constants. A message that ends behind its end, a constant
with other bytes than its shape and type need, and one whose bytes lie in another file are refused.

What this file does not do: read nodes; the runtime does, and refuses what it does not know.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from math import prod
from pathlib import Path

from runtimes.errors import IntegrityError

BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 17: 8, 18: 8, 19: 8, 20: 8,
    21: 4, 22: 4,
}  # fmt: skip
"""Bits of an element by TensorProto.DataType; texts have no fixed size."""
GRAPH, INITIALIZER = 7, 5
DIMS, DATA_TYPE, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 1, 2, 9, 13, 14
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
LARGEST = 2**63


def check_onnx(path: Path) -> None:
    """Read the structure of ``path``.

    Raises:
        IntegrityError: naming what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise IntegrityError(f"{path}: not an ONNX file: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                graphs = [span for number, span in _fields(data, 0, len(data)) if number == GRAPH and isinstance(span, tuple)]
                if len(graphs) != 1:
                    raise IntegrityError(f"{path}: not an ONNX file: it holds {len(graphs)} graphs")
                for number, span in _fields(data, *graphs[0]):
                    if number == INITIALIZER:
                        _check_constant(data, span)
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from error
    except _Damaged as error:
        raise IntegrityError(f"{path}: the ONNX file is damaged or cut off: {error}") from error


class _Damaged(Exception):
    """What does not hold, without the name of the file."""


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """(number, value) of each field of the message at [at, end): a whole number, or (start, end) of what is longer."""
    while at < end:
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at, end)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at, end)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise _Damaged(f"a field of no known kind at byte {at}")
        if at + size > end:
            raise _Damaged(f"{size} bytes at byte {at} of {end}")
        yield number, (at, at + size)
        at += size


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _Damaged(f"it ends inside a number at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Damaged(f"a number without end at byte {at}")


def _check_constant(data: mmap.mmap, span: int | tuple[int, int]) -> None:
    if not isinstance(span, tuple):
        raise _Damaged("a constant that is a number")
    dims: list[int] = []
    bits, held = None, None
    for number, value in _fields(data, *span):
        if number == DIMS:
            dims += [value] if not isinstance(value, tuple) else list(_varints(data, *value))
        elif number == DATA_TYPE:
            bits = BITS.get(value) if not isinstance(value, tuple) else None
        elif number == RAW_DATA and isinstance(value, tuple):
            held = value[1] - value[0]
        elif number == EXTERNAL_DATA or (number == DATA_LOCATION and value):
            raise _Damaged("a constant whose bytes lie in another file")
    if any(size >= LARGEST for size in dims):
        raise _Damaged("a constant with a negative size")
    if held is not None and bits is not None and held != -(-prod(dims) * bits // 8):
        raise _Damaged(f"a constant of shape {dims} that has {held} bytes")


def _varints(data: mmap.mmap, at: int, end: int) -> Iterator[int]:
    while at < end:
        value, at = _varint(data, at, end)
        yield value
