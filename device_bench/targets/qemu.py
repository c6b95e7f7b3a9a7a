"""Emulated ARM as a target: proves that files run and agree there, and counts what they cost in instructions.

What this does not do: time. An emulator's seconds are its own and no device's, and its memory is QEMU's, so those modes are
refused; conditions that would be this machine's are null.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from device_bench import emulator
from device_bench.runner_build import build_runner, runner_arguments
from device_bench.targets.base import AGENT, FILE_KEYS, GRACE_S, OUTPUT_KEY, parse_answer
from device_bench.targets.child import Child
from runtimes.errors import BadInput, IntegrityError

MODES = ("info", "outputs", "count")
CLASSES = ("total", "load_store", "simd", "dot", "fma")
DEADLINE_S = 3600.0
"""Emulation takes hundreds of times as long as the machine itself."""
_PATH_CHARACTERS = 120
_TRUE_CONDITIONS = ("cpu_model", "architecture", "isa", "python", "numpy", "agent", "runtime", "libc")
"""What an agent in the emulator reads of the emulated board; the rest comes from the machine around it."""


@dataclass(frozen=True)
class QemuTarget:
    """One CPU of the emulator that ``pocketbert devices setup qemu`` made.

    Args:
        cpu: cortex-a53, cortex-a72 (no dot products), cortex-a76 (with them), max, or cortex-a7 (Armv7, TFLite files only).
        name: what tables and messages call it; ``qemu:CPU`` if empty.
    """

    cpu: str
    name: str = ""
    deadline_s: float = DEADLINE_S
    grace_s: float = GRACE_S
    emulated: bool = True
    _child: Child = field(default_factory=Child, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or f"qemu:{self.cpu}")

    @property
    def counts_instructions(self) -> bool:
        return emulator.ARCHITECTURES[emulator.architecture_of(self.cpu)].has_counts

    def __enter__(self) -> QemuTarget:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Nothing stays behind: every job cleans up after itself."""

    def stop(self) -> None:
        self._child.stop()

    def info(self) -> dict[str, Any]:
        """``conditions`` of the emulated CPU and the ``formats`` it can run.

        Raises:
            BadInput: the emulator is not set up, or there is no such CPU.
        """
        return self.run({"mode": "info"})

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The agent's answer; in mode count with ``instructions``, one object with :data:`CLASSES` per input.

        Raises:
            BadInput: also for a mode that would time or weigh the emulator.
            IntegrityError, TargetUnreachable: as in :meth:`device_bench.targets.Target.run`.
        """
        self._check(job)
        machine = emulator.find(emulator.architecture_of(self.cpu))
        job = {"deadline_s": self.deadline_s, "cores": None, **job}
        job |= {key: str(Path(job[key]).absolute()) for key in (*FILE_KEYS, OUTPUT_KEY) if job.get(key) is not None}
        with tempfile.TemporaryDirectory(prefix="pocketbert-job-") as temporary:
            folder = _of_one_length(Path(temporary))
            counts = folder / "counts" if job["mode"] == "count" else None
            answer = parse_answer(self.name, *self._run_emulator(self._command(machine, dict(job), folder, counts), folder, job["deadline_s"]))
            if counts is not None:
                answer["instructions"] = read_counts(counts, answer["marked"], self.name)
        if job["mode"] == "info":
            # A runner has no runtimes of its own: those of the emulator are meant.
            projects = emulator.ARCHITECTURES[machine.architecture].runtimes
            answer["formats"] = {projects[project]: f"{project} {number}" for project, number in machine.runtimes.items()}
        answer["conditions"] = _of_the_emulated(answer["conditions"])
        return answer

    def _run_emulator(self, command: list[str], folder: Path, deadline_s: float) -> tuple[int, str, str]:
        return self._child.run(self.name, command, folder, {"LC_ALL": "C.UTF-8", "TMPDIR": str(folder)}, deadline_s + self.grace_s)

    def _check(self, job: dict[str, Any]) -> None:
        if job["mode"] in ("latency", "sustained"):
            raise BadInput(f"{self.name}: emulated time is no device's: of a file, outputs and instruction counts can be had here")
        if job["mode"] == "memory":
            raise BadInput(f"{self.name}: the memory of an emulated process holds the emulator's own: measure it on a device or a virtual machine")
        if job["mode"] not in MODES:
            raise BadInput(f"{self.name}: mode {job['mode']!r} is none of {', '.join(MODES)}")
        if job.get("cores") is not None:
            raise BadInput(f"{self.name}: cores {job['cores']}: an emulated process has none of its own; leave cores out")
        if job["mode"] == "count" and job["threads"] != 1:
            raise BadInput(f"{self.name}: instructions are counted exactly with one thread only, not with {job['threads']}")

    def _command(self, machine: emulator.Emulator, job: dict[str, Any], folder: Path, counts: Path | None) -> list[str]:
        if machine.architecture != "aarch64":
            if counts is not None:
                raise BadInput(f"{self.name}: instructions are counted on aarch64 only, by cortex-a53, cortex-a72, cortex-a76 and max")
            job_file = folder / "job.json"
            job_file.write_text(json.dumps(job), encoding="utf-8")
            return machine.python(self.cpu, [str(AGENT), str(job_file)])
        runner = build_runner("aarch64", shlex.quote(str(machine.compiler)))
        library = None if job["mode"] == "info" else machine.library(job["format"])
        job["root"] = str(machine.root(self.cpu))
        if counts is None:
            return machine.command(self.cpu, [str(runner), *runner_arguments(job, library)])
        job |= {"deadline_s": None}  # by the guest's own clock it would never pass; the child's keeper has another
        job, arguments = _under_short_names(job, {"runner": runner, f"runtime/{library.name}": library, "clock.so": machine.clock}, folder)
        runner, library, clock = arguments
        return machine.command(self.cpu, [runner, *runner_arguments(job, Path(library))], counts, {"LD_PRELOAD": f"./{clock}"})


def _under_short_names(job: dict[str, Any], programs: dict[str, Path], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The job with names in ``folder``, where the guest runs, and the names of the programs there.

    The length of a name changes how the guest's heap is laid out, and with it what an allocation costs: a count must not
    depend on where somebody keeps his files.
    """
    short = {key: f"{key}.{job['format']}" if key == "model" else f"{key}.inputs" for key in FILE_KEYS if job.get(key) is not None}
    for name, path in ({name: job[key] for key, name in short.items()} | programs | {"root": job["root"]}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(path)
    return {**job, **short, "root": "root"}, list(programs)


def _of_one_length(folder: Path) -> Path:
    """A folder in ``folder`` whose path has the same length on every machine."""
    name = "_" * max(1, _PATH_CHARACTERS - len(str(folder)) - 1)
    (folder / name).mkdir()
    return folder / name


def read_counts(path: Path, inputs: int, name: str) -> list[dict[str, int]]:
    """Instructions of each input, from marks 2i before and 2i + 1 after input i (see ``agent/count_instructions.c``).

    Raises:
        IntegrityError: marks are missing, or out of order.
    """
    marks: dict[int, list[int]] = {}
    for line in path.read_text(encoding="ascii").splitlines() if path.exists() else ():
        number, *counts = (int(word) for word in line.split())
        marks[number] = counts
    if list(marks) != list(range(2 * inputs)) or any(len(counts) != len(CLASSES) for counts in marks.values()):
        raise IntegrityError(f"{name}: {len(marks)} marks of the instruction counter for {inputs} inputs: it counted another program")
    return [dict(zip(CLASSES, (b - a for a, b in zip(marks[2 * i], marks[2 * i + 1], strict=True)), strict=True)) for i in range(inputs)]


def _of_the_emulated(conditions: dict[str, Any]) -> dict[str, Any]:
    """``conditions`` with null for everything that the agent read of the machine around the emulator."""
    kept = {key: value if key in _TRUE_CONDITIONS else None for key, value in conditions.items()}
    return kept | {moment: dict.fromkeys(conditions[moment]) for moment in ("before", "after") if moment in conditions}
