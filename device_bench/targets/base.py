"""What a place to measure is: hand a job to an agent there, get its answer or a clear error.

A job (specified in ``agent/agent.py``) carries paths of *this* machine under :data:`FILE_KEYS`, and gets what the agent
writes at :data:`OUTPUT_KEY`; a remote target copies files over and rewrites the paths, so callers never see the difference.

What this does not do: measure (the agents do), repeat, merge or compare (``measurement.py`` and ``comparison.py`` do).
"""

from __future__ import annotations

import json
import shlex
import signal
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from runtimes.bundle import file_sha256
from runtimes.errors import BadInput, IntegrityError, PocketbertError, TargetUnreachable

AGENT = Path(__file__).parents[1] / "agent" / "agent.py"
FILE_KEYS = ("model", "inputs", "golden")
OUTPUT_KEY = "output"
DEADLINE_S = 900.0
GRACE_S = 20.0
"""An agent that has not stopped so long after its deadline is given up."""


class OutOfMemory(TargetUnreachable):
    """The kernel there killed the job for its memory; another file may still fit."""


_ERRORS: dict[str, type[PocketbertError]] = {
    "bad_job": BadInput,
    "missing_runtime": BadInput,
    "too_long": BadInput,
    "unreadable_model": IntegrityError,
    "wrong_output": IntegrityError,
    "failed_inference": IntegrityError,
    "internal": TargetUnreachable,
    "timeout": TargetUnreachable,
    "out_of_memory": OutOfMemory,
    "killed": TargetUnreachable,
    "host_gone": TargetUnreachable,
}
_QUOTED_CHARACTERS = 300


