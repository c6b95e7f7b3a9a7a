"""What a board's Python says of itself, which runtimes follow from it, and the scripts that make its environment."""

from __future__ import annotations

import json
import os
import platform
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from device_bench.board_python import PROBE, BoardPython, ask_python
from device_bench.provision import ENVIRONMENT, RUNTIMES, SURVEY, UNPACK, provision
from device_bench.targets.base import Finished
from runtimes.errors import BadInput, TargetUnreachable

PI5 = BoardPython((3, 11, 2), "aarch64", 8, "2.36", False, "CPython", "/usr/bin/python3.11", None, "/home/pi/.cache/pocketbert/board")
NARROW_PI = replace(PI5, machine="armv7l", pointer_bytes=4, numpy="1.24.2")


def board(python: BoardPython) -> SimpleNamespace:
    """As much of a target as is looked at before anything is downloaded."""
    return SimpleNamespace(name="rpi", board=python)


def test_this_python_as_a_board():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    found = BoardPython(**{**json.loads(done.stdout), "version": sys.version_info[:3]})
    assert json.loads(done.stdout)["version"] == list(sys.version_info[:3])
    assert found.machine == platform.machine()
    assert found.pointer_bytes == struct.calcsize("P")
    assert found.implementation == platform.python_implementation()
    assert found.release == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert os.path.realpath(found.executable) == os.path.realpath(sys.executable)
    if platform.libc_ver()[0] == "glibc":
        assert found.glibc == platform.libc_ver()[1]


@pytest.mark.parametrize(
    ("machine", "pointer_bytes", "architecture"),
    [("aarch64", 8, "aarch64"), ("arm64", 8, "aarch64"), ("aarch64", 4, "armv7l"), ("armv8l", 4, "armv7l"), ("armv7l", 4, "armv7l"),
     ("x86_64", 8, "x86_64"), ("x86_64", 4, "i686"), ("riscv64", 8, "riscv64"), ("armv6l", 4, "armv6l")],
)  # fmt: skip
def test_architecture_is_that_of_the_programs(machine, pointer_bytes, architecture):
    assert replace(PI5, machine=machine, pointer_bytes=pointer_bytes).architecture == architecture


