"""The C runner of ``agent/runner``: compiled once for each kind of machine, its runtime's library, its command line.

::

    runner/<key>/pocketbert-runner        under the cache; the key is of the sources and of what compiles them
    runner/<key>/libonnxruntime.so.1.31.1    a library out of a wheel or an AAR; the key is of that file

A kind of machine is what ``uname -m`` says of a board with glibc (x86_64, aarch64, armv7l), or Android's name for a phone's
ABI (arm64-v8a, armeabi-v7a).

What this does not do: send the runner anywhere (targets do); download compilers, libraries or the NDK; build for glibc older
than that of the compiler, which a board must have at least.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from device_bench.board_cache import boards_folder
from device_bench.elf import MACHINE_ABIS, read_elf
from runtimes.bundle import file_sha256
from runtimes.errors import BadInput

SOURCES = Path(__file__).parent / "agent" / "runner"
PROGRAM = "pocketbert-runner"
ANDROID_API = 24
LIBRARIES = {"onnx": "libonnxruntime.so", "tflite": "libLiteRt.so"}
WHEEL_FOLDERS = {"onnx": "onnxruntime/capi", "tflite": "ai_edge_litert"}
WHEELS = {"onnx": "onnxruntime", "tflite": "ai-edge-litert"}

_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-s")
_LINKED = ("-ldl", "-lm")
# Cross compiler and the Debian packages that bring it, for machines with glibc.
_COMPILERS = {
    "x86_64": ("x86_64-linux-gnu-gcc", "gcc and libc6-dev"),
    "aarch64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu and libc6-dev-arm64-cross"),
    "armv7l": ("arm-linux-gnueabihf-gcc", "gcc-arm-linux-gnueabihf and libc6-dev-armhf-cross"),
}
_NDK_TRIPLES = {"arm64-v8a": "aarch64-linux-android", "armeabi-v7a": "armv7a-linux-androideabi"}
_NDK_VARIABLE = "ANDROID_NDK_HOME"
# Keys of a job and of its session that are options of the runner under the same name.
_KEYS = (
    "mode", "model", "format", "threads", "inputs", "golden", "tolerance", "min_inferences", "min_seconds", "window_seconds", "output",
    "deadline_s", "root",
)  # fmt: skip
_SESSION_KEYS = ("graph_optimization_level", "memory_pattern", "memory_arena", "weight_cache")
_QUOTED_CHARACTERS = 600


def build_runner(abi: str, compiler: str | None = None) -> Path:
    """The runner for a kind of machine, from the cache if the same compiler has built these sources before.

    Args:
        compiler: the command that compiles and links for it, with options of its own if need be; found by itself if None.

    Raises:
        BadInput: no such kind of machine, no compiler for it (with what to install), or one that fails.
    """
    command = _find_compiler(abi) if compiler is None else shlex.split(compiler)
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    content = [*(path.read_bytes() for path in sources), shlex.join([*command, *_FLAGS, *_LINKED]).encode(), _version(abi, command)]
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in content)).hexdigest()
    program = _cache() / key / PROGRAM
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=program.parent) as folder:
            built = Path(folder) / PROGRAM
            files = [str(path) for path in sources if path.suffix == ".c"]
            _compile(abi, [*command, *_FLAGS, "-o", str(built), *files, *_LINKED])
            os.replace(built, program)
    return program


def runtime_library(format: str) -> Path:
    """The library in this machine's installed wheel.

    Raises:
        BadInput: the wheel is not installed.
    """
    wheel = WHEELS[_known(format)]
    module = importlib.util.find_spec(wheel.replace("-", "_"))
    folders = [] if module is None else [Path(folder).parent / WHEEL_FOLDERS[format] for folder in module.submodule_search_locations or ()]
    found = [path for folder in folders for path in sorted(folder.glob(LIBRARIES[format] + "*"))]
    if not found:
        raise BadInput(f"{format} files: no {LIBRARIES[format]} here; pip install {wheel}")
    return found[0]


def library_in(place: Path, format: str, abi: str) -> Path:
    """A runtime's library out of a wheel or an AAR (unpacked into the cache), out of a folder, or the library itself.

    Raises:
        BadInput: it is not there, it is for another kind of machine, or the archive is not one that may be unpacked.
    """
    if not place.exists():
        raise BadInput(f"{place}: no such file or folder; give a wheel, an AAR, a folder or {LIBRARIES[_known(format)]}")
    if place.is_dir():
        found = [path for pattern in _patterns(format, abi) for path in sorted(place.glob(pattern))]
        library = found[0] if found else None
    else:
        library = _unpack(place, format, abi) if zipfile.is_zipfile(place) else place
    if library is None:
        raise BadInput(f"{place}: holds no {LIBRARIES[format]} for {abi}: looked for {', '.join(_patterns(format, abi))}")
    _check_machine(library, abi)
    return library


def runner_arguments(job: dict[str, Any], runtime_library: Path | None) -> list[str]:
    """The options of the runner for a job of the agents' protocol, all paths as they are in it.

    Args:
        runtime_library: where the library lies on the machine that runs it; None for mode info without one.

    Raises:
        BadInput: a session or a case that has no option.
    """
    values = {key: job.get(key) for key in _KEYS} | {"runtime": runtime_library}
    cores, warmup = job.get("cores"), job.get("warmup")
    values["cores"] = cores if cores is None or isinstance(cores, str) else ",".join(str(core) for core in cores)
    if warmup is not None:
        values["warmup"] = ",".join(str(warmup[key]) for key in ("window", "tolerance", "max_seconds"))
    arguments = [part for key, value in values.items() if value is not None for part in (_option(key), str(value))]
    for case in job.get("cases") or ():
        arguments += ["--case", _case(case)]
    arguments += _session_arguments(job.get("session") or {})
    return [*arguments, "--watch-stdin"] if job.get("watch_stdin") else arguments


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _case(case: dict[str, Any]) -> str:
    if case["case"] not in ("texts", "length"):
        raise BadInput(f"case {case['case']!r} is none of texts, length")
    what = "texts" if case["case"] == "texts" else str(case["length"])
    return f"{what}:{case['min_inferences']}" if "min_inferences" in case else what


def _session_arguments(session: dict[str, Any]) -> list[str]:
    arguments = []
    for key, value in session.items():
        if key == "config":
            for name, setting in value.items():
                arguments += ["--config", f"{name}={setting}"]
        elif key in _SESSION_KEYS:
            arguments += [_option(key), str(int(value)) if isinstance(value, bool) else str(value)]
        elif key != "threads":  # those of the job count
            raise BadInput(f"session.{key}: {value!r} is no option of the runner")
    return arguments


# --- compilers ------------------------------------------------------------------------------------------------------


def _find_compiler(abi: str) -> list[str]:
    if abi in _NDK_TRIPLES:
        return [str(_ndk_compiler(abi))]
    if abi not in _COMPILERS:
        raise BadInput(f"no runner for {abi!r}: known are {', '.join([*_COMPILERS, *_NDK_TRIPLES])}")
    names = [_COMPILERS[abi][0]] + (["cc", "gcc", "clang"] if platform.machine() == abi else [])
    found = next((name for name in names if shutil.which(name) is not None), None)
    if found is None:
        raise BadInput(f"no compiler for {abi}: {', '.join(names)} not found; {_advice(abi)}")
    return [found]


def _ndk_compiler(abi: str) -> Path:
    ndk = os.environ.get(_NDK_VARIABLE)
    if not ndk:
        raise BadInput(f"no compiler for {abi}: {_advice(abi)}")
    name = f"{_NDK_TRIPLES[abi]}{ANDROID_API}-clang"
    found = sorted(Path(ndk).glob(f"toolchains/llvm/prebuilt/*/bin/{name}"))
    if not found:
        raise BadInput(f"{_NDK_VARIABLE}={ndk}: no toolchains/llvm/prebuilt/*/bin/{name} there; {_advice(abi)}")
    return found[0]


def _advice(abi: str) -> str:
    if abi in _COMPILERS:
        return f"install {_COMPILERS[abi][1]}, or name a compiler"
    return f"install an Android NDK (r23 or later) and set {_NDK_VARIABLE} to its folder, or name a compiler"


def _version(abi: str, command: list[str]) -> bytes:
    """What the compiler says of itself: an upgraded one builds anew."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BadInput(f"{shlex.join(command)}: cannot be run as a compiler: {error}; {_advice(abi)}") from error


