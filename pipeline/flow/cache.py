"""The cache: finished stages by content, and the partial work of unfinished ones.

::

    stages/<key>/record.json          what the stage reported, and which role lies in which folder
    stages/<key>/<folder>/...         its artifacts
    work/<key>/                       checkpoints of a stage under way; removed when it is finished
    shared/<key>/                     what several stages may reuse (a teacher's outputs)

A key is the SHA-256 of everything that decides the result: the stage, its version and configuration, the code that it reaches
(:mod:`pipeline.flow.code`), the content of its inputs, the data, the seed, and the versions of the libraries at work. A finished
stage appears by one rename, so there is never half of one. Every hit is checked against its hashes before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock

from runtimes.bundle import file_sha256
from runtimes.errors import BadInput

LIBRARIES = (
    "pocketbert", "torch", "transformers", "tokenizers", "optimum", "optimum-onnx", "onnx", "onnxruntime",
    "litert-torch", "ai-edge-litert", "ai-edge-quantizer", "numpy",
)  # fmt: skip
"""Libraries whose version may change a result."""


@dataclass(frozen=True)
class Artifact:
    """An immutable folder, and the SHA-256 of everything in it."""

    folder: Path
    sha256: str


def default_root() -> Path:
    """``POCKETBERT_CACHE``, or the user's cache folder."""
    if explicit := os.environ.get("POCKETBERT_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketbert"


def library_versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def tree_sha256(folder: Path) -> str:
    """SHA-256 of names and contents of every file under ``folder``."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return digest([[p.relative_to(folder).as_posix(), file_sha256(p)] for p in files])


class Cache:
    """A cache folder. Safe for several processes: whoever comes second waits, then finds the result."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()
        if _exists(self.root) and not self.root.is_dir():
            raise BadInput(f"--cache {self.root}: is a file; give a folder, or leave it out for {default_root()}")

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None if there is none or its files are not what they were."""
        path = self.root / "stages" / key / "record.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        whole = all(tree_sha256(path.parent / a["folder"]) == a["sha256"] for a in record["artifacts"].values())
        return record if whole else None

    def artifacts(self, key: str, record: dict[str, Any]) -> dict[str, Artifact]:
        base = self.root / "stages" / key
        return {role: Artifact(base / a["folder"], a["sha256"]) for role, a in record["artifacts"].items()}

    def work(self, key: str) -> Path:
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def shared(self, key: str) -> Path:
        """Folder for work that several stages may reuse; whoever fills it makes it appear whole."""
        folder = self.root / "shared"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / key

    def publish(self, key: str, output: Path, record: dict[str, Any]) -> None:
        """Make ``output`` and its record the finished stage ``key``, and drop its partial work."""
        (output / "record.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        final = self.root / "stages" / key
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one: a whole one would have been a hit
        os.replace(output, final)
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of a key; another process with the same key waits."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / key):
            yield

    def entries(self) -> list[dict[str, Any]]:
        """Finished stages: key, stage, seconds, bytes."""
        found = []
        for path in sorted((self.root / "stages").glob("*/record.json"), key=lambda p: p.stat().st_mtime):
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append({"key": path.parent.name, "stage": record["stage"], "seconds": record["seconds"], "bytes": size_bytes(path.parent)})
        return found

    def clear(self) -> int:
        """Remove everything; returns the bytes freed."""
        freed = size_bytes(self.root) if self.root.is_dir() else 0
        for part in ("stages", "work", "shared", "locks"):
            shutil.rmtree(self.root / part, ignore_errors=True)
        return freed


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise BadInput(f"--cache {str(path)[:100]}: cannot be read: {error.strerror}; give another folder") from error


def size_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
