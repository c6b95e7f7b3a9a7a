"""The bundle: a folder that ships. This file is its specification as far as reading goes.

- ``bundle.json`` is UTF-8 JSON with ``schema`` 1. A reader refuses another schema and ignores keys it does not know.
- Paths in it are relative, use ``/``, and never leave the folder; a reader refuses ``..`` and absolute paths.
- ``SHA256SUMS`` (the format of ``sha256sum -c``) covers every file but itself and ``report/``;
  ``report/SHA256SUMS`` covers the measurements, which differ from run to run where the bundle itself does not.
- ``task.decode`` says what an answer is: ``softmax`` of what the files give, or ``none`` where they give probabilities.
- ``models`` lists files in order of preference; ``inputs`` and ``outputs`` name their tensors; ``session`` says how to run
  them (:mod:`runtimes.session`).
- ``golden/cases.jsonl``: one JSON object per line: text, token ids, label, logits of each model file.
- ``config.json``, ``tokenizer.json`` and ``onnx/`` lie where transformers.js and optimum look for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtimes.errors import BadInput, IntegrityError
from runtimes.session import SessionOptions

SCHEMA = 1
MANIFEST = "bundle.json"
CHECKSUMS = "SHA256SUMS"
REPORT = "report"
DECODERS = ("softmax", "none")


@dataclass(frozen=True)
class ModelEntry:
    """One model file as the manifest describes it.

    ``tolerance``: largest |difference| from its golden logits, which it gave under the options of ``session``.
    ``refused_by``: beginnings of the names of runtimes that have this format but cannot run this file.
    """

    file: str
    format: str
    precision: str
    buckets: tuple[int, ...]
    tolerance: float
    metrics: dict[str, float]
    session: SessionOptions
    refused_by: tuple[str, ...] = ()

    def runs_on(self, formats: dict[str, str]) -> bool:
        """Whether one of the runtimes at hand, format -> name, can run it."""
        return self.format in formats and not formats[self.format].startswith(self.refused_by)


@dataclass(frozen=True)
class Bundle:
    folder: Path
    manifest: dict[str, Any]
    models: tuple[ModelEntry, ...]
    labels: tuple[str, ...]

    @property
    def tokenizer_file(self) -> Path:
        return safe_path(self.folder, self.manifest["tokenizer"]["file"])

    @property
    def max_length(self) -> int:
        return self.manifest["tokenizer"]["max_length"]

    @property
    def decode(self) -> str:
        """One of :data:`DECODERS`."""
        return self.manifest["task"]["decode"]

    def path(self, entry: ModelEntry) -> Path:
        return safe_path(self.folder, entry.file)

    def golden_cases(self) -> Iterator[dict[str, Any]]:
        path = safe_path(self.folder, self.manifest["golden"]["file"])
        for number, line in enumerate(_read_text(path).splitlines(), start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise IntegrityError(f"{path}:{number}: not JSON: {error}") from error


def open_bundle(folder: Path) -> Bundle:
    """Read the manifest of ``folder``, or of the ``bundle`` inside it.

    Raises:
        BadInput: no bundle there.
        IntegrityError: a manifest that cannot be read, of another schema, or with paths that leave the folder.
    """
    if not (folder / MANIFEST).is_file() and (folder / "bundle" / MANIFEST).is_file():
        folder = folder / "bundle"
    path = folder / MANIFEST
    if not path.is_file():
        raise BadInput(f"{folder}: no bundle there ({MANIFEST} is missing)")
    try:
        manifest = json.loads(_read_text(path))
        if manifest["schema"] != SCHEMA:
            raise IntegrityError(f"{path}: schema {manifest['schema']}; this version reads schema {SCHEMA}")
        if manifest["task"]["decode"] not in DECODERS:
            raise IntegrityError(f"{path}: task.decode is {manifest['task']['decode']!r}; this version knows {', '.join(DECODERS)}")
        models = tuple(
            ModelEntry(
                m["file"], m["format"], m["precision"], tuple(m["buckets"]), m["tolerance"], m["metrics"],
                SessionOptions.read(m.get("session"), f"{path}: {m['file']}"), tuple(m.get("refused_by", ())),
            )
            for m in manifest["models"]
        )
        inside = [manifest["tokenizer"]["file"], manifest["labels"], manifest["golden"]["file"], *(m.file for m in models)]
        files = [safe_path(folder, name) for name in inside]
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: not a bundle manifest: {type(error).__name__}: {error}") from error
    for file in files:
        if not file.is_file():
            raise IntegrityError(f"{file}: listed in {MANIFEST} but missing")
    return Bundle(folder, manifest, models, tuple(_read_text(safe_path(folder, manifest["labels"])).splitlines()))


def safe_path(folder: Path, name: str) -> Path:
    """``folder / name`` for a relative name that stays inside; IntegrityError otherwise."""
    if not is_safe_name(name):
        raise IntegrityError(f"{folder}: the path {name!r} would leave the bundle; refused")
    return folder / name


def is_safe_name(name: str) -> bool:
    """Relative, with forward slashes, and without ``..``."""
    pure = PurePosixPath(name)
    return bool(name) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name and ":" not in name


def check_sums(folder: Path) -> int:
    """Compare every file with its checksum; returns how many were compared.

    Raises:
        IntegrityError: naming the first file that is changed, missing, or listed nowhere.
    """
    listed: set[str] = set()
    for sums in (CHECKSUMS, f"{REPORT}/{CHECKSUMS}"):
        path = folder / sums
        if not path.is_file():
            if sums == CHECKSUMS or (folder / REPORT).exists():
                raise IntegrityError(f"{path}: missing")
            continue
        base = PurePosixPath(sums).parent
        for number, line in enumerate(_read_text(path).splitlines(), start=1):
            digest, separator, name = line.partition("  ")
            if len(digest) != 64 or not separator:
                raise IntegrityError(f"{path}:{number}: not a line of sha256sum")
            file = safe_path(folder, str(base / name))
            if not file.is_file():
                raise IntegrityError(f"{file}: listed in {sums} but missing")
            if file_sha256(file) != digest:
                raise IntegrityError(f"{file}: the content does not match its checksum; the file was changed or damaged")
            listed.add(str(base / name))
        listed.add(sums)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        if file.relative_to(folder).as_posix() not in listed:
            raise IntegrityError(f"{file}: not listed in any {CHECKSUMS}")
    return len(listed)


def write_sums(folder: Path, exclude: tuple[str, ...] = ()) -> None:
    """Write ``SHA256SUMS`` for every file under ``folder`` but itself and the subfolders in ``exclude``."""
    lines = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name != CHECKSUMS and name.split("/")[0] not in exclude:
            lines.append(f"{file_sha256(file)}  {name}\n")
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from error
