"""The cache: finished stages by content, and the partial work of unfinished ones.

::

    stages/<key>/record.json          what the stage reported, and which role lies in which folder
    stages/<key>/<folder>/...         its artifacts
    work/<key>/                       checkpoints of a stage under way; removed when it is finished
    shared/<key>/record.json          what it is, and its hash
    shared/<key>/files/...            what several stages may reuse (a teacher's outputs, the baseline's file)

A key is the SHA-256 of everything that decides the result: the stage, its version and configuration, the code that it reaches
(:mod:`pipeline.flow.code`), the content of its inputs, the data, the seed, and the versions of the libraries at work. A finished
stage appears by one rename, so there is never half of one. Every hit is checked against its hashes before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
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


FINISHED = ("stages", "shared")
"""Folders of finished entries."""


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
        return self._whole(self.root / "stages" / key)

    def _whole(self, folder: Path) -> dict[str, Any] | None:
        """The record in ``folder`` if all that it lists is as it was; the time of its last use is that of the file."""
        path = folder / "record.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            whole = all(tree_sha256(folder / a["folder"]) == a["sha256"] for a in record["artifacts"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if whole:
            os.utime(path)
        return record if whole else None

    def artifacts(self, key: str, record: dict[str, Any]) -> dict[str, Artifact]:
        base = self.root / "stages" / key
        return {role: Artifact(base / a["folder"], a["sha256"]) for role, a in record["artifacts"].items()}

    def work(self, key: str) -> Path:
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def shared(self, key: str, what: str, make: Callable[[Path], object]) -> Path:
        """Folder with work that several stages may reuse: as it was left, or made anew where it is not there or was damaged.

        Args:
            what: the name of the work in lists.
            make: fills a folder that does not exist yet.
        """
        final = self.root / "shared" / key
        with self.lock(key):
            if self._whole(final) is None:
                partial = final.with_name(f"{key}.partial")
                for left in (partial, final):
                    shutil.rmtree(left, ignore_errors=True)
                partial.mkdir(parents=True)
                started = time.monotonic()
                make(partial / "files")
                seconds, sha256 = round(time.monotonic() - started, 2), tree_sha256(partial / "files")
                record = {"stage": what, "seconds": seconds, "artifacts": {"files": {"folder": "files", "sha256": sha256}}}
                (partial / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                os.replace(partial, final)
        return final / "files"

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
        """Finished stages and shared work, that which was not used for longest first: key, stage, seconds, bytes, days since it was used."""
        now, found = time.time(), []
        for path in sorted((p for part in FINISHED for p in (self.root / part).glob("*/record.json")), key=lambda p: p.stat().st_mtime):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                stage, seconds = str(record["stage"]), float(record["seconds"])
            except (ValueError, KeyError, TypeError):
                stage, seconds = "damaged", 0.0
            unused_days = round((now - path.stat().st_mtime) / 86400, 3)
            found.append({
                "key": path.parent.name, "stage": stage, "seconds": seconds, "bytes": size_bytes(path.parent), "unused_days": unused_days,
            })  # fmt: skip
        return found

    def remove(self, key: str) -> None:
        """Remove a finished entry; a run that makes it at this moment is waited for."""
        with self.lock(key):
            for part in FINISHED:
                shutil.rmtree(self.root / part / key, ignore_errors=True)

    def find(self, beginning: str) -> dict[str, Any]:
        """The entry whose key begins so.

        Raises:
            BadInput: there is none, or more than one.
        """
        found = [entry for entry in self.entries() if entry["key"].startswith(beginning)]
        if len(found) != 1:
            told = f"{len(found)} keys begin so; give more of it" if found else "no key begins so; pocketbert cache list shows them"
            raise BadInput(f"cache remove: {beginning[:100]!r}: {told}")
        return found[0]

    def unneeded(self, older_than_days: float | None, down_to_mb: float | None) -> list[dict[str, Any]]:
        """Entries that were not used for so long, and then those unused for longest until all others have so many megabytes (10^6 bytes)."""
        entries = self.entries()
        gone = [entry for entry in entries if older_than_days is not None and entry["unused_days"] > older_than_days]
        kept = [entry for entry in entries if entry not in gone]
        while down_to_mb is not None and kept and sum(entry["bytes"] for entry in kept) > down_to_mb * 1e6:
            gone.append(kept.pop(0))
        return gone

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
