"""A "board" out of this machine's own programs: a root file system and processes of its own, of which nothing stays behind.

The board sees /usr, /etc, /opt and the tests' Python environment read-only, and otherwise empty folders in memory. It has
its own process ids, so that ending it ends everything that was started on it, and on request its own network.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SYSTEM_FOLDERS = ("/usr", "/etc", "/opt")
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, CLONE_NEWNET = 1, 0x40000000


def why_impossible() -> str | None:
    """What this machine lacks for a board of its own, None if nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, to make mount, process and network namespaces; nothing outside them is changed"
    done = subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], capture_output=True, text=True)
    return None if done.returncode == 0 else f"needs mount, process and network namespaces: {done.stderr.strip()}"


def die_with_the_tests() -> None:
    """For ``preexec_fn``: the kernel kills the child when the thread that started it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_until(is_so: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


class Board:
    """A daemon on a root of its own, running until :meth:`stop`.

    Args:
        folder: an empty folder of this machine for the mount point, the script and the log.
        daemon: the command that serves, as the board sees it.
        shared: path on the board -> folder of this machine that is seen there, writable.
        memory: path on the board -> size in bytes of a file system in memory of its own.
        network: whether the board has a network of its own, which :meth:`inside` enters.
        passwd: lines for /etc/passwd, instead of this machine's.
        environment: of the daemon.
        daemon_path: PATH of the daemon where its own is not to be this machine's.
    """

    def __init__(
        self, folder: Path, daemon: Sequence[str], shared: Mapping[str, Path], memory: Mapping[str, int], network: bool, passwd: str,
        environment: Mapping[str, str], daemon_path: str | None = None,
    ) -> None:  # fmt: skip
        root = folder / "root"
        root.mkdir()
        self.log = folder / "board.log"
        (folder / "passwd").write_text(passwd)
        (folder / "start.sh").write_text(_script(root, folder, daemon, shared, memory, daemon_path))
        command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=SIGKILL", *(["--net"] if network else [])]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "sh", "-eu", str(folder / "start.sh")], env=dict(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=die_with_the_tests,
            )  # fmt: skip
        wait_until(lambda: self._children() or self._process.poll() is not None, "the board's first process")
        wait_until(lambda: (folder / "ready").exists() or self._process.poll() is not None, "the board's mounts")
        assert self._process.poll() is None, self.log.read_text()
        self.pid = self._children()[0]

    def _children(self) -> list[int]:
        return children(self._process.pid)

    def path(self, name: str) -> Path:
        """A file of the board as this machine sees it."""
        return Path(f"/proc/{self.pid}/root") / name.lstrip("/")

    def processes(self) -> dict[int, str]:
        """Process id (of this machine) -> command line of everything that runs on the board, but for its first process."""
        found = {}
        waiting = children(self.pid)
        while waiting:
            pid = waiting.pop()
            waiting += children(pid)
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except FileNotFoundError:  # it ended meanwhile
                continue
        return {pid: command for pid, command in found.items() if command}  # a process without one is dead and not yet collected

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and what it starts meanwhile, uses the board's network: 127.0.0.1 is the board."""
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self.pid}/ns/net") as other:
            _enter(other.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())

    def stop(self) -> None:
        """End every process of the board; none is left when this returns."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)  # the first of its process ids: the kernel ends the others with it
        self._process.wait()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _enter(network: int) -> None:
    if LIBC.setns(network, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _script(root: Path, folder: Path, daemon: Sequence[str], shared: Mapping[str, Path], memory: Mapping[str, int], daemon_path: str | None) -> str:
    """Shell script of the board's first process: mounts, then the daemon; it collects dead processes until the daemon ends."""
    lines = [f"cd {shlex.quote(str(root))}", "mount -t tmpfs -o mode=755 board .", f"cd {shlex.quote(str(root))}", "mkdir -p proc sys dev tmp"]
    lines += ["mount -t proc proc proc", "mount --rbind /sys sys", "mount --rbind /dev dev", "chmod 1777 tmp"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/") / name
        if path.is_symlink():
            lines.append(f"ln -s {shlex.quote(os.readlink(path))} {name}")
        elif path.exists():
            lines += [f"mkdir {name}", f"mount --rbind /{name} {name}"]
    environments = dict.fromkeys(path for path in (sys.prefix, sys.base_prefix) if not path.startswith(SYSTEM_FOLDERS))
    for path in (*SYSTEM_FOLDERS, *environments):
        inside = shlex.quote(path.lstrip("/"))
        lines += [f"mkdir -p {inside}", f"mount --rbind /{inside} {inside}", f"mount -o remount,bind,ro {inside}"]
    lines.append(f"mount --bind {shlex.quote(str(folder / 'passwd'))} etc/passwd")
    for path, size in memory.items():
        inside = shlex.quote(path.lstrip("/"))
        lines += [f"mkdir -p {inside}", f"mount -t tmpfs -o size={size},mode=1777 memory {inside}"]
    for path, source in shared.items():
        inside = shlex.quote(path.lstrip("/"))
        lines += [f"mkdir -p {inside}", f"mount --bind {shlex.quote(str(source))} {inside}"]
    path = "" if daemon_path is None else f"PATH={shlex.quote(daemon_path)} "
    serve = f"{path}{shlex.join(daemon)} & while kill -0 $! 2>/dev/null; do wait || true; done"
    lines += [f"touch {shlex.quote(str(folder / 'ready'))}", f"exec chroot . /bin/sh -c {shlex.quote(serve)}"]
    return "\n".join(lines) + "\n"
