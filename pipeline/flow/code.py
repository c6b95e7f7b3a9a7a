"""Which code decides a result: the project's own modules that a module reaches by imports, as one digest.

A finished stage is only as good as the code that made it, so this digest is part of its key in the cache. While one edits code
that changes no result, ``POCKETBERT_IGNORE_CODE=1`` leaves it out.

Imports are read from the sources, those inside functions too; nothing is imported for it.
"""

from __future__ import annotations

import ast
import hashlib
import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.decode import DECODERS

if TYPE_CHECKING:
    from pipeline.tasks.base import Task

PACKAGES = ("pipeline", "exporters", "device_bench", "runtimes")
SWITCH = "POCKETBERT_IGNORE_CODE"


def code_digest(module: str) -> str | None:
    """SHA-256 of the sources of ``module`` and of all modules of the project that it reaches; None where the switch is set."""
    if os.environ.get(SWITCH) == "1":
        return None
    digest = hashlib.sha256()
    for name in reached(module):
        digest.update(f"{name} {hashlib.sha256(_source(name)).hexdigest()}\n".encode())
    return digest.hexdigest()


def task_code(task: Task) -> list[str | None]:
    """Digests of a task's module and of its decoder's: stages find both by the kind, which no import tells."""
    classes = [type(task), *([DECODERS[task.kind]] if task.kind in DECODERS else [])]
    return [code_digest(found.__module__) for found in classes]


@lru_cache
def reached(module: str) -> tuple[str, ...]:
    """``module`` and the project's modules that it reaches by imports, in alphabetical order."""
    found, open_ = {module}, [module]
    while open_:
        for name in _imports(open_.pop()):
            if name not in found:
                found.add(name)
                open_.append(name)
    return tuple(sorted(found))


@lru_cache
def _imports(module: str) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names if name.split(".")[0] in PACKAGES and _path(name) is not None)


@lru_cache
def parsed(module: str) -> ast.Module:
    """The source of a module of the project as a syntax tree; an empty one for any other module."""
    return ast.parse(_source(module) if module.split(".")[0] in PACKAGES else b"")


@lru_cache
def _source(module: str) -> bytes:
    path = _path(module)
    return b"" if path is None else path.read_bytes()


@lru_cache
def _path(module: str) -> Path | None:
    """The source file of a module; None for what is none, such as a function that is imported by name."""
    if module.split(".")[0] in PACKAGES:
        spec = find_spec(module.split(".")[0])
        base = Path(spec.submodule_search_locations[0]).joinpath(*module.split(".")[1:])
        candidates = (base.with_suffix(".py"), base / "__init__.py")
        return next((path for path in candidates if path.is_file()), None)
    spec = find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None
