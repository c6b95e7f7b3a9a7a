"""A command on this machine in a session of its own, which ends with all that it started: when it is done, late, interrupted, or
told to by another thread.

What this does not do: decide what its output means.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtimes.errors import TargetUnreachable


class Child:
    """Runs one command at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self, name: str, command: Sequence[str], folder: Path | str, environment: Mapping[str, str], timeout_s: float) -> tuple[int, str, str]:
        """Exit code (negative for a signal), standard output and standard error.

        Args:
            name: whom an error speaks of.

        Raises:
            TargetUnreachable: no end within ``timeout_s``, or :meth:`stop` was called.
        """
        with self._lock:
            if self._stopped:
                raise TargetUnreachable(f"{name}: stopped")
            process = subprocess.Popen(
                command, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
            self._process = process
        with process:
            try:
                stdout, stderr = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                _kill(process)
                raise TargetUnreachable(f"{name}: no answer within {timeout_s:g} s; it was killed") from error
            except BaseException:  # Ctrl-C does not reach the child's session by itself
                _kill(process)
                raise
            finally:
                with self._lock:
                    self._process = None
        if self._stopped:
            raise TargetUnreachable(f"{name}: stopped")
        return process.returncode, stdout, stderr

    def stop(self) -> None:
        """End what runs now, from another thread, and run nothing more."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)


def _kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
