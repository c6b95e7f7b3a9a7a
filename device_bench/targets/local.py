"""This machine as a target: each job in a fresh child process with a clean environment, under a memory cap if asked."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from device_bench.targets.base import AGENT, DEADLINE_S, FILE_KEYS, GRACE_S, OUTPUT_KEY, parse_answer
from device_bench.targets.child import Child
from runtimes.errors import BadInput

# What a child needs to find the packages its parent has; thread counts and other knobs of runtimes stay out.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")
_CGROUPS = Path("/sys/fs/cgroup")


def all_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class LocalTarget:
    """This machine (POSIX).

    Args:
        deadline_s: a job that takes longer is killed with every process it started; by the agent itself, or ``grace_s`` later by us.
        agent: the script to run.
        python: the interpreter to run it with; this one unless another environment is to be measured.
        memory_cap_bytes: the most memory a job may take, as on a smaller board (Linux, where this user may make cgroups); None for no cap.
    """

    name: str = "local"
    deadline_s: float = DEADLINE_S
    grace_s: float = GRACE_S
    agent: Path = AGENT
    python: str = sys.executable
    memory_cap_bytes: int | None = None
    emulated: bool = False
    counts_instructions: bool = False
    _child: Child = field(default_factory=Child, init=False, repr=False, compare=False)

    def __enter__(self) -> LocalTarget:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing stays behind: every job cleans up after itself."""

    def stop(self) -> None:
        self._child.stop()

    def info(self) -> dict[str, Any]:
        return self.run({"mode": "info"})

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        job = {"deadline_s": self.deadline_s, **_absolute(job)}
        with tempfile.TemporaryDirectory(prefix="pocketbert-job-") as folder, self._capped() as group:
            job_file = Path(folder) / "job.json"
            job_file.write_text(json.dumps(job), encoding="utf-8")
            command = _joining(group, [self.python, str(self.agent), str(job_file)])
            environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
            done = self._child.run(self.name, command, folder, environment, job["deadline_s"] + self.grace_s)
        return parse_answer(self.name, *done)

    def _capped(self) -> Any:
        return nullcontext() if self.memory_cap_bytes is None else _memory_group(self.memory_cap_bytes)


@contextmanager
def _memory_group(cap_bytes: int) -> Iterator[Path]:
    """A cgroup of our own with a memory cap and no swap; gone at the end.

    Raises:
        BadInput: the system has no memory controller for this user's groups.
    """
    parent, limit, swap, swap_bytes = _memory_controller(cap_bytes)
    group = parent / f"pocketbert-{os.getpid()}-{os.urandom(3).hex()}"
    try:
        group.mkdir()
    except OSError as error:
        raise BadInput(
            f"memory cap: no group can be made at {group} ({error.strerror}); run as root or under "
            "systemd-run --user --scope -p Delegate=yes, or leave the cap out"
        ) from error
    try:
        try:
            (group / limit).write_text(str(cap_bytes))
            if (group / swap).exists():
                (group / swap).write_text(str(swap_bytes))
        except OSError as error:
            raise BadInput(f"memory cap: {parent} lets its groups have no {limit} ({error.strerror}); leave the cap out") from error
        yield group
    finally:
        group.rmdir()


def _memory_controller(cap_bytes: int) -> tuple[Path, str, str, int]:
    """(folder that may hold our group, its limit's file, the file that limits swap, what to write there).

    Version 2: the root group for root, else the group that this process is in. Version 1 caps memory and swap together.
    """
    groups = {line.split(":")[1]: line.split(":")[2].lstrip("/") for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()}
    if (_CGROUPS / "cgroup.controllers").is_file():
        return _CGROUPS if os.geteuid() == 0 else _CGROUPS / groups[""], "memory.max", "memory.swap.max", 0
    if (_CGROUPS / "memory" / "memory.limit_in_bytes").is_file():
        return _CGROUPS / "memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", cap_bytes
    raise BadInput(f"memory cap: {_CGROUPS} has no memory controller; leave the cap out")


def _joining(group: Path | None, command: list[str]) -> list[str]:
    """``command``, started by a shell that has entered the group, so that all its memory counts from the first page on."""
    return command if group is None else ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]


def _absolute(job: dict[str, Any]) -> dict[str, Any]:
    """``job`` with absolute paths, because the child runs in another folder."""
    return {**job, **{key: str(Path(job[key]).absolute()) for key in (*FILE_KEYS, OUTPUT_KEY) if job.get(key) is not None}}