def test_platform_tags_go_from_the_boards_glibc_down():
    tags = PI5.platform_tags()
    assert tags[0] == "manylinux_2_36_aarch64"
    assert tags[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert len(tags) == 36 - 17 + 2
    assert replace(PI5, glibc="2.31").platform_tags()[0] == "manylinux_2_31_aarch64"
    assert replace(PI5, glibc="2.17").platform_tags() == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    assert replace(PI5, glibc="2.5").platform_tags() == []
    assert replace(PI5, glibc=None, musl=True).platform_tags() == []


def test_narrow_programs_on_a_wide_kernel_are_named():
    narrow = replace(PI5, pointer_bytes=4)
    assert narrow.where == "Python 3.11, armv7l programs on a aarch64 kernel, glibc 2.36"
    assert PI5.where == "Python 3.11, aarch64, glibc 2.36"


@pytest.mark.parametrize(
    ("finished", "message"),
    [
        (Finished(127, "", "sh: 1: python3: not found\n"), "no python3 there.*install Python 3.9 or newer"),
        (Finished(1, "", "Fatal Python error: init_fs_encoding\n"), "does not work as a Python: exit code 1, 'Fatal Python error"),
        (Finished(0, "hello\n", ""), "does not work as a Python"),
        (Finished(0, json.dumps({**vars(PI5), "version": [3, 7, 3]}), ""), r"is Python 3\.7\.3, and the agent needs 3\.9 or newer"),
        (Finished(0, json.dumps({**vars(PI5), "version": [2, 7, 18]}), ""), r"is Python 2\.7\.18"),
    ],
)
def test_python_that_will_not_do(finished, message):
    target = SimpleNamespace(name="rpi", execute=lambda arguments, timeout_s: finished)
    with pytest.raises(TargetUnreachable, match=f"^rpi: .*{message}"):
        ask_python(target, "python3")


@pytest.mark.parametrize(
    ("python", "formats", "runtimes", "message"),
    [
        (replace(PI5, glibc=None, musl=True), ("onnx",), None, r"its C library is musl \(as on Alpine\), and the runtimes are made for glibc"),
        (replace(PI5, glibc=None), ("onnx",), None, "its C library is no glibc"),
        (replace(PI5, implementation="PyPy"), ("onnx",), None, "its Python is PyPy"),
        (NARROW_PI, ("onnx",), None, r"nothing that runs onnx files fits: of tflite-runtime, none runs onnx files \(Python 3\.11, armv7l"),
        (replace(NARROW_PI, machine="aarch64"), ("onnx",), None, "armv7l programs on a aarch64 kernel"),
        (replace(NARROW_PI, numpy=None), ("onnx", "tflite"), None, "nothing that runs onnx or tflite files fits: .*sudo apt install python3-numpy"),
        (replace(NARROW_PI, numpy="2.2.4"), ("tflite",), None, r"tflite-runtime needs numpy < 2, and the board's own is 2\.2\.4"),
        (replace(NARROW_PI, version=(3, 13, 5)), ("tflite",), None, r"no wheels for a Python newer than 3\.11 \(Python 3\.13, armv7l"),
        (replace(PI5, version=(3, 12, 3)), ("tflite",), ["tflite-runtime"], r"no wheels for a Python newer than 3\.11"),
    ],
)  # fmt: skip
def test_boards_that_nothing_fits(python, formats, runtimes, message):
    with pytest.raises(TargetUnreachable, match=f"^rpi: .*{message}"):
        provision(board(python), formats, runtimes)


@pytest.mark.parametrize(("formats", "runtimes"), [(("onnx",), ["tensorflow"]), (("pt",), None)])
def test_unknown_names(formats, runtimes):
    with pytest.raises(BadInput, match="known are"):
        provision(board(PI5), formats, runtimes)


def test_each_runtime_runs_a_known_format():
    assert {runtime.format for runtime in RUNTIMES.values()} == {"onnx", "tflite"}


# --- the scripts, run by this Python as a board's would --------------------------------------------------------------


def run_script(script: str, **asked) -> dict:
    done = subprocess.run([sys.executable, "-I", "-c", script, json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "a cache with äöü"


@pytest.fixture
def unpacked(cache, tmp_path) -> Path:
    """A wheel with the module ``greeting``, unpacked in the cache."""
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("greeting/__init__.py", "import sys\nhello = 'hello'\nprefix = sys.prefix\n")
    final = cache / "wheels" / "0123456789abcdef"
    final.parent.mkdir(parents=True)
    run_script(UNPACK, wheel=str(tmp_path / "w.whl"), unpacked=str(cache / ".new" / "w"), final=str(final))
    return final


def environment(cache: Path, wheels: list[Path], modules: list[str]) -> dict:
    probe = json.loads(subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout)
    release = "{}.{}".format(*probe["version"])
    return run_script(
        ENVIRONMENT, unfinished=str(cache / ".new" / "env"), final=str(cache / "env"), executable=probe["executable"], release=release,
        version=platform.python_version(), system="false", wheels=[str(wheel) for wheel in wheels], modules=modules,
    )  # fmt: skip


def test_unpacking_leaves_modules_with_their_byte_code_and_no_wheel(unpacked, tmp_path, cache):
    assert (unpacked / "greeting" / "__init__.py").is_file()
    assert list((unpacked / "greeting" / "__pycache__").glob("*.pyc"))
    assert not (tmp_path / "w.whl").exists()
    assert list((cache / ".new").iterdir()) == []


def test_environment_sees_its_wheels_and_nothing_of_the_system(unpacked, cache):
    assert environment(cache, [unpacked], ["greeting"]) == {}
    script = "import greeting, importlib.util, sys; print(greeting.hello, sys.prefix, importlib.util.find_spec('numpy'))"
    done = subprocess.run([cache / "env" / "bin" / "python3", "-c", script], capture_output=True, text=True, cwd="/")
    assert done.stdout == f"hello {cache / 'env'} None\n", done.stderr


def test_environment_that_does_not_load_does_not_appear(unpacked, cache):
    ((module, (code, said)),) = environment(cache, [unpacked], ["greeting", "no_such_module"]).items()
    assert (module, code) == ("no_such_module", 1)
    assert said.endswith("No module named 'no_such_module'")
    assert not (cache / "env").exists()


def test_survey_names_what_is_missing(unpacked, cache):
    asked = {"cache": str(cache), "staging": str(cache / ".new-x"), "environment": "env"}
    found = run_script(SURVEY, wheels=[unpacked.name, "fedcba9876543210"], **asked)
    assert found["missing"] == ["fedcba9876543210"]
    assert found["ready"] is False
    assert found["free_bytes"] > 0
    environment(cache, [unpacked], [])
    assert run_script(SURVEY, wheels=[], **asked)["ready"] is True
    assert (cache / ".new-x").is_dir()
