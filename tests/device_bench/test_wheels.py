"""Choosing and cutting wheels: the real pip, with a folder of wheels made here instead of an index."""

from __future__ import annotations

import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from device_bench import wheels
from device_bench.wheels import Machine, NoWheel, fetch_wheel, required_glibc
from runtimes.errors import BadInput, TargetUnreachable

INSTALLED = version("numpy")
PI5 = Machine("3.11", [f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1)] + ["manylinux2014_aarch64"], "a Pi 5")
OLD_SYSTEM = Machine("3.11", ["manylinux_2_24_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"], "Python 3.11, aarch64, glibc 2.24")
OLD_PYTHON = Machine("3.9", PI5.tags, "Python 3.9, aarch64, glibc 2.36")


def write_wheel(folder: Path, project: str, number: str, tag: str, files: dict[str, bytes] | None = None) -> Path:
    name = project.replace("-", "_")
    path = folder / f"{name}-{number}-{tag}.whl"
    info = f"{name}-{number}.dist-info"
    content = {f"{name}/__init__.py": b"", **(files or {})}
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {project}\nVersion: {number}\n".encode()
    content[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    content[f"{info}/RECORD"] = b""
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in content.items():
            archive.writestr(file, data)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Folder of the wheels that pip finds; the cache is empty."""
    monkeypatch.setenv("POCKETBERT_CACHE", str(tmp_path / "cache"))
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index")}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_the_installed_version_is_taken_before_newer_ones(index):
    for number in (INSTALLED, "99.0.0"):
        write_wheel(index, "numpy", number, "cp311-cp311-manylinux_2_27_aarch64")
        write_wheel(index, "numpy", number, "cp311-cp311-manylinux_2_27_x86_64")
    said = []
    wheel = fetch_wheel("numpy", PI5, said.append)
    assert wheel.name == f"numpy-{INSTALLED}-cp311-cp311-manylinux_2_27_aarch64.whl"
    assert said == ["downloading numpy for a Pi 5"]


def test_another_version_where_the_installed_one_has_no_wheel(index):
    write_wheel(index, "numpy", INSTALLED, "cp311-cp311-manylinux_2_27_aarch64")
    for number in ("1.20.0", "1.26.4", "2.0.2"):
        write_wheel(index, "numpy", number, "cp39-cp39-manylinux_2_17_aarch64.manylinux2014_aarch64")
    assert fetch_wheel("numpy", OLD_PYTHON, print).name.startswith("numpy-2.0.2-cp39")
    assert fetch_wheel("numpy", OLD_PYTHON, print, "<2").name.startswith("numpy-1.26.4-cp39")


def test_versions_that_this_project_does_not_work_with_are_not_taken(index):
    write_wheel(index, "numpy", "1.20.0", "cp39-cp39-manylinux2014_aarch64")
    with pytest.raises(
        NoWheel, match=r"no wheel of numpy>=1\.26 fits \(Python 3\.9, aarch64, glibc 2\.36\): the index has none for aarch64 and Python 3\.9"
    ):
        fetch_wheel("numpy", OLD_PYTHON, print)


def test_glibc_that_is_too_old_is_named_with_the_one_that_is_needed(index):
    write_wheel(index, "numpy", INSTALLED, "cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64")
    with pytest.raises(NoWheel, match=rf"\(Python 3\.11, aarch64, glibc 2\.24\): numpy-{INSTALLED} needs glibc 2\.27"):
        fetch_wheel("numpy", OLD_SYSTEM, print)


def test_a_wheel_is_downloaded_once(index):
    path = write_wheel(index, "numpy", INSTALLED, "cp311-cp311-manylinux_2_27_aarch64")
    first = fetch_wheel("numpy", PI5, print)
    path.unlink()
    assert fetch_wheel("numpy", PI5, print) == first
    assert not list(first.parent.parent.glob(".*")), "downloads stay behind"


def test_what_no_inference_needs_is_cut_out_and_the_rest_is_the_same_each_time(index, monkeypatch, tmp_path):
    files = {
        "ai_edge_litert/libLiteRt.so": b"1", "ai_edge_litert/libLiteRtWebGpuAccelerator.so": b"2", "ai_edge_litert/vendors/x/lib.so": b"3",
        "ai_edge_litert/interpreter.pyi": b"4", "ai_edge_litert-9.data/platlib/beside/x.py": b"5", "ai_edge_litert-9.data/scripts/run": b"6",
    }  # fmt: skip
    write_wheel(index, "ai-edge-litert", "2.3.0", "cp311-cp311-manylinux_2_27_aarch64", files)
    wheel = fetch_wheel("ai-edge-litert", PI5, print)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.read("beside/x.py") == b"5"
    assert names == {"ai_edge_litert/__init__.py", "ai_edge_litert/libLiteRt.so", "beside/x.py"}
    monkeypatch.setenv("POCKETBERT_CACHE", str(tmp_path / "other"))
    assert fetch_wheel("ai-edge-litert", PI5, print).read_bytes() == wheel.read_bytes()


def test_a_machine_without_glibc(index):
    with pytest.raises(NoWheel, match="the index has wheels for glibc alone"):
        fetch_wheel("numpy", Machine("3.11", [], "Alpine"), print)


def test_index_that_does_not_answer(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in {"INDEX_URL": "http://127.0.0.1:1/simple", "RETRIES": "1", "TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(TargetUnreachable, match="cannot be downloaded") as caught:
        fetch_wheel("numpy", PI5, print)
    assert not isinstance(caught.value, NoWheel)


def test_python_without_pip(index, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(python))
    with pytest.raises(BadInput, match=r"has no pip.*-m ensurepip"):
        fetch_wheel("numpy", PI5, print)


@pytest.mark.parametrize(
    ("name", "glibc"),
    [
        ("onnxruntime-1.31.1-cp311-cp311-manylinux_2_28_aarch64.whl", "2.28"),
        ("numpy-2.4.6-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl", "2.27"),
        ("protobuf-7.36.2-cp310-abi3-manylinux2014_aarch64.whl", "2.17"),
        ("flatbuffers-25.12.19-py2.py3-none-any.whl", None),
    ],
)
def test_required_glibc(name, glibc):
    assert required_glibc(name) == glibc
