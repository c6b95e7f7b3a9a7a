"""Building the C runner, finding a runtime's library in wheels and AARs, and turning jobs into command lines."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from device_bench.runner_build import SOURCES, build_runner, library_in, runner_arguments, runtime_library
from runtimes.errors import BadInput
from tests.device_bench.test_runner import COMPILER, FORMATS, HERE, compile_library, run

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("POCKETBERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("compiler", [COMPILER, "clang", "aarch64-linux-gnu-gcc", "arm-linux-gnueabihf-gcc"])
def test_compiles_without_a_warning(compiler, tmp_path):
    if compiler is None or shutil.which(compiler) is None:
        pytest.skip(f"no {compiler or 'C compiler'} here")
    command = [compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", tmp_path / "runner", *sorted(SOURCES.glob("*.c")), "-ldl", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@needs_compiler
def test_a_runner_is_built_once(cache):
    runner = build_runner(HERE)
    built = runner.stat().st_mtime_ns
    assert build_runner(HERE) == runner
    assert runner.stat().st_mtime_ns == built
    assert runner.is_relative_to(cache / "runner")
    assert [path.name for path in runner.parent.iterdir()] == ["pocketbert-runner"]
    other = build_runner(HERE, f"{COMPILER} -O1")
    assert other != runner
    assert run(other, ["--mode", "info"]).code == 0


def test_what_is_missing_to_build_it_is_named(cache, monkeypatch, tmp_path):
    with pytest.raises(BadInput, match=r"no runner for 'sparc': known are x86_64, aarch64, armv7l, arm64-v8a, armeabi-v7a"):
        build_runner("sparc")
    with pytest.raises(BadInput, match=r"nowhere-cc -O2: cannot be run as a compiler.*or name a compiler"):
        build_runner(HERE, "nowhere-cc -O2")
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)
    with pytest.raises(BadInput, match=r"no compiler for arm64-v8a: install an Android NDK .* set ANDROID_NDK_HOME"):
        build_runner("arm64-v8a")
    monkeypatch.setenv("ANDROID_NDK_HOME", str(tmp_path))
    with pytest.raises(BadInput, match="bin/armv7a-linux-androideabi24-clang there"):
        build_runner("armeabi-v7a")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match=r"aarch64-linux-gnu-gcc.* not found; install gcc-aarch64-linux-gnu and libc6-dev-arm64-cross"):
        build_runner("aarch64")


@needs_compiler
def test_a_compiler_that_fails_is_quoted(cache):
    with pytest.raises(BadInput, match=r"(?s)does not compile for .* with .*-fno-such-thing.*install gcc"):
        build_runner("x86_64", f"{COMPILER} -fno-such-thing")


@needs_compiler
def test_the_ndks_compiler_is_found(cache, monkeypatch, tmp_path):
    """With this machine's compiler in its place: no NDK is here."""
    folder = tmp_path / "toolchains/llvm/prebuilt/linux-x86_64/bin"
    folder.mkdir(parents=True)
    (folder / "aarch64-linux-android24-clang").symlink_to(shutil.which(COMPILER))
    monkeypatch.setenv("ANDROID_NDK_HOME", str(tmp_path))
    assert build_runner("arm64-v8a").is_file()


