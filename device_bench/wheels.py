"""Wheels for another machine: pip on this one chooses and downloads them into the cache, and what no inference needs is cut out.

A project is taken in the version that is installed here, so that both ends measure the same; where that has no wheel for the
other machine's Python, in the newest that this project's own metadata allows. Once chosen, a wheel stays chosen.

What this does not do: follow dependencies (``provision.py`` names what an inference needs, which is less); build from source.
It connects to the package index that pip is configured for, so only commands that set something up may call it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from device_bench import board_cache
from runtimes.errors import BadInput, TargetUnreachable

_PIP_TIMEOUT_S = 1800.0
_QUOTED_CHARACTERS = 400
_NEWEST_GLIBC_TAG = 60
# Half of what LiteRT and onnxruntime weigh: another copy of the library, GPU and NPU parts, converters, tests, type stubs.
UNNEEDED = (
    "ai_edge_litert/libLiteRtWebGpuAccelerator.so", "ai_edge_litert/vendors/*", "ai_edge_litert/tools/*", "ai_edge_litert/aot/*",
    "onnxruntime/capi/libonnxruntime.so*", "onnxruntime/transformers/*", "onnxruntime/quantization/*", "onnxruntime/tools/*",
    "numpy/*/tests/*", "numpy/tests/*", "numpy/f2py/*", "*.pyi", "*.a", "*.h",
)  # fmt: skip


class NoWheel(TargetUnreachable):
    """The index has none for that machine; the message says what the nearest one needs."""


@dataclass(frozen=True)
class Machine:
    """What wheels have to fit.

    Args:
        python: "3.11".
        tags: platform tags that run there, the most demanding first.
        where: the machine in messages.
    """

    python: str
    tags: Sequence[str]
    where: str


def fetch_wheel(project: str, machine: Machine, say: Callable[[str], None], limits: str = "") -> Path:
    """A wheel of ``project`` for ``machine``, without its :data:`UNNEEDED` parts; from the cache if it was there before.

    Args:
        limits: further version specifiers, such as "<2".

    Raises:
        BadInput: this Python has no pip.
        NoWheel: there is none for that machine.
        TargetUnreachable: the package index does not answer.
    """
    specifiers = _specifiers(project, limits)
    recipe = {"project": project, "specifiers": specifiers, "python": machine.python, "tags": list(machine.tags), "unneeded": UNNEEDED, "version": 1}

    def build(folder: Path) -> None:
        say(f"downloading {project} for {machine.where}")
        with tempfile.TemporaryDirectory(prefix=".wheels-", dir=board_cache.boards_folder()) as downloads:
            wheel = _download(project, specifiers, machine, Path(downloads))
            _slim(wheel, folder / wheel.name)

    folder = board_cache.build_once(board_cache.place(f"wheel-{project}", recipe), build)
    (wheel,) = folder.glob("*.whl")
    return wheel


def required_glibc(wheel: str) -> str | None:
    """The oldest glibc that a wheel of this file name runs with; None for one that needs no certain one."""
    minors = [int(minor) for minor in re.findall(r"manylinux_2_([0-9]+)_", wheel)]
    minors += [17] * ("manylinux2014_" in wheel)
    return f"2.{min(minors)}" if minors else None


def _specifiers(project: str, limits: str) -> list[str]:
    """What to ask for, the best first: the version installed here, then this project's own range."""
    ranged = ",".join(filter(None, (_own_range(project), limits)))
    try:
        return list(dict.fromkeys((",".join(filter(None, (f"=={version(project)}", limits))), ranged)))
    except PackageNotFoundError:
        return [ranged]


def _own_range(project: str) -> str:
    """Versions that pocketbert says it works with, as in its metadata; "" if it says nothing."""
    try:
        lines = requires("pocketbert") or []
    except PackageNotFoundError:  # run from a source tree
        return ""
    ranges = []
    for line in lines:
        match = re.match(r"([A-Za-z0-9._-]+)\s*([^;]*)", line)
        if match[1].lower().replace("_", "-") == project and match[2].strip():
            extra = re.search(r"extra == ['\"]([^'\"]+)", line)
            ranges.append((extra[1] if extra else "", match[2].strip().strip("()")))
    # What training asks for is more than what a board needs.
    light = [text for extra, text in ranges if extra in ("", "onnx", "tflite")]
    return (light or [text for _, text in ranges] or [""])[0]


def _download(project: str, specifiers: Sequence[str], machine: Machine, folder: Path) -> Path:
    for specifier in specifiers:
        if wheel := pip_download(project + specifier, machine.python, machine.tags, folder):
            return wheel
    raise NoWheel(_why_none(project, specifiers[-1], machine, folder))


def _why_none(project: str, specifier: str, machine: Machine, folder: Path) -> str:
    asked = f"no wheel of {project}{specifier} fits ({machine.where})"
    architecture = re.sub("^manylinux[0-9_]*?_(?=[a-z])", "", machine.tags[-1]) if machine.tags else ""
    if not architecture:
        return f"{asked}: the index has wheels for glibc alone"
    wide = [f"manylinux_2_{number}_{architecture}" for number in range(_NEWEST_GLIBC_TAG, 16, -1)]
    if wheel := pip_download(project + specifier, machine.python, wide, folder):
        return f"{asked}: {'-'.join(wheel.name.split('-')[:2])} needs glibc {required_glibc(wheel.name)}"
    return f"{asked}: the index has none for {architecture} and Python {machine.python}"


def pip_download(requirement: str, python: str, tags: Sequence[str], folder: Path) -> Path | None:
    """The one wheel that fits best, downloaded into the empty ``folder``; None if the index has none.

    Raises:
        BadInput: this Python has no pip.
        TargetUnreachable: the package index does not answer.
    """
    platforms = [option for tag in tags for option in ("--platform", tag)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", python, *platforms, "--dest", str(folder), requirement,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise TargetUnreachable(f"{requirement}: no answer from the package index within {_PIP_TIMEOUT_S:g} s; try again") from error
    if done.returncode == 0:
        (wheel,) = folder.glob("*.whl")
        return wheel
    if "No module named pip" in done.stderr:
        raise BadInput(f"{sys.executable} has no pip, which downloads what boards need: {sys.executable} -m ensurepip")
    # pip says that it found nothing when it could not ask, too, after it has said that it retries.
    if "No matching distribution found" in done.stderr and "retrying" not in done.stderr.lower():
        return None
    raise TargetUnreachable(f"{requirement}: cannot be downloaded: {' '.join(done.stderr.split())[-_QUOTED_CHARACTERS:]}")


def _slim(wheel: Path, path: Path) -> None:
    """``wheel`` as a zip file to be unpacked as it is, of the same bytes each time it is made."""
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as slim:
        for info in source.infolist():
            # Where a wheel says for which scheme a file is, all that is imported goes to one place.
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", info.filename)
            if info.is_dir() or re.match(r"[^/]+\.data/", name) or any(fnmatch(name, part) for part in UNNEEDED):
                continue
            slim.writestr(zipfile.ZipInfo(name, info.date_time), source.read(info), zipfile.ZIP_DEFLATED)
