"""ELF headers: of this machine's own programs, and of made-up ones for machines that are not here."""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from device_bench.elf import MACHINE_ABIS, read_elf
from device_bench.runner_build import runtime_library
from runtimes.errors import BadInput


def write_elf(path: Path, machine: int, wide: bool, interpreter: str) -> Path:
    """Headers with one segment that names the loader."""
    name = interpreter.encode() + b"\0"
    head = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9) + struct.pack("<HHI", 3, machine, 1)
    if wide:
        head += struct.pack("<QQQIHHHHHH", 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        segment = struct.pack("<IIQQQQQQ", 3, 4, 120, 0, 0, len(name), len(name), 1)
    else:
        head += struct.pack("<IIIIHHHHHH", 0, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        segment = struct.pack("<IIIIIIII", 3, 84, 0, 0, len(name), len(name), 4, 1)
    path.write_bytes(head + segment + name)
    return path


def test_own_interpreter_runs_here():
    elf = read_elf(Path(sys.executable).resolve())
    assert elf.runs_on([MACHINE_ABIS[platform.machine()]])
    assert elf.interpreter and Path(elf.interpreter).exists()
    assert any(name.startswith("libc.so") for name in elf.needed)


def test_library_needs_what_binutils_say():
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf: install binutils")
    library = runtime_library("onnx")
    said = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    elf = read_elf(library)
    assert list(elf.needed) == re.findall(r"\(NEEDED\).*\[(.+)\]", said)
    assert elf.interpreter is None


@pytest.mark.parametrize(
    ("machine", "wide", "abi"),
    [(183, True, "arm64-v8a"), (40, False, "armeabi-v7a"), (62, True, "x86_64"), (3, False, "x86"), (243, True, "riscv64")],
)
def test_machines(tmp_path, machine, wide, abi):
    elf = read_elf(write_elf(tmp_path / "program", machine, wide, "/system/bin/linker"))
    assert (elf.abi, elf.interpreter, elf.needed) == (abi, "/system/bin/linker", ())
    assert elf.runs_on(["mips", abi])
    assert not elf.runs_on(["mips"])


def test_narrow_programs_are_not_those_of_the_wide_machine(tmp_path):
    """x32: e_machine of x86_64 in files of 32 bits."""
    elf = read_elf(write_elf(tmp_path / "program", 62, False, "/lib/ld"))
    assert not elf.runs_on(["x86_64", "x86"])
    assert elf.abi == "machine 62"


def test_no_program(tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(BadInput, match="no program or library"):
        read_elf(script)
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_elf(tmp_path / "nothing")


def test_damaged_program_is_named_at_any_length(tmp_path):
    data = Path(sys.executable).resolve().read_bytes()[:4096]
    path = tmp_path / "cut"
    for size in range(64, 800, 7):
        path.write_bytes(data[:size])
        try:
            read_elf(path)
        except BadInput as error:
            assert str(path) in str(error)
