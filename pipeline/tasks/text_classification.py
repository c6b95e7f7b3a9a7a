"""Labelled texts: one text, one class.

Reads ``train``, ``validation`` and ``test`` files of a folder, as JSON lines, CSV or TSV with a header. Every error
names the file and the line. A missing validation file is made up from the training rows, one in ten per class.

What this file does not do: tokenize (:mod:`pipeline.tasks.batches`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import BadInput

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".csv", ".tsv")
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Row:
    text: str
    label: str


@dataclass(frozen=True)
class ClassificationData:
    """The three splits, the class names in alphabetical order, and a fingerprint of all of it.

    ``notes`` are sentences for the user about what was decided on their behalf.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: list[str]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> list[Row]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


def read_folder(
    folder: Path, text_column: str = "text", label_column: str = "label", limit_per_label: int | None = None
) -> ClassificationData:
    """Read a data folder.

    Args:
        folder: holds ``train.*`` and ``test.*``, and ``validation.*`` if there is one.
        text_column, label_column: names of the two columns in every file.
        limit_per_label: keep at most so many training rows of each class (for trials), in file order.

    Raises:
        BadInput: with file and line: unreadable, empty, not UTF-8, a column missing, one class only, a label in
            validation or test that training has never seen.
    """
    if not folder.is_dir():
        raise BadInput(f"task.data: {folder} is not a folder with train and test files ({', '.join(SUFFIXES)})")
    rows: dict[str, list[Row]] = {}
    origin: dict[str, Path] = {}
    for split in SPLITS:
        path = next((folder / (split + s) for s in SUFFIXES if (folder / (split + s)).is_file()), None)
        if path is None:
            if split == "validation":
                continue
            raise BadInput(f"task.data: {folder} has no {split} file; {split}.jsonl, .csv or .tsv is needed")
        numbered = list(read_rows(path, text_column, label_column))
        if not numbered:
            raise BadInput(f"{path}: no rows")
        if split != "train":
            seen = {row.label for row in rows["train"]}
            for line, row in numbered:
                if row.label not in seen:
                    raise BadInput(f"{path}:{line}: label {row.label!r} never occurs in {origin['train'].name}")
        rows[split], origin[split] = [row for _, row in numbered], path
    return make_data(rows, str(origin["train"]), limit_per_label)


def make_data(rows: dict[str, list[Row]], source: str, limit_per_label: int | None = None) -> ClassificationData:
    """Put splits together: class names, a held-out validation set where none is given, the fingerprint."""
    labels = sorted({row.label for row in rows["train"]})
    if len(labels) < 2:
        raise BadInput(f"{source}: every row has the label {labels[0]!r}; a classifier needs at least two classes")
    notes = []
    train = rows["train"]
    if limit_per_label is not None:
        kept: Counter[str] = Counter()
        train = [row for row in train if (kept.update([row.label]) or kept[row.label]) <= limit_per_label]
    if "validation" in rows:
        validation = rows["validation"]
    else:
        train, validation = hold_out(train)
        notes.append(f"no validation file: {len(validation)} of the training rows are held out")
    digest = hashlib.sha256()
    for part in (train, validation, rows["test"]):
        digest.update(json.dumps([[row.text, row.label] for row in part], ensure_ascii=False).encode())
    return ClassificationData(train, validation, rows["test"], labels, digest.hexdigest(), tuple(notes))


def hold_out(train: list[Row]) -> tuple[list[Row], list[Row]]:
    """Take one row in ten of each class away for validation, the same ones every time."""
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(train):
        by_label[row.label].append(index)
    chosen: set[int] = set()
    for label in sorted(by_label):
        indices = by_label[label]
        count = round(len(indices) * HELD_OUT_FRACTION)
        if len(indices) > 1:
            count = max(count, 1)
        chosen.update(random.Random(label).sample(indices, count))
    return [r for i, r in enumerate(train) if i not in chosen], [r for i, r in enumerate(train) if i in chosen]


def read_rows(path: Path, text_column: str, label_column: str) -> Iterator[tuple[int, Row]]:
    """Yield (line number, row) of one file; BadInput names file and line of the first fault."""
    data = path.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadInput(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to UTF-8") from error
    records = _json_lines(path, content) if path.suffix == ".jsonl" else _table(path, content)
    for line, record in records:
        values = []
        for column in (text_column, label_column):
            value = record.get(column)
            if column not in record:
                raise BadInput(f"{path}:{line}: no column {column!r}; the columns are {', '.join(map(str, record))}")
            if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
                raise BadInput(f"{path}:{line}: {column} must be a text that is not empty, got {value!r}")
            if column == label_column and len(str(value).splitlines()) > 1:
                raise BadInput(f"{path}:{line}: label {value!r} has a line break; labels stand one to a line in labels.txt")
            values.append(str(value))
        yield line, Row(*values)


def _json_lines(path: Path, content: str) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise BadInput(f"{path}:{line}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise BadInput(f"{path}:{line}: an object with columns is needed, got {type(record).__name__}")
        yield line, record


def _table(path: Path, content: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    for record in reader:
        if None in record or None in record.values():
            raise BadInput(f"{path}:{reader.line_num}: the row does not have the {len(reader.fieldnames or [])} columns of the header")
        yield reader.line_num, record
