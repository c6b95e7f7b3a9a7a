"""What Python a board has, asked with one small script: which wheels fit it, and whether the agent runs on it at all.

What this does not do: import anything there; look for other interpreters than the one that was named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtimes.errors import TargetUnreachable

if TYPE_CHECKING:
    from device_bench.targets.base import RemoteTarget

LEAST_VERSION = (3, 9)
OLDEST_GLIBC_TAG = 17
_TIMEOUT_S = 120.0
_NOT_FOUND = 127
# Older names of the same machine, as 32-bit programs on its 64-bit kernel are told.
_ARCHITECTURES = {"arm64": "aarch64", "amd64": "x86_64", "armv8l": "armv7l"}
_NARROW = {"aarch64": "armv7l", "x86_64": "i686"}
# Read by Python 2.7 and newer, so that an old one can say that it is old.
PROBE = """
import glob, json, os, platform, struct, sys
def ask(what):
    try:
        return what()
    except Exception:
        return None
def numpy():
    from importlib.metadata import version
    return version("numpy")
libc = ask(lambda: os.confstr("CS_GNU_LIBC_VERSION")) or ""
cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
print(json.dumps({
    "version": list(sys.version_info[:3]), "machine": platform.machine(), "pointer_bytes": struct.calcsize("P"),
    "glibc": libc[6:] if libc.startswith("glibc ") else None, "musl": bool(glob.glob("/lib/ld-musl-*")),
    "implementation": platform.python_implementation(), "executable": getattr(sys, "_base_executable", sys.executable),
    "numpy": ask(numpy), "cache": os.path.join(cache, "pocketbert", "board"),
}))
"""


@dataclass(frozen=True)
class BoardPython:
    """One interpreter on a board.

    Attributes:
        machine: as the kernel names it; a 64-bit kernel may run 32-bit programs.
        pointer_bytes: 8, or 4 where the programs are 32-bit ones.
        glibc: its version, "2.31"; None for another C library.
        musl: that one is musl (Alpine).
        executable: the interpreter itself, not a virtual environment's link to it.
        numpy: version of the one it sees; None without.
        cache: folder for what is to stay on the board.
    """

    version: tuple[int, int, int]
    machine: str
    pointer_bytes: int
    glibc: str | None
    musl: bool
    implementation: str
    executable: str
    numpy: str | None
    cache: str

    @property
    def release(self) -> str:
        """As wheels count: "3.11"."""
        return f"{self.version[0]}.{self.version[1]}"

    @property
    def architecture(self) -> str:
        """Of the programs, as wheels name it."""
        machine = _ARCHITECTURES.get(self.machine, self.machine)
        return _NARROW.get(machine, machine) if self.pointer_bytes == 4 else machine

    @property
    def where(self) -> str:
        """For messages: "Python 3.11, aarch64, glibc 2.36"."""
        libc = f"glibc {self.glibc}" if self.glibc else "musl" if self.musl else "no glibc"
        narrow = f" programs on a {self.machine} kernel" if self.architecture != _ARCHITECTURES.get(self.machine, self.machine) else ""
        return f"Python {self.release}, {self.architecture}{narrow}, {libc}"

    def platform_tags(self) -> list[str]:
        """Wheels for Linux that run here, the most demanding first; [] without glibc."""
        if self.glibc is None:
            return []
        major, minor = (int(part) for part in self.glibc.split(".")[:2])
        newest = minor if major == 2 else OLDEST_GLIBC_TAG - 1
        tags = [f"manylinux_2_{number}_{self.architecture}" for number in range(newest, OLDEST_GLIBC_TAG - 1, -1)]
        return [*tags, f"manylinux2014_{self.architecture}"] if tags else []


def ask_python(target: RemoteTarget, python: str) -> BoardPython:
    """What ``python`` is on the board.

    Raises:
        TargetUnreachable: it is not there, is no Python, or is older than the agent needs.
    """
    done = target.execute([python, "-c", PROBE], _TIMEOUT_S)
    needed = ".".join(map(str, LEAST_VERSION))
    if done.exit_code == _NOT_FOUND:
        advice = f"install Python {needed} or newer (sudo apt install python3), or name another"
        raise TargetUnreachable(f"{target.name}: no {python} there, which the agent runs on; {advice}")
    try:
        found = json.loads(done.stdout)
        asked = BoardPython(**{**found, "version": tuple(found["version"])})
    except (ValueError, TypeError, KeyError) as error:
        said = (done.stderr.strip() or done.stdout.strip())[-300:]
        raise TargetUnreachable(f"{target.name}: {python} there does not work as a Python: exit code {done.exit_code}, {said!r}") from error
    if asked.version < LEAST_VERSION:
        version = ".".join(map(str, asked.version))
        raise TargetUnreachable(f"{target.name}: {python} there is Python {version}, and the agent needs {needed} or newer; name another")
    return asked
