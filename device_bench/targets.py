"""Places to measure: hand a job to the agent there, get its answer or a clear error.

A :class:`Target` takes the agent's job (specified in ``agent/agent.py``) with paths of *this* machine under
:data:`FILE_KEYS`; a remote target copies those files over and rewrites the paths, so callers never see the difference.

What this does not do: measure (the agent does), repeat, merge or compare (``measurement.py`` does).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtimes.errors import BadInput, IntegrityError, PocketbertError, TargetUnreachable

AGENT = Path(__file__).parent / "agent" / "agent.py"
FILE_KEYS = ("model", "inputs", "golden")

_ERRORS: dict[str, type[PocketbertError]] = {
    "bad_job": BadInput,
    "missing_runtime": BadInput,
    "too_long": BadInput,
    "unreadable_model": IntegrityError,
    "wrong_output": IntegrityError,
    "failed_inference": IntegrityError,
    "internal": TargetUnreachable,
}
# What a child needs to find the packages its parent has; thread counts and other knobs of runtimes stay out.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH")
_QUOTED_CHARACTERS = 300


def all_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Target(Protocol):
    """A place to run the agent."""

    name: str

    def info(self) -> dict[str, Any]:
        """``conditions`` of the place and the ``formats`` it can run.

        Raises:
            TargetUnreachable: it does not answer.
        """

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The agent's answer to ``job``, from a process of its own.

        Raises:
            BadInput: a bad job, a missing file or runtime, or a text that no bucket holds.
            IntegrityError: the model cannot be read or run, or its golden outputs are wrong.
            TargetUnreachable: no answer in time, or one that is not the agent's.
        """


@dataclass(frozen=True)
class LocalTarget:
    """This machine (POSIX): each job in a fresh child process with a clean environment.

    Args:
        timeout_s: a job that takes longer is killed with every process it started.
        agent: the script to run.
        python: the interpreter to run it with; this one unless another environment is to be measured.
    """

    name: str = "local"
    timeout_s: float = 900.0
    agent: Path = AGENT
    python: str = sys.executable

    def info(self) -> dict[str, Any]:
        return self.run({"mode": "info"})

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="pocketbert-job-") as folder:
            job_file = Path(folder) / "job.json"
            job_file.write_text(json.dumps(_absolute(job)), encoding="utf-8")
            exit_code, stdout, stderr = self._run_child([self.python, str(self.agent), str(job_file)], folder)
        return parse_answer(self.name, exit_code, stdout, stderr)

    def _run_child(self, command: list[str], folder: str) -> tuple[int, str, str]:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                stdout, stderr = process.communicate(timeout=self.timeout_s)
            except subprocess.TimeoutExpired as error:
                _kill_group(process)
                raise TargetUnreachable(f"{self.name}: no answer within {self.timeout_s:g} s; the agent was killed") from error
            except BaseException:  # Ctrl-C does not reach the child's session by itself
                _kill_group(process)
                raise
        return process.returncode, stdout, stderr


def parse_answer(name: str, exit_code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """The agent's answer from what its process left behind, on any kind of target.

    Args:
        name: of the target, for messages.
        exit_code: negative for a signal, as in :mod:`subprocess`.

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


def _absolute(job: dict[str, Any]) -> dict[str, Any]:
    """``job`` with absolute paths, because the child runs in another folder."""
    return {**job, **{key: str(Path(job[key]).absolute()) for key in FILE_KEYS if job.get(key) is not None}}


def _kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
