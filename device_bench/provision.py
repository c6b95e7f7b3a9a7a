"""A private environment with numpy, tokenizers and runtimes on a board that needs no internet: this machine brings the wheels.

::

    ~/.cache/pocketbert/board/wheels/<digest>/    one unpacked wheel; shared by the environments, appears by one rename
    ~/.cache/pocketbert/board/env-<hash>/         bin/python3 and a list of the wheels it sees; tried before it appears
    ~/.cache/pocketbert/board/.new-<session>/     under way; goes with the session's lease, whatever ends it

An environment is what PEP 405 describes, written by us: a link to the board's interpreter and a pyvenv.cfg. The module venv
is not used, because many boards lack it or a part of it, and nothing else depends on whether they have it.

What this does not do: touch the board's own Python packages; install what a runtime needs for anything but inference; delete
environments that an update left unused (:func:`unprovision` deletes all).
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from device_bench.board_python import BoardPython
from device_bench.targets.base import Finished
from device_bench.wheels import Machine, NoWheel, fetch_wheel
from runtimes.bundle import file_sha256
from runtimes.errors import BadInput, IntegrityError, TargetUnreachable

DIGEST_CHARACTERS = 16
_SCRIPT_TIMEOUT_S = 900.0
# Byte code that the board makes of the sources, and blocks that files do not fill.
_SPACE_MARGIN = 1.1


class Board(Protocol):
    """What is needed of a connected board; :class:`device_bench.targets.ssh.SshTarget` is one.

    Attributes:
        name: what messages call it.
        board: the Python there.
        staging: a folder there for what is under way, gone when the connection ends.
    """

    name: str
    board: BoardPython
    staging: str

    def execute(self, arguments: list[str], timeout_s: float) -> Finished:
        """Run a command there."""

    def send(self, local: Path, remote: str) -> None:
        """Write a file there."""

    def sha256(self, remote: str) -> str:
        """Of a file there, in hexadecimal."""


@dataclass(frozen=True)
class Runtime:
    """A package that runs model files.

    Args:
        format: of the files.
        module: what is imported.
        limits: versions that can be used, besides those that this project allows.
        numpy_limits: versions of numpy that it works with, besides those.
        helpers: further projects that an inference imports.
        newest_python: the last release that it has wheels for; None while it is made for new ones.
    """

    format: str
    module: str
    limits: str = ""
    numpy_limits: str = ""
    helpers: tuple[str, ...] = ()
    newest_python: tuple[int, int] | None = None


RUNTIMES = {
    "onnxruntime": Runtime("onnx", "onnxruntime"),
    "ai-edge-litert": Runtime("tflite", "ai_edge_litert.interpreter", helpers=("ml-dtypes",)),
    "tflite-runtime": Runtime("tflite", "tflite_runtime.interpreter", limits="==2.14.0", numpy_limits="<2", newest_python=(3, 11)),
}
FORMATS = ("onnx", "tflite")
# Nobody makes wheels of these for 32-bit ARM: Debian's numpy is used, and the last runtime that had one.
_FROM_THE_SYSTEM = {"armv7l": ("numpy",)}
_ONLY_RUNTIMES = {"armv7l": ("tflite-runtime",)}

# The scripts need nothing but Python 3.9; arguments come as one JSON object, answers go as one.
SURVEY = """
import json, os, shutil, sys
asked = json.loads(sys.argv[1])
cache = asked["cache"]
os.makedirs(os.path.join(cache, "wheels"), mode=0o700, exist_ok=True)
missing = [digest for digest in asked["wheels"] if not os.path.isdir(os.path.join(cache, "wheels", digest))]
ready = os.path.exists(os.path.join(cache, asked["environment"], "bin", "python3"))
shutil.rmtree(asked["staging"], ignore_errors=True)
os.makedirs(asked["staging"], mode=0o700)
print(json.dumps({"missing": missing, "ready": ready, "free_bytes": shutil.disk_usage(cache).free}))
"""
UNPACK = """
import compileall, json, os, sys, zipfile
asked = json.loads(sys.argv[1])
with zipfile.ZipFile(asked["wheel"]) as archive:
    archive.extractall(asked["unpacked"])
os.remove(asked["wheel"])
compileall.compile_dir(asked["unpacked"], ddir=asked["final"], quiet=2)
try:
    os.rename(asked["unpacked"], asked["final"])
except OSError:
    if not os.path.isdir(asked["final"]):
        raise
