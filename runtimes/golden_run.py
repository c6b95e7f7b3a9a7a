"""Run golden cases in a process of their own, because a runtime that meets a damaged file ends its process, and no caller can catch that.

The child gets a job as JSON on standard input and says on standard output, a line of JSON each, what it begins and what came of it. What it had
begun when it ended is what it ended over. First it encodes the texts of all cases, in bounded time and memory; then it runs each file.

What this file does not do: compare (:mod:`runtimes.verify`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.backends import load_model
from runtimes.bundle import Bundle, ModelEntry
from runtimes.errors import BadInput, IntegrityError, PocketbertError
from runtimes.session import SessionOptions
from runtimes.text import TextEncoder

MOST_SECONDS = 60
"""Of processor time for the texts of all golden cases, and for each file with all of its cases: a hundred times what they take on a slow board."""
MOST_WAIT = 10
"""Times as long may pass on the clock, on a machine that is busy with other things."""
MOST_TOKENIZER_BYTES = 4 * 2**30
"""Address space that a tokenizer may add; the largest vocabularies take a quarter."""
START = "from runtimes.golden_run import _child; _child()"


@dataclass(frozen=True)
class FileRun:
    """What a file gave: ``outputs`` by case and input, or the ``error`` that it ended in."""

    runtime: str
    outputs: list[list[dict[str, np.ndarray]]]
    error: IntegrityError | None = None


def run_golden(bundle: Bundle, entries: Sequence[ModelEntry], cases: Sequence[Mapping[str, Any]]) -> dict[str, FileRun]:
    """Encode the texts of ``cases`` and run ``entries`` on their recorded inputs.

    Returns:
        For each file what it gave.

    Raises:
        IntegrityError: the tokenizer ended the process, or took too long.
    """
    job = {
        "tokenizer": str(bundle.tokenizer_file), "max_length": bundle.max_length, "special_tokens": bundle.special_tokens,
        "texts": [text for case in cases for text in case["example"].values()],
        "files": [{"file": e.file, "path": str(bundle.path(e)), "session": e.session.as_manifest(e.format)} for e in entries],
        "seconds": MOST_SECONDS, "inputs": [[[one["ids"], one["types"]] for one in case["inputs"]] for case in cases],
    }  # fmt: skip
    found: dict[str, FileRun] = {}
    while True:
        code, lines = _ask(job)
        for line in lines:
            if "outputs" in line or "error" in line:
                found[line["file"]] = _read(line)
        begun = lines[-1].get("begun") if lines else None
        if code == 0 and begun is None:
            return found
        how = _ended(code)
        if begun is None or begun == "tokenizer":
            raise IntegrityError(f"{bundle.tokenizer_file}: the tokenizer crashed on it or its golden texts ({how})")
        found[begun] = FileRun("", [], IntegrityError(f"the runtime crashed on {bundle.folder / begun} ({how})"))
        job |= {"files": [one for one in job["files"] if one["file"] not in found], "texts": []}
        if not job["files"]:
            return found


def _ask(job: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """The exit code of a child, and the lines that it wrote."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", START]
    seconds = MOST_WAIT * max(1, MOST_SECONDS) * (1 + len(job["files"]))
    try:
        done = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, env=environment, timeout=seconds)
        code, written = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, written = -int(signal.SIGTERM), error.stdout or b""
    whole = written[: written.rfind(b"\n") + 1]
    return code, [json.loads(line) for line in whole.splitlines()]


def _ended(code: int) -> str:
    if code in (-getattr(signal, "SIGPROF", 27), -signal.SIGTERM):
        return f"it took more than {MOST_SECONDS} s"
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


def _read(line: Mapping[str, Any]) -> FileRun:
    if "error" in line:
        return FileRun("", [], IntegrityError(line["error"]))
    outputs = [[{name: np.array(value, np.float32) for name, value in one.items()} for one in case] for case in line["outputs"]]
    return FileRun(line["runtime"], outputs)


def _child() -> None:
    """Read a job, do it, and say what comes of it; native libraries that print are sent elsewhere."""
    job = json.loads(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def say(**line: Any) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        say(begun="tokenizer")
        if job["texts"]:
            _encode_all(job)
        say(encoded=True)
        for one in job["files"]:
            say(begun=one["file"])
            _limit_seconds(job["seconds"])
            try:
                model = load_model(Path(one["path"]), session=SessionOptions.read(one["session"], one["file"]))
                outputs = [[model.run(ids, types) for ids, types in case] for case in job["inputs"]]
            except PocketbertError as error:
                say(file=one["file"], error=str(error))
                continue
            values = [[{name: value.tolist() for name, value in result.items()} for result in case] for case in outputs]
            say(file=one["file"], runtime=model.runtime, outputs=values)
    os._exit(0)  # what a runtime does when it is torn down proves nothing about the file


def _encode_all(job: Mapping[str, Any]) -> None:
    """Every text by itself; what is wrong with one is told by the caller, which encodes them again."""
    _limit_seconds(job["seconds"])
    with _limited_memory():
        try:
            encoder = TextEncoder(Path(job["tokenizer"]), job["max_length"], job["special_tokens"])
        except IntegrityError:
            return
        for text in job["texts"]:
            try:
                encoder.encode(text)
            except BadInput:
                continue


def _limit_seconds(seconds: float) -> None:
    """From now on; the signal also ends native code. Windows has no such signal, and the parent's limit alone."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """A limit of address space, where the system has one."""
    try:
        import resource
    except ImportError:  # Windows
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    page = os.sysconf("SC_PAGE_SIZE")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * page if Path("/proc/self/statm").is_file() else 0
    most = used + MOST_TOKENIZER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