def _compile(abi: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=300)
    if done.returncode != 0:
        raise BadInput(f"the runner does not compile for {abi} with {command[0]}: {done.stderr.strip()[-_QUOTED_CHARACTERS:]}; {_advice(abi)}")


def _cache() -> Path:
    return boards_folder().parent / "runner"


# --- libraries ------------------------------------------------------------------------------------------------------


def _known(format: str) -> str:
    if format not in LIBRARIES:
        raise BadInput(f"format {format!r} is none of {', '.join(LIBRARIES)}")
    return format


def _patterns(format: str, abi: str) -> list[str]:
    """Where the library lies in a folder of its own, in a wheel, and in an AAR."""
    name = LIBRARIES[format] + "*"
    return [name, f"{WHEEL_FOLDERS[format]}/{name}", f"jni/{MACHINE_ABIS.get(abi, abi)}/{name}"]


def _unpack(archive: Path, format: str, abi: str) -> Path | None:
    """The library, with the C++ library beside it that an AAR may bring; None if the archive has none for this machine."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {PurePosixPath(name): name for name in opened.namelist()}
            for member in members:
                if member.is_absolute() or ".." in member.parts:
                    raise BadInput(f"{archive}: has a member {str(member)!r} outside of its own folder; nothing of it was unpacked")
            # A pattern is matched from the right: only whole paths count.
            found = [m for pattern in _patterns(format, abi) for m in sorted(members) if m.match(pattern) and len(m.parts) == pattern.count("/") + 1]
            if not found:
                return None
            folder = _cache() / file_sha256(archive) / abi
            folder.mkdir(parents=True, exist_ok=True)
            for member in (found[0], found[0].with_name("libc++_shared.so")):
                if member in members and not (folder / member.name).exists():
                    _write_whole(folder / member.name, opened.read(members[member]))
            return folder / found[0].name
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise BadInput(f"{archive}: cannot be unpacked: {error}; was it copied whole?") from error


def _write_whole(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o755)
    os.replace(file.name, path)


def _check_machine(library: Path, abi: str) -> None:
    elf = read_elf(library)
    if not elf.runs_on([MACHINE_ABIS.get(abi, abi)]):
        raise BadInput(f"{library}: is for {elf.abi}, not for {abi}; take it from a wheel or an AAR for that")
    glibc = any(re.fullmatch(r"libc\.so\.\d+", name) for name in elf.needed)
    if glibc and abi in _NDK_TRIPLES:
        raise BadInput(f"{library}: needs glibc, which Android has not; take {library.name} from the runtime's AAR")
    if not glibc and "libc.so" in elf.needed and abi not in _NDK_TRIPLES:
        raise BadInput(f"{library}: is for Android; take {library.name} from a wheel for {abi}")