@pytest.mark.parametrize("preset", ["host", "aarch64-linux-gnu", "android-arm64"])
def test_cmake_presets(preset, tmp_path, monkeypatch):
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here")
    for path in SOURCES.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    if preset == "aarch64-linux-gnu" and shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("no aarch64-linux-gnu-gcc here")
    if preset == "android-arm64" and not os.environ.get("ANDROID_NDK_HOME"):
        pytest.skip("no Android NDK here (ANDROID_NDK_HOME)")
    for step in (["cmake", "--preset", preset], ["cmake", "--build", "--preset", preset]):
        done = subprocess.run(step, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout + done.stderr
    program = tmp_path / "build" / preset / "pocketbert-runner"
    if preset == "host":
        assert run(program, ["--mode", "info"]).code == 0
    else:
        assert program.read_bytes()[18:20] == b"\xb7\0"  # AArch64


def test_libraries_of_wheels_aars_and_folders(cache, tmp_path):
    ours = compile_library(tmp_path / "lib/libLiteRt.so", "int ours;")
    wheel, bare = tmp_path / "ai_edge_litert-2.3.0.whl", tmp_path / "bare.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(ours, "ai_edge_litert/libLiteRt.so")
        archive.writestr("ai_edge_litert/__init__.py", "")
        archive.writestr("elsewhere/ai_edge_litert/libLiteRt.so", "not this one")
    found = library_in(wheel, "tflite", HERE)
    assert found.name == "libLiteRt.so"
    assert found.is_relative_to(cache)
    assert found.read_bytes() == ours.read_bytes()
    assert library_in(wheel, "tflite", HERE) == found
    assert library_in(ours, "tflite", HERE) == ours
    assert library_in(ours.parent, "tflite", HERE) == ours
    with zipfile.ZipFile(bare, "w") as archive:
        archive.writestr("README", "")
    with pytest.raises(BadInput, match=r"holds no libLiteRt.so for .*: looked for libLiteRt.so\*, ai_edge_litert/libLiteRt.so\*, jni/"):
        library_in(bare, "tflite", HERE)
    with pytest.raises(BadInput, match=r"holds no libonnxruntime.so"):
        library_in(wheel, "onnx", HERE)
    with pytest.raises(BadInput, match="no such file or folder"):
        library_in(tmp_path / "nowhere", "onnx", HERE)
    with pytest.raises(BadInput, match=r"libLiteRt.so: is for .*, not for "):
        library_in(wheel, "tflite", "aarch64" if HERE != "aarch64" else "x86_64")


def test_installed_wheels_are_found():
    for format in FORMATS:
        library = runtime_library(format)
        assert library_in(library, format, HERE) == library
        assert library_in(library.parents[1 if format == "tflite" else 2], format, HERE) == library
    with pytest.raises(BadInput, match="format 'pt' is none of onnx, tflite"):
        runtime_library("pt")


def test_an_aar_holds_the_library_of_each_phone(cache, tmp_path):
    def library(name: str, *linked: str) -> Path:
        options = ("-nostdlib", "-Wl,--no-as-needed", f"-Wl,-soname,{name}", *linked)
        return compile_library(tmp_path / name, f"int x{len(linked)};", *options, compiler="aarch64-linux-gnu-gcc")

    # Android's C library is called libc.so; glibc's libc.so.6.
    parts = {"libLiteRt.so": library("libLiteRt.so", str(library("libc.so"))), "libonnxruntime.so": library("libonnxruntime.so", "-lc")}
    aar = tmp_path / "runtime.aar"
    with zipfile.ZipFile(aar, "w") as archive:
        for name, part in parts.items():
            archive.write(part, f"jni/arm64-v8a/{name}")
            archive.writestr(f"jni/x86/{name}", "another phone's")
        archive.writestr("jni/arm64-v8a/libc++_shared.so", "C++")
    found = library_in(aar, "tflite", "arm64-v8a")
    assert found.read_bytes() == parts["libLiteRt.so"].read_bytes()
    assert (found.parent / "libc++_shared.so").read_text() == "C++"
    with pytest.raises(BadInput, match=r"libonnxruntime.so: needs glibc, which Android has not; take libonnxruntime.so from the runtime's AAR"):
        library_in(aar, "onnx", "arm64-v8a")
    with pytest.raises(BadInput, match=r"libLiteRt.so: is for Android; take libLiteRt.so from a wheel for aarch64"):
        library_in(aar, "tflite", "aarch64")


@pytest.mark.parametrize("name", ["../libLiteRt.so", "ai_edge_litert/../../libLiteRt.so", "/libLiteRt.so"])
def test_an_archive_that_leaves_its_folder_is_refused(name, cache, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr("ai_edge_litert/libLiteRt.so", "x")
        archive.writestr(name, "x")
    with pytest.raises(BadInput, match=r"outside of its own folder; nothing of it was unpacked"):
        library_in(tmp_path / "bad.whl", "tflite", HERE)


def test_an_archive_that_is_cut_off(cache, tmp_path):
    whole = tmp_path / "whole.whl"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.write(compile_library(tmp_path / "libLiteRt.so", "int ours;"), "ai_edge_litert/libLiteRt.so")
    data = bytearray(whole.read_bytes())
    data[200] ^= 255
    (tmp_path / "damaged.whl").write_bytes(data)
    with pytest.raises(BadInput, match=r"damaged.whl: cannot be unpacked: .*CRC.*; was it copied whole\?"):
        library_in(tmp_path / "damaged.whl", "tflite", HERE)


def test_a_job_as_options():
    job = {
        "mode": "latency", "model": "/a b/m.onnx", "format": "onnx", "threads": 2, "cores": [0, 2], "inputs": "i", "golden": None,
        "tolerance": 1e-05, "cases": [{"case": "texts"}, {"case": "length", "length": 16, "min_inferences": 100}, {"case": "length", "length": 8}],
        "warmup": {"window": 16, "tolerance": 0.05, "max_seconds": 2.0}, "min_inferences": 64, "min_seconds": 6.0,
        "deadline_s": 900, "watch_stdin": True,
        "session": {"threads": 4, "graph_optimization_level": "basic", "memory_pattern": False, "memory_arena": True, "config": {"a.b": "c=d"}},
    }  # fmt: skip
    expected = (
        "--mode latency --model '/a b/m.onnx' --format onnx --threads 2 --inputs i --tolerance 1e-05 --min-inferences 64 --min-seconds 6.0 "
        "--deadline-s 900 --runtime /lib.so --cores 0,2 --warmup 16,0.05,2.0 --case texts --case 16:100 --case 8 "
        "--graph-optimization-level basic --memory-pattern 0 --memory-arena 1 --config a.b=c=d --watch-stdin"
    )
    assert runner_arguments(job, Path("/lib.so")) == shlex.split(expected)
    assert runner_arguments({"mode": "info"}, None) == ["--mode", "info"]
    assert runner_arguments({"mode": "info", "cores": "big"}, None) == ["--mode", "info", "--cores", "big"]
    with pytest.raises(BadInput, match=r"session.speed: 9 is no option of the runner"):
        runner_arguments({"mode": "info", "session": {"speed": 9}}, None)
    with pytest.raises(BadInput, match="case 'all' is none of texts, length"):
        runner_arguments({"mode": "info", "cases": [{"case": "all"}]}, None)
