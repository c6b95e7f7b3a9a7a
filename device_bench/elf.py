"""Which machine a program or library is made for, read from its ELF headers: so that a wrong one is found before it is sent.

What this does not do: check that the rest of the file is whole; read symbols or the versions of libraries that it needs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import BadInput

# e_machine of the ELF specification, with the bits of the file's class, by Android's name for the ABI.
ABI_MACHINES = {"arm64-v8a": (183, 64), "armeabi-v7a": (40, 32), "armeabi": (40, 32), "x86_64": (62, 64), "x86": (3, 32), "riscv64": (243, 64)}
# What `uname -m` calls a machine that runs an ABI, for places that are no Android.
MACHINE_ABIS = {"aarch64": "arm64-v8a", "armv7l": "armeabi-v7a", "armv8l": "armeabi-v7a", "x86_64": "x86_64", "i686": "x86", "riscv64": "riscv64"}
_LOAD, _DYNAMIC, _INTERPRETER = 1, 2, 3
_NEEDED, _STRING_TABLE = 1, 5


@dataclass(frozen=True)
class Elf:
    """
    Args:
        machine: e_machine and 32 or 64 bits, as in :data:`ABI_MACHINES`.
        interpreter: the loader that must be there to start it; None for a library.
        needed: names of the libraries that it is linked to.
    """

    machine: tuple[int, int]
    interpreter: str | None
    needed: tuple[str, ...]

    @property
    def abi(self) -> str:
        """Android's name for what it runs on, or the machine's number."""
        return next((abi for abi, machine in ABI_MACHINES.items() if machine == self.machine), f"machine {self.machine[0]}")

    def runs_on(self, abis: list[str]) -> bool:
        return any(ABI_MACHINES.get(abi) == self.machine for abi in abis)


def read_elf(path: Path) -> Elf:
    """Read the headers of a little-endian program or library.

    Raises:
        BadInput: there is no such file, or it is none of these.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
    if data[:4] != b"\x7fELF" or len(data) < 64 or data[4] not in (1, 2) or data[5] != 1:
        raise BadInput(f"{path}: is no program or library for Linux or Android (no little-endian ELF file)")
    try:
        return _read(data)
    except (struct.error, ValueError) as error:
        raise BadInput(f"{path}: its ELF headers are damaged; was it copied whole?") from error


def _read(data: bytes) -> Elf:
    wide = data[4] == 2
    (machine,) = struct.unpack_from("<H", data, 18)
    (table,) = struct.unpack_from("<Q" if wide else "<I", data, 32 if wide else 28)
    size, count = struct.unpack_from("<HH", data, 54 if wide else 42)
    segments = [_segment(data, table + size * index, wide) for index in range(count)]
    interpreter = next((_text(data, offset) for kind, offset, _, _ in segments if kind == _INTERPRETER), None)
    dynamic = next(((offset, length) for kind, offset, _, length in segments if kind == _DYNAMIC), None)
    needed = () if dynamic is None else _needed(data, dynamic, [segment for segment in segments if segment[0] == _LOAD], wide)
    return Elf((machine, 64 if wide else 32), interpreter, needed)


def _segment(data: bytes, at: int, wide: bool) -> tuple[int, int, int, int]:
    """(type, offset in the file, address in memory, bytes in the file)"""
    if wide:
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, at)
    else:
        kind, offset, address, _, length = struct.unpack_from("<IIIII", data, at)
    return kind, offset, address, length


def _needed(data: bytes, dynamic: tuple[int, int], loaded: list[tuple[int, int, int, int]], wide: bool) -> tuple[str, ...]:
    step = 16 if wide else 8
    entries = [struct.unpack_from("<QQ" if wide else "<II", data, dynamic[0] + step * index) for index in range(dynamic[1] // step)]
    names = [value for tag, value in entries if tag == _NEEDED]
    table = next((value for tag, value in entries if tag == _STRING_TABLE), None)
    for _, offset, address, length in loaded:
        if table is not None and address <= table < address + length:
            return tuple(_text(data, table - address + offset + name) for name in names)
    return ()


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode("utf-8", errors="replace")
