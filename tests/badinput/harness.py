"""Run the command line on bad input, each case in a process of its own, hundreds of them in seconds.

:class:`Runner` starts one server, which imports the command line and its heavy libraries once. For each case the server forks: the child
gets a working folder, a folder for temporary files and a time limit, runs the command and ends. What crashes or hangs is that child alone.

:func:`check` says what is wrong with an :class:`Outcome`: another exit code than the known ones, a traceback, a message that does not name
its place, files left behind. Tables of cases are lists of :class:`Case`.

What this file does not do: know any case.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

EXIT_CODES = (0, 2, 3, 4, 5, 130)
TIME_LIMIT_S = 60.0
CPU_LIMIT_S = 20.0
"""A case that takes longer has hung: on a busy machine the time goes by, but the child's own work does not."""
PRELOADED = (
    "torch",
    "pipeline.cli.main",
    "pipeline.flow.engine",
    "pipeline.flow.recipe",
    "pipeline.stages.finetune",
    "pipeline.tasks.bag_of_words",
    "device_bench.bench",
    "runtimes.backends",
)
"""What each case would otherwise import anew, for seconds."""
PUBLISHED = ("out", "cache")
"""Folders that a command may write besides what it is told to."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        name: what is wrong, for the name of the test.
        arguments: of the command line; ``{here}`` is the case's folder, other names are what :meth:`Runner.run` is given.
        files: written into the case's folder first, by their relative path.
        says: what the message must hold; for exit code 0 what is said on standard error or printed.
        codes: exit codes that are right.
        prepare: does to the folder what files alone cannot.
        stdin: standard input.
        writes: names at the top of the folder that the command may leave.
    """

    name: str
    arguments: Sequence[str]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    says: Sequence[str] = ()
    codes: Sequence[int] = (2,)
    prepare: Callable[[Path], None] | None = None
    stdin: bytes = b""
    writes: Sequence[str] = ()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    """What a command did; ``code`` is negative for a signal, and None where it was stopped at the time limit."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float
    left_behind: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``hang``, ``crash``, ``traceback``, or ``exit N``."""
        if self.code is None or self.code == -signal.SIGXCPU:
            return "hang"
        if self.code < 0:
            return "crash"
        return "traceback" if "Traceback" in self.stderr else f"exit {self.code}"


def faults(outcome: Outcome, codes: Sequence[int] = EXIT_CODES, says: Iterable[str] = ()) -> list[str]:
    """What is wrong with an outcome, in sentences; none if all is well."""
    found = []
    if outcome.kind in ("hang", "crash", "traceback"):
        found.append(f"{outcome.kind} after {outcome.seconds:.1f} s")
    elif outcome.code not in codes or outcome.code not in EXIT_CODES:
        found.append(f"exit code {outcome.code}, and {' or '.join(map(str, codes))} is right")
    told = outcome.stderr + outcome.stdout
    if outcome.code in (2, 3, 4, 5):
        last = [line for line in outcome.stderr.splitlines() if line.strip()]
        if not any((line.startswith("error: ") and len(line) > len("error: ") + 10) or "Error" in line for line in last):
            found.append("no line that begins with error:")
    found += [f"{word!r} is not said" for word in says if word not in told]
    found += [f"{path} is left behind" for path in outcome.left_behind]
    return found


def check(case: Case, outcome: Outcome) -> None:
    """Fail with the output where something is wrong."""
    found = faults(outcome, case.codes, case.says)
    assert not found, f"{case.name}: {'; '.join(found)}\n--- standard output\n{outcome.stdout[-2000:]}\n--- standard error\n{outcome.stderr[-4000:]}"


class Runner:
    """The server of one session; use it with ``with``."""

    def __enter__(self) -> Runner:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "400"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.badinput.harness"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait()

    def run(self, case: Case, folder: Path, **places: object) -> Outcome:
        """Write the case's files into ``folder`` and run its command there; ``places`` fill in ``{name}`` of the arguments."""
        for name, content in case.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        if case.prepare is not None:
            case.prepare(folder)
        arguments = list(case.arguments)
        for name, place in {"here": folder, **places}.items():
            arguments = [argument.replace(f"{{{name}}}", str(place)) for argument in arguments]
        return self.command(arguments, folder, case.stdin, case.writes)

    def command(self, arguments: Sequence[str], folder: Path, stdin: bytes = b"", writes: Sequence[str] = ()) -> Outcome:
        """Run one command line in ``folder``."""
        with tempfile.TemporaryDirectory(prefix="badinput-") as name:
            place = Path(name)
            (place / "stdin").write_bytes(stdin)
            (place / "temporary").mkdir()
            before = set(os.listdir(folder))
            request = {"arguments": [argument.encode("utf-8", "surrogatepass").hex() for argument in arguments], "folder": str(folder), "place": name}
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            answer = self.server.stdout.readline()
            assert answer, f"the server has ended while it ran {arguments}"
            done = json.loads(answer)
            left = [f"temporary/{one}" for one in os.listdir(place / "temporary")]
            left += sorted(set(os.listdir(folder)) - before - {*PUBLISHED, *writes})
            streams = {stream: (place / stream).read_bytes().decode("utf-8", "backslashreplace") for stream in ("stdout", "stderr")}
            return Outcome(done["code"], streams["stdout"], streams["stderr"], done["seconds"], tuple(left))


# --- the server -------------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests, one a line, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints at import is no answer
    _preload()
    for line in sys.stdin:
        answers.write(json.dumps(_forked(json.loads(line))) + "\n")
        answers.flush()


def _preload() -> None:
    from pipeline.cli.console import quieten_libraries

    quieten_libraries()
    for module in PRELOADED:
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)


def _forked(request: dict[str, object]) -> dict[str, object]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(request)
    watched = os.pidfd_open(child)
    ready, _, _ = select.select([watched], [], [], TIME_LIMIT_S)
    os.close(watched)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and whatever it started
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status) if ready else None
    return {"code": code, "seconds": round(time.monotonic() - started, 3)}


def _child(request: dict[str, object]) -> None:
    """Never returns."""
    import traceback

    code = 1
    try:
        os.setpgid(0, 0)
        place = Path(request["place"])
        for number, (name, flags) in enumerate([("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY | os.O_CREAT), ("stderr", os.O_WRONLY | os.O_CREAT)]):
            os.dup2(os.open(place / name, flags, 0o600), number)
        sys.stdin, sys.stdout, sys.stderr = (open(n, mode, encoding="utf-8", closefd=False) for n, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
        sys.stderr.reconfigure(errors="backslashreplace", line_buffering=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(place / "temporary")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(CPU_LIMIT_S), int(CPU_LIMIT_S) + 5))
        os.chdir(request["folder"])
        code = _command([os.fsdecode(bytes.fromhex(argument)) for argument in request["arguments"]])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _command(arguments: list[str]) -> int:
    from pipeline.cli.main import app

    sys.argv = ["pocketbert", *arguments]
    try:
        app(prog_name="pocketbert")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def remove(folder: Path) -> None:
    """Remove a case's folder, whatever its permissions."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)


if __name__ == "__main__":
    serve()
