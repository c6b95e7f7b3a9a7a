"""The bundle: a folder that ships. This file is its specification as far as reading goes.

- ``bundle.json`` is UTF-8 JSON with ``schema`` 2. A reader refuses another schema and ignores keys it does not know.
- Paths in it are relative, use ``/``, and never leave the folder; a reader refuses ``..`` and absolute paths.
- ``SHA256SUMS`` (the format of ``sha256sum -c``) covers every file but itself and ``report/``;
  ``report/SHA256SUMS`` covers the measurements, which differ from run to run where the bundle itself does not.
- ``task`` says what the files are for and how their outputs become an answer: ``kind``, ``columns`` (what a person gives, by name),
  ``segments`` (2 where an input is a pair), ``decode`` (``softmax`` or ``sigmoid`` of what the files give, or ``none``), and what the decoder
  of that kind takes besides (:mod:`runtimes.decode`).
- ``tokenizer``: ``file``, ``max_length``, and what a client that tokenizes by itself must do (:mod:`exporters.tokenizer_contract`).
  ``special_tokens_in_text`` says what a special token written in a text, ``[SEP]``, is: ``special``, that very token, as stock tokenizers have
  it, or ``text``, the letters that it is made of.
- ``labels``: name of an output -> file with the names of its classes, one a line; {} where no output has classes.
- ``models`` lists files in order of preference; ``inputs`` and ``outputs`` name their tensors; ``session`` says how to run
  them (:mod:`runtimes.session`).
- ``golden/cases.jsonl``: one JSON object per line, lines end with U+000A alone. ``example``: a text for each column. ``inputs``: what the
  tokenizer makes of it, ``ids`` and ``types`` of each. ``outputs``: for each model file the outputs of each input by name, as nested lists.
  ``answer``: for each model file what the decoder makes of those outputs.
- ``config.json``, ``tokenizer.json`` and ``onnx/`` lie where transformers.js and optimum look for them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from runtimes.bundle_schema import check_description, check_entry
from runtimes.decode import decoder
from runtimes.decode.base import Decoder
from runtimes.errors import BadInput, IntegrityError
from runtimes.manifest import Table
from runtimes.session import SessionOptions
from runtimes.text import MOST_TOKENS, SPECIAL_TOKENS, TextEncoder
from runtimes.tokenizer_structure import WIDEST_ID

SCHEMA = 2
MANIFEST = "bundle.json"
CHECKSUMS = "SHA256SUMS"
REPORT = "report"
FORMATS = ("onnx", "tflite")
LONGEST_NAME = 255


@dataclass(frozen=True)
class ModelEntry:
    """One model file as the manifest describes it.

    ``tolerance``: largest |difference| from its golden outputs, which it gave under the options of ``session``.
    ``refused_by``: beginnings of the names of runtimes that have this format but cannot run this file.
    ``sha256``: of the file; None in a bundle that does not say it.
    """

    file: str
    format: str
    precision: str
    buckets: tuple[int, ...]
    tolerance: float
    metrics: dict[str, float]
    session: SessionOptions
    refused_by: tuple[str, ...] = ()
    sha256: str | None = None

    def runs_on(self, formats: dict[str, str]) -> bool:
        """Whether one of the runtimes at hand, format -> name, can run it."""
        return self.format in formats and not formats[self.format].startswith(self.refused_by)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; ``labels`` holds the names of classes by output."""

    folder: Path
    manifest: dict[str, Any]
    models: tuple[ModelEntry, ...]
    labels: dict[str, tuple[str, ...]]

    @property
    def tokenizer_file(self) -> Path:
        return safe_path(self.folder, self.manifest["tokenizer"]["file"])

    @property
    def max_length(self) -> int:
        return self.manifest["tokenizer"]["max_length"]

    @property
    def task(self) -> dict[str, Any]:
        """The section ``task`` of the manifest."""
        return self.manifest["task"]

    def path(self, entry: ModelEntry) -> Path:
        return safe_path(self.folder, entry.file)

    def check_file(self, entry: ModelEntry) -> None:
        """IntegrityError if the file is not the one that the manifest describes: a runtime may end the process over a damaged one."""
        if entry.sha256 is not None and file_sha256(self.path(entry)) != entry.sha256:
            raise IntegrityError(f"{self.path(entry)}: the content does not match the checksum in {MANIFEST}; the file was changed or damaged")

    @property
    def special_tokens(self) -> str:
        """What a special token in a text is, one of :data:`runtimes.text.SPECIAL_TOKENS`."""
        return self.manifest["tokenizer"].get("special_tokens_in_text", SPECIAL_TOKENS[0])

    def text_encoder(self, special_tokens: str | None = None) -> TextEncoder:
        """The tokenizer.

        Args:
            special_tokens: one of :data:`runtimes.text.SPECIAL_TOKENS`; as the manifest says if None.

        Raises:
            BadInput: none of those.
            IntegrityError: a tokenizer file that cannot be read.
        """
        special = self.special_tokens if special_tokens is None else special_tokens
        if special not in SPECIAL_TOKENS:
            raise BadInput(f"special tokens {special!r}: known are {', '.join(SPECIAL_TOKENS)}")
        return TextEncoder(self.tokenizer_file, self.max_length, special)

    def decoder(self) -> Decoder:
        """What turns texts into inputs and outputs into an answer.

        Raises:
            BadInput: no decoder for this kind of task is installed.
            IntegrityError: the section ``task`` lacks an option, or has one that its decoder does not take.
        """
        try:
            return decoder(self.task["kind"])(self.task, self.labels)
        except IntegrityError as error:
            raise IntegrityError(f"{self.folder / MANIFEST}: {error}") from error

    def golden_cases(self) -> Iterator[dict[str, Any]]:
        """The golden cases, each of the shape that the head of this file gives.

        Raises:
            IntegrityError: naming the line that has another shape.
        """
        path = safe_path(self.folder, self.manifest["golden"]["file"])
        lines, count = _lines(path), self.manifest["golden"].get("count")
        for number, line in enumerate(lines, start=1):
            case = Table(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
            example = case.table("example")
            for column in example.raw:
                example.text(column)
            inputs = case.tables("inputs")
            for one in inputs:
                if len(one.whole_numbers("ids", 0, WIDEST_ID)) != len(one.whole_numbers("types", 0, 1)):
                    raise IntegrityError(f"{one.place}: {len(one.raw['ids'])} ids with {len(one.raw['types'])} types")
            outputs, answers = case.table("outputs"), case.table("answer")
            for entry in self.models:
                answers.table(entry.file)
                if len(outputs.tables(entry.file)) != len(inputs):
                    raise IntegrityError(f"{outputs.place}: {entry.file}: {len(outputs.raw[entry.file])} outputs for {len(inputs)} inputs")
            yield case.raw
        if count is not None and len(lines) != count:
            raise IntegrityError(f"{path}: {len(lines)} golden cases; {MANIFEST} promises {count}")


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
    manifest = Table(_parsed(_read_text(path), str(path)), str(path))
    schema = manifest.whole("schema")
    if schema != SCHEMA:
        raise IntegrityError(f"{path}: schema {schema}; this version reads schema {SCHEMA}")
    entries = manifest.tables("models")
    models = tuple(_model_entry(table, path) for table in entries)
    if len({entry.file for entry in models}) < len(models) or not models:
        raise IntegrityError(f"{path}: models: {'no file is listed' if not models else 'a file is listed twice'}")
    manifest.table("task").text("kind")
    tokenizer, labels, golden = manifest.table("tokenizer"), manifest.table("labels"), manifest.table("golden")
    tokenizer.whole("max_length", least=1, most=MOST_TOKENS)
    check_description(manifest)
    for name in (tokenizer.text("file"), golden.text("file"), *map(labels.text, labels.raw), *(entry.file for entry in models)):
        if not _is_file(safe_path(folder, name)):
            raise IntegrityError(f"{folder / name}: listed in {MANIFEST} but missing")
    names = {output: tuple(_lines(safe_path(folder, name))) for output, name in labels.raw.items()}
    for table in entries:
        check_entry(table, names)
    return Bundle(folder, manifest.raw, models, names)


def _model_entry(table: Table, manifest: Path) -> ModelEntry:
    file, file_format = table.text("file"), table.one_of("format", FORMATS)
    if is_safe_name(file) and not file.endswith(f".{file_format}"):
        raise IntegrityError(f"{table.place}: format: {file_format}, but the file is {file}")
    if table.number("tolerance") < 0:
        raise IntegrityError(f"{table.place}: tolerance: {table.number('tolerance')} is less than 0")
    return ModelEntry(
        file=file, format=file_format, precision=table.text("precision"),
        buckets=tuple(table.whole_numbers("buckets", 1, MOST_TOKENS)), tolerance=table.number("tolerance"), metrics=table.table("metrics").raw,
        session=SessionOptions.read(table.raw.get("session"), f"{manifest}: {file}"), refused_by=table.texts("refused_by", ()),
        sha256=table.text("sha256", None),
    )  # fmt: skip


def safe_path(folder: Path, name: str) -> Path:
    """``folder / name`` for a relative name that stays inside; IntegrityError otherwise."""
    if not is_safe_name(name):
        raise IntegrityError(f"{folder}: the path {name[:60]!r} would leave the bundle; refused")
    return folder / name


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or half of a surrogate pair
        return False


def is_safe_name(name: str) -> bool:
    """Relative, with forward slashes, without ``..``, and of signs that every system can show."""
    pure = PurePosixPath(name)
    shown = 0 < len(name) <= LONGEST_NAME and name.isprintable()
    return shown and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name and ":" not in name


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
        for number, line in enumerate(_lines(path), start=1):
            digest, separator, name = line.partition("  ")
            if len(digest) != 64 or not separator or not name:
                raise IntegrityError(f"{path}:{number}: not a line of sha256sum")
            file = safe_path(folder, str(base / name))
            if not _is_file(file):
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


def _lines(path: Path) -> list[str]:
    """Lines that end with U+000A; ``splitlines`` would also cut at the rarer signs that a text or a label may hold."""
    text = _read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{place}: not JSON: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from error
