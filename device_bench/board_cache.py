"""The ``boards`` folder of the cache: emulators, guest systems and images, each built once and then found.

::

    boards/<name>-<key>/...     finished; appears by one rename, so there is never half of one
    boards/.building-*          under way; a killed build leaves one, which the next build of that name removes
    boards/locks/<name>-<key>   held while it is built

A key is a digest of everything that decides the content, so a changed recipe is built anew beside the old one.

What this does not do: check files after they were built; delete what no recipe asks for any more (:func:`clear` deletes all).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

KEY_CHARACTERS = 12


def boards_folder() -> Path:
    """``boards`` under ``POCKETBERT_CACHE``, or under the user's cache folder."""
    if explicit := os.environ.get("POCKETBERT_CACHE"):
        return Path(explicit).absolute() / "boards"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketbert" / "boards"


def place(name: str, recipe: Any) -> Path:
    """Where the thing called ``name`` lies that the JSON-able ``recipe`` describes, built or not."""
    content = json.dumps(recipe, sort_keys=True, ensure_ascii=False).encode()
    return boards_folder() / f"{name}-{hashlib.sha256(content).hexdigest()[:KEY_CHARACTERS]}"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder`` of :func:`place`, filled by ``build`` if it is not there yet.

    Args:
        build: is given an empty folder beside the final one; if it raises, nothing stays behind. It must not write the
            name of that folder into a file.
    """
    if folder.exists():
        return folder
    with lock(folder.name):
        if folder.exists():  # built by the process that this one waited for
            return folder
        for left in folder.parent.glob(f".building-{folder.name}-*"):
            shutil.rmtree(left)
        staging = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=folder.parent))
        try:
            staging.chmod(0o755)  # mkdtemp's 0700 would keep other users of a guest system out of its root folder
            build(staging)
            os.replace(staging, folder)
        except BaseException:
            shutil.rmtree(staging)
            raise
    return folder


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the lock of ``name``; another process with the same name waits."""
    locks = boards_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / name):
        yield


def clear() -> int:
    """Delete everything that was built; returns the bytes that this freed. Nothing of it may be running."""
    folder = boards_folder()
    if not folder.exists():
        return 0
    freed = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    shutil.rmtree(folder)
    return freed