class Target(Protocol):
    """A place to run the agent. A context manager: what it put there is gone at the end."""

    name: str
    emulated: bool
    """Time there says nothing about a device: only outputs and instruction counts do."""
    counts_instructions: bool
    """Mode count answers with ``instructions``, one object per input."""

    def info(self) -> dict[str, Any]:
        """``conditions`` of the place and the ``formats`` it can run.

        Raises:
            TargetUnreachable: it does not answer.
        """

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The agent's answer to ``job``, from a process of its own.

        Raises:
            BadInput: a bad job, a missing file or runtime, or an input that no bucket holds.
            IntegrityError: the model cannot be read or run, its golden outputs are wrong, or a file did not arrive whole.
            OutOfMemory: the kernel there killed the job.
            TargetUnreachable: no answer in time, or one that is not the agent's; its process was killed.
        """

    def stop(self) -> None:
        """End what runs now, from another thread; :meth:`run` there raises."""

    def __enter__(self) -> Target: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@dataclass(frozen=True)
class Finished:
    """A command that ended there. ``exit_code`` is negative for a signal, where the transport tells."""

    exit_code: int
    stdout: str
    stderr: str


class RemoteTarget(ABC):
    """A target behind a wire: a work folder of its own there, files sent once and checked, one command at a time.

    A subclass gives the wire: :meth:`connect`, :meth:`execute`, :meth:`send`, :meth:`fetch`, :meth:`disconnect`, and the
    :meth:`command` that starts its agent. The folder must be gone after :meth:`disconnect`, however the session ended.
    """

    name: str
    emulated: bool = False
    counts_instructions: bool = False
    deadline_s: float = DEADLINE_S
    grace_s: float = GRACE_S

    def __init__(self) -> None:
        self._sent: dict[str, str] = {}
        self._jobs = 0
        self.folder: str = ""

    # --- the wire -----------------------------------------------------------------------------------------------

    @abstractmethod
    def connect(self) -> str:
        """Open the connection and make a fresh work folder there; its path.

        Raises:
            TargetUnreachable: with the reason in the transport's words and what to do.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Remove the work folder and close. Never raises for a place that is gone already."""

    @abstractmethod
    def execute(self, arguments: list[str], timeout_s: float, keep_stdin: bool = False) -> Finished:
        """Run a command there, each argument as it is (no shell sees it).

        Args:
            keep_stdin: standard input stays open while we live, so that an agent that watches it knows when we have gone;
                otherwise it is empty.

        Raises:
            TargetUnreachable: the connection broke, or no end within ``timeout_s`` (what was started is killed).
        """

    @abstractmethod
    def send(self, local: Path, remote: str) -> None:
        """Copy a file there. Raises TargetUnreachable, with the place's own words for a full disk."""

    @abstractmethod
    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file from there."""

    @abstractmethod
    def command(self, job: dict[str, Any], job_file: str) -> list[str]:
        """What starts the agent there for a job with paths of that place; ``job_file`` is where :meth:`run` put it as JSON."""

    @abstractmethod
    def sha256(self, remote: str) -> str:
        """Of a file there."""

    # --- the job ------------------------------------------------------------------------------------------------

    def __enter__(self) -> RemoteTarget:
        self._sent.clear()  # of an earlier connection
        self.folder = self.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disconnect()

    def stop(self) -> None:
        self.disconnect()

    def info(self) -> dict[str, Any]:
        return self.run({"mode": "info"})

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        self._jobs += 1
        there = dict(job)
        for key in FILE_KEYS:
            if job.get(key) is not None:
                there[key] = self.push(Path(job[key]))
        output = job.get(OUTPUT_KEY)
        if output is not None:
            there[OUTPUT_KEY] = f"{self.folder}/output-{self._jobs}"
        if job["mode"] != "info":
            there |= {"deadline_s": job.get("deadline_s") or self.deadline_s, "watch_stdin": True}
        arguments = self.command(there, self._push_job(there))
        done = self.execute(arguments, (there.get("deadline_s") or self.deadline_s) + self.grace_s, keep_stdin=True)
        answer = parse_answer(self.name, done.exit_code, done.stdout, done.stderr)
        if output is not None:
            self.fetch(there[OUTPUT_KEY], Path(output))
        return answer

    def push(self, local: Path) -> str:
        """Send a file once, however often it is needed; its path there.

        Raises:
            BadInput: there is no such file here.
            IntegrityError: what arrived is not what was sent.
        """
        if not local.is_file():
            raise BadInput(f"{local}: no such file")
        digest = file_sha256(local)
        if digest not in self._sent:
            # The name stays recognisable in messages, the digest keeps two files of one name apart.
            remote = f"{self.folder}/{digest[:12]}-{local.name}"
            self.send(local, remote)
            arrived = self.sha256(remote)
            if arrived != digest:
                raise IntegrityError(f"{self.name}: {local.name} did not arrive whole: sha256 {arrived[:12]}… there, {digest[:12]}… here; try again")
            self._sent[digest] = remote
        return self._sent[digest]

    def pull(self, remote: str, local: Path) -> None:
        self.fetch(remote, local)

    def _push_job(self, there: dict[str, Any]) -> str:
        with tempfile.TemporaryDirectory(prefix="pocketbert-job-") as folder:
            path = Path(folder) / "job.json"
            path.write_text(json.dumps(there), encoding="utf-8")
            return self.push(path)


def quoted(arguments: list[str]) -> str:
    """A line that a POSIX shell takes apart into exactly these arguments."""
    return " ".join(shlex.quote(argument) for argument in arguments)


def parse_answer(name: str, exit_code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """The agent's answer out of what its process left behind; ``exit_code`` is negative for a signal.

    Raises:
        BadInput, IntegrityError, TargetUnreachable: as in :meth:`Target.run`.
    """
    ending = f"exit code {exit_code}" if exit_code >= 0 else f"signal {_signal_name(-exit_code)}"
    said = stderr.strip()[-_QUOTED_CHARACTERS:]
    try:
        answer = json.loads(stdout)
    except ValueError as error:
        start = stdout[:_QUOTED_CHARACTERS]
        printed = f"its output is not JSON and starts with {start!r}" if stdout.strip() else "it printed nothing"
        raise TargetUnreachable(f"{name}: the agent ended with {ending}; {printed}; stderr ends with {said!r}") from error
    if not isinstance(answer, dict):
        raise TargetUnreachable(f"{name}: the agent's answer is no object: {stdout[:_QUOTED_CHARACTERS]!r}")
    if "error" in answer:
        try:
            kind, message = answer["error"]["kind"], answer["error"]["message"]
        except (KeyError, TypeError) as error:
            raise TargetUnreachable(f"{name}: not an error of the agent: {stdout[:_QUOTED_CHARACTERS]!r}") from error
        raise _ERRORS.get(kind, TargetUnreachable)(f"{name}: {message}")
    if exit_code != 0:
        raise TargetUnreachable(f"{name}: the agent answered but ended with {ending}; stderr ends with {said!r}")
    return answer


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