print("{}")
"""
ENVIRONMENT = """
import json, os, subprocess, sys
asked = json.loads(sys.argv[1])
folder, executable = asked["unfinished"], asked["executable"]
packages = os.path.join(folder, "lib", "python" + asked["release"], "site-packages")
os.makedirs(packages)
os.makedirs(os.path.join(folder, "bin"))
python = os.path.join(folder, "bin", "python3")
os.symlink(executable, python)
settings = {"home": os.path.dirname(executable), "include-system-site-packages": asked["system"], "version": asked["version"]}
with open(os.path.join(folder, "pyvenv.cfg"), "w", encoding="utf-8") as file:
    file.writelines(key + " = " + value + chr(10) for key, value in settings.items())
with open(os.path.join(packages, "pocketbert.pth"), "w", encoding="utf-8") as file:
    file.writelines(wheel + chr(10) for wheel in asked["wheels"])
failed = {}
for module in asked["modules"]:
    tried = subprocess.run([python, "-c", "import " + module], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if tried.returncode:
        failed[module] = [tried.returncode, tried.stderr.decode(errors="replace").strip()[-400:]]
if not failed:
    try:
        os.rename(folder, asked["final"])
    except OSError:
        if not os.path.isdir(asked["final"]):
            raise
print(json.dumps(failed))
"""


def provision(
    target: Board, formats: Sequence[str] = FORMATS, runtimes: Sequence[str] | None = None, say: Callable[[str], None] = lambda _: None
) -> str:
    """The Python of an environment on the board that can run ``formats``; made at the first call, found at the next.

    Args:
        target: connected.
        runtimes: projects of :data:`RUNTIMES` to use; by default onnxruntime and ai-edge-litert, on 32-bit ARM tflite-runtime.
        say: is told what is downloaded and sent, and which format cannot be brought.

    Raises:
        BadInput: an unknown runtime, or no pip here.
        TargetUnreachable: nothing that runs these formats fits the board, with the reason; it has no room; a runtime does not
            load there; the package index does not answer.
    """
    board = target.board
    wheels, modules = _choose(target.name, board, formats, runtimes, say)
    by_digest = {file_sha256(wheel)[:DIGEST_CHARACTERS]: wheel for wheel in wheels}
    from_the_system = "true" if board.architecture in _FROM_THE_SYSTEM else "false"
    environment = {
        "wheels": [f"{board.cache}/wheels/{digest}" for digest in sorted(by_digest)], "executable": board.executable, "release": board.release,
        "system": from_the_system, "modules": modules,
    }  # fmt: skip
    name = "env-" + hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARACTERS]
    asked = {"cache": board.cache, "staging": target.staging, "wheels": list(by_digest), "environment": name}
    found = _run_there(target, SURVEY, asked, "looking at its cache")
    if not found["ready"]:
        _check_space(target, [by_digest[digest] for digest in found["missing"]], found["free_bytes"])
        for digest in found["missing"]:
            _send_wheel(target, by_digest[digest], digest, say)
        version = ".".join(map(str, board.version))
        places = {"unfinished": f"{target.staging}/{name}", "final": f"{board.cache}/{name}"}
        failed = _run_there(target, ENVIRONMENT, {**environment, **places, "version": version}, "making its environment")
        if failed:
            raise TargetUnreachable(_does_not_load(target, failed))
    return f"{board.cache}/{name}/bin/python3"


def unprovision(target: Board) -> None:
    """Delete every private environment of this user on the board. Nothing of them may be running.

    Raises:
        TargetUnreachable: they cannot be deleted.
    """
    done = target.execute(["rm", "-rf", target.board.cache], _SCRIPT_TIMEOUT_S)
    if done.exit_code != 0:
        raise TargetUnreachable(f"{target.name}: {target.board.cache} cannot be deleted: {done.stderr.strip()}")


def _choose(
    name: str, board: BoardPython, formats: Sequence[str], runtimes: Sequence[str] | None, say: Callable[[str], None]
) -> tuple[list[Path], list[str]]:
    """(wheels to bring, modules that must load with them)."""
    chosen = _runtimes(board, formats, runtimes)
    if board.implementation != "CPython":
        raise TargetUnreachable(f"{name}: its Python is {board.implementation}, and wheels of the runtimes are for CPython alone; name another")
    if board.glibc is None:
        what = "musl (as on Alpine)" if board.musl else "no glibc"
        raise TargetUnreachable(f"{name}: its C library is {what}, and the runtimes are made for glibc alone; use a system with glibc")
    machine = Machine(board.release, board.platform_tags(), board.where)
    wheels: dict[str, Path] = {}
    brought, reasons = [], []
    for runtime in chosen:
        known = RUNTIMES[runtime]
        try:
            if known.newest_python is not None and board.version[:2] > known.newest_python:
                newest = ".".join(map(str, known.newest_python))
                raise NoWheel(f"{runtime} has no wheels for a Python newer than {newest} ({board.where})")
            _check_system_numpy(board, runtime)
            mine = {runtime: fetch_wheel(runtime, machine, say, known.limits)}
            wheels |= mine | {helper: fetch_wheel(helper, machine, say) for helper in known.helpers}
            brought.append(known)
        except NoWheel as error:
            reasons.append(str(error))
    without = [kind for kind in formats if kind not in {RUNTIMES[runtime].format for runtime in chosen}]
    if without:
        usable = ", ".join(runtimes or _usable(board))
        reasons.append(f"of {usable}, none runs {' or '.join(without)} files ({board.where})")
    if not brought:
        raise TargetUnreachable(f"{name}: nothing that runs {' or '.join(formats)} files fits: {'; '.join(reasons)}")
    for reason in reasons:
        say(f"{name}: {reason}")
    if "numpy" not in _FROM_THE_SYSTEM.get(board.architecture, ()):
        wheels["numpy"] = fetch_wheel("numpy", machine, say, ",".join(filter(None, (known.numpy_limits for known in brought))))
    modules = ["numpy", *(known.module for known in brought)]
    try:
        wheels["tokenizers"] = fetch_wheel("tokenizers", machine, say)
        modules.append("tokenizers")
    except NoWheel as error:  # measuring does not need it: the texts come as ids
        say(f"{name}: {error}")
    return list(wheels.values()), modules


def _runtimes(board: BoardPython, formats: Sequence[str], runtimes: Sequence[str] | None) -> list[str]:
    for what, values, known in (("runtime", runtimes or (), RUNTIMES), ("format", formats, FORMATS)):
        unknown = [value for value in values if value not in known]
        if unknown:
            raise BadInput(f"{what} {unknown[0]!r}: known are {', '.join(known)}")
    return [runtime for runtime in runtimes or _usable(board) if RUNTIMES[runtime].format in formats]


def _usable(board: BoardPython) -> Sequence[str]:
    return _ONLY_RUNTIMES.get(board.architecture, ("onnxruntime", "ai-edge-litert"))


def _check_system_numpy(board: BoardPython, runtime: str) -> None:
    """Refuse a board whose own numpy would be used, but is not there or too new for the runtime."""
    if "numpy" not in _FROM_THE_SYSTEM.get(board.architecture, ()):
        return
    if board.numpy is None:
        raise NoWheel(f"no wheel of numpy fits ({board.where}), and the board has none of its own: sudo apt install python3-numpy")
    if RUNTIMES[runtime].numpy_limits == "<2" and int(board.numpy.split(".")[0]) >= 2:
        raise NoWheel(f"{runtime} needs numpy < 2, and the board's own is {board.numpy} ({board.where})")


def _check_space(target: Board, wheels: Sequence[Path], free_bytes: int) -> None:
    """Before anything is sent: unpacked wheels, the byte code of their sources, and the largest wheel itself."""
    needed = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            needed += sum(info.file_size * (2 if info.filename.endswith(".py") else 1) for info in archive.infolist())
    needed = int(_SPACE_MARGIN * (needed + max((wheel.stat().st_size for wheel in wheels), default=0)))
    if needed > free_bytes:
        sizes = f"{needed / 1e6:.0f} MB are needed, {free_bytes / 1e6:.0f} MB are free"
        raise TargetUnreachable(f"{target.name}: no room for the runtimes in {target.board.cache}: {sizes}; free some, or set XDG_CACHE_HOME there")


def _send_wheel(target: Board, wheel: Path, digest: str, say: Callable[[str], None]) -> None:
    say(f"{target.name}: sending {wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB)")
    there = f"{target.staging}/{digest}.whl"
    target.send(wheel, there)
    if target.sha256(there) != file_sha256(wheel):
        raise IntegrityError(f"{target.name}: {wheel.name} did not arrive whole; try again")
    asked = {"wheel": there, "unpacked": f"{target.staging}/{digest}", "final": f"{target.board.cache}/wheels/{digest}"}
    _run_there(target, UNPACK, asked, f"unpacking {wheel.name}")


def _run_there(target: Board, script: str, asked: dict, doing: str) -> dict:
    done = target.execute([target.board.executable, "-I", "-c", script, json.dumps(asked)], _SCRIPT_TIMEOUT_S)
    if done.exit_code != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.exit_code}"])[-1]
        raise TargetUnreachable(f"{target.name}: {doing} failed: {said}")
    try:
        return json.loads(done.stdout)
    except ValueError as error:
        raise TargetUnreachable(f"{target.name}: {doing} failed: not an answer: {done.stdout[:200]!r}") from error


def _does_not_load(target: Board, failed: dict[str, list]) -> str:
    reasons = "; ".join(f"{module}: {said.splitlines()[-1] if said else f'exit code {code}'}" for module, (code, said) in failed.items())
    return f"{target.name}: what was brought does not load there ({target.board.where}): {reasons}"
