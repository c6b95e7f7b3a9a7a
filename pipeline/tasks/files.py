"""Data files: rows of columns, the three splits of a folder, and files of plain lines.

===================  ================================================================================================
file                 rows
===================  ================================================================================================
``.jsonl``           one JSON object a line
``.csv``             header, then rows; quoted as RFC 4180 has it
``.tsv``             header, then rows; nothing is quoted, as in GLUE: a quotation mark is text
``.conll``, ``.txt``  one token a line, its tag in the last column, a blank line behind a sentence; columns ``tokens``, ``tags``
===================  ================================================================================================

All are UTF-8, with or without a byte order mark. Every fault names the file and the line. A folder needs ``train`` and one of
``validation`` (also called ``dev``, ``valid`` or ``val``) and ``test``, each in one
file. Missing validation rows are held out of the training rows, and missing test rows are half of the validation rows, so that no row
serves for a choice and for the final figure.

What this file does not do: know what columns a task needs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.tasks.base import SPLITS, Data, Row, Task
from runtimes.errors import BadInput

SUFFIXES = (".jsonl", ".csv", ".tsv", ".conll", ".txt")
HELD_OUT_SHARE = 0.1
LONGEST_LABEL = 1000
"""Characters."""
LONGEST_CSV_FIELD = 2**31 - 1
"""Characters; the csv module stops at 131,072 unless told otherwise."""
DOCUMENT_START = "-DOCSTART-"
OTHER_NAMES = {"validation": ("dev", "valid", "val")}
"""What a split is also called."""
LARGEST_NUMBER = 1e15
"""Training squares numbers in float32, which ends at 3.4e38."""
OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip; unpack it", b"PK\x03\x04": "a zip archive; unpack it", b"PAR1": "Parquet; write it as JSON lines or CSV",
    b"\xff\xfe": "UTF-16 or UTF-32; convert it to UTF-8", b"\xfe\xff": "UTF-16; convert it to UTF-8",
    b"\x00\x00\xfe\xff": "UTF-32; convert it to UTF-8",
}  # fmt: skip
"""First bytes of files that people take for text in UTF-8."""

# --- splits -------------------------------------------------------------------------------------------------------------


def split_file(folder: Path, name: str, suffixes: Sequence[str] = SUFFIXES) -> Path | None:
    """The file ``name``, or another name of that split, with one of ``suffixes``; None if there is none.

    Raises:
        BadInput: two of them, or what is no file.
    """
    found = []
    for one in (name, *OTHER_NAMES.get(name, ())):
        found += [folder / (one + suffix) for suffix in suffixes if is_there(folder / (one + suffix))]
    if len(found) > 1:
        raise BadInput(f"{folder}: {' and '.join(path.name for path in found)} may both be the {name} rows; leave one of them")
    for path in found:
        if not path.is_file():
            raise BadInput(f"{path}: not a file that can be read, but a folder, a device, or a link to nothing")
    return found[0] if found else None


def is_there(path: Path) -> bool:
    """Whether a path names something, a link to nothing included; False for a name that no file can have."""
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    return True


def split_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """File of each split; validation or test may be missing.

    Raises:
        BadInput: no folder, no train file, or neither a validation nor a test file.
    """
    if not folder.is_dir():
        raise BadInput(f"task.data: {folder} is not a folder with train and test files ({', '.join(suffixes)})")
    found = {split: path for split in SPLITS if (path := split_file(folder, split, suffixes)) is not None}
    for split in ("train", "test"):
        if split not in found and not (split == "test" and "validation" in found):
            wanted = [split] if split == "train" else ["validation", "test"]
            near = sorted(path.name for path in folder.iterdir() if path.name.lower().startswith(tuple(f"{name}." for name in wanted)))
            instead = f"; {', '.join(near)} cannot be read" if near else ""
            named = " or ".join(wanted)
            raise BadInput(f"task.data: {folder} has no {split} file; a file {named} with one of {', '.join(suffixes)} is needed{instead}")
    return found


def told_names(files: Mapping[str, Path]) -> list[str]:
    """Sentences about files whose name is not that of their split."""
    return [f"{path.name} is taken as the {split} rows" for split, path in files.items() if path.stem != split]


def read_splits(
    folder: Path, parse: Callable[[dict[str, Any], str], Row], by: Callable[[Row], str] | None = None
) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """All rows of a folder by split, and sentences about rows that were moved between splits.

    Args:
        parse: columns and place (``file:line``) -> row; raises BadInput that names the place.
        by: kind of a row; held-out rows have a tenth of each kind.

    Raises:
        BadInput: see :func:`split_files` and :func:`read_records`; a file without rows.
    """
    rows, files = {}, split_files(folder)
    for split, path in files.items():
        rows[split] = [parse(record, f"{path}:{line}") for line, record in read_records(path)]
        if not rows[split]:
            raise BadInput(f"{path}: no rows")
    rows, notes = fill_missing(rows, folder, by)
    return rows, (*told_names(files), *notes)


def fill_missing(
    rows: dict[str, list[Row]], folder: Path, by: Callable[[Row], str] | None = None, group: Callable[[Row], Hashable] | None = None
) -> tuple[dict[str, list[Row]], tuple[str, ...]]:
    """``rows`` with a validation and a test split, and what was done for it.

    Args:
        by: see :func:`read_splits`.
        group: rows of one group, such as one article, stay in one split; then ``by`` is not used.
    """
    rows, notes = dict(rows), []
    if "validation" not in rows:
        kept, held = hold_out(rows["train"], by) if group is None else draw_groups(rows["train"], HELD_OUT_SHARE, group)
        if not kept or not held:
            raise BadInput(f"{folder}: no validation file, and too few training rows to hold some out; add a validation file")
        rows["train"], rows["validation"] = kept, held
        notes.append(f"no validation file: {len(held)} of the training rows are held out")
    if "test" not in rows:
        kept, drawn = draw_groups(rows["validation"], 0.5, group)
        if not kept or not drawn:
            raise BadInput(f"{folder}: no test file, and too few validation rows to take some; add a test file")
        rows["validation"], rows["test"] = kept, drawn
        notes.append(f"no test file: {len(drawn)} of the {len(kept) + len(drawn)} validation rows, drawn by a fixed seed, are the test rows")
    return rows, tuple(notes)


def hold_out(rows: Sequence[Row], by: Callable[[Row], str] | None = None) -> tuple[list[Row], list[Row]]:
    """Take one row in ten of each kind away for validation, the same ones every time."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        kinds["" if by is None else by(row)].append(index)
    chosen: set[int] = set()
    for kind in sorted(kinds):
        indices = kinds[kind]
        count = round(len(indices) * HELD_OUT_SHARE)
        if len(indices) > 1:
            count = max(count, 1)
        chosen.update(random.Random(kind).sample(indices, count))
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def draw_groups(rows: Sequence[Row], share: float, group: Callable[[Row], Hashable] | None = None) -> tuple[list[Row], list[Row]]:
    """(left, drawn): whole groups drawn by a fixed seed until ``share`` of the rows is reached; each row is a group without ``group``."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        members[index if group is None else group(row)].append(index)
    order = list(members.values())
    random.Random("test").shuffle(order)
    chosen: set[int] = set()
    for indices in order[:-1]:  # at least one group is left
        if len(chosen) >= share * len(rows):
            break
        chosen.update(indices)
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def fingerprint(splits: Iterable[Sequence[Row]]) -> str:
    """SHA-256 of all rows."""
    digest = hashlib.sha256()
    for rows in splits:
        digest.update(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()


def add_unlabeled(task: Task, data: Data, path: Path) -> Data:
    """``data`` with a row of each line of ``path``; they count in the fingerprint. Texts of validation and test rows are left out, and counted."""
    held = {_spaced_once(texts) for split in ("validation", "test") for row in data.split(split) for texts in task.inputs(row)}
    rows, left_out = [], 0
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip():
            continue
        try:
            row = task.unlabeled_row(line)
        except BadInput as error:
            raise BadInput(f"{path}:{number}: {error}") from error
        if any(_spaced_once(texts) in held for texts in task.inputs(row)):
            left_out += 1
        else:
            rows.append(row)
    if not rows:
        raise BadInput(f"{path}: no lines of text" + (" but those of validation and test rows" if left_out else ""))
    made = hashlib.sha256((data.fingerprint + fingerprint([rows])).encode()).hexdigest()
    told = f"{len(rows)} texts without labels from {path.name}"
    if left_out:
        told += f"; {left_out} are texts of validation or test and are left out"
    return replace(data, unlabeled=[*data.unlabeled, *rows], fingerprint=made, notes=(*data.notes, told))


def _spaced_once(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(" ".join(text.split()) for text in texts)


# --- files ------------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first line, columns) of every row of a file.

    Raises:
        BadInput: not UTF-8, not what its suffix says, half of a surrogate pair, a row of another width than the header.
    """
    content = read_text(path)
    readers = {".jsonl": _json_lines, ".csv": _quoted_table, ".tsv": _plain_table, ".conll": _sentences, ".txt": _sentences}
    yield from readers[path.suffix](path, content)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        if not path.is_file():
            raise BadInput(f"{path}: not a file that can be read")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    for beginning, what in OTHER_FORMATS.items():
        if data.startswith(beginning):
            raise BadInput(f"{path}:1: not UTF-8, but {what}")
    if data[1:2] == b"\0" or data[:1] == b"\0":  # of an ASCII letter in UTF-16, one byte is 0
        raise BadInput(f"{path}:1: not UTF-8, but UTF-16 or no text at all; convert it to UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.object  # without the mark, if there is one; it holds no line break
        line = bad[: error.start].count(b"\n") + 1
        raise BadInput(f"{path}:{line}: byte 0x{bad[error.start]:02x} is not UTF-8; convert the file to UTF-8") from error


def _json_lines(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text, object_pairs_hook=_each_key_once)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{line}: not JSON: {error}; JSON lines are one object a line") from error
        if not isinstance(record, dict):
            raise BadInput(f"{path}:{line}: an object with columns is needed, got {type(record).__name__}; JSON lines are one object a line")
        if "\\u" in text:  # only an escape can make half of a pair: the file is UTF-8
            refuse_surrogates(record, f"{path}:{line}")
        yield line, record


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return made


def refuse_surrogates(value: Any, place: str) -> None:
    """Refuse half of a surrogate pair anywhere in what was read from JSON: no UTF-8 file can hold it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise BadInput(f"{place}: lists or objects lie too deep in each other") from error
    except UnicodeEncodeError as error:
        raise BadInput(f"{place}: half of a surrogate pair ({error.object[error.start]!r}), which is no character; write the whole pair") from error


def _quoted_table(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    numbered, start = [], 1
    limit = csv.field_size_limit(LONGEST_CSV_FIELD)  # of the whole process: set back before anything else runs
    try:
        for cells in reader:
            if cells:
                numbered.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{path}:{start}: not CSV: {error}; a quotation mark inside a quoted field is doubled") from error
    finally:
        csv.field_size_limit(limit)
    yield from _with_header(path, numbered)


def _plain_table(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = enumerate(content.split("\n"), start=1)
    yield from _with_header(path, [(number, line.removesuffix("\r").split("\t")) for number, line in lines if line.strip("\r")])


def _with_header(path: Path, numbered: Sequence[tuple[int, list[str]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    if not numbered:
        return
    line, header = numbered[0]
    if len(set(header)) < len(header):
        raise BadInput(f"{path}:{line}: the header names a column twice: {', '.join(header)}")
    for line, cells in numbered[1:]:
        if len(cells) != len(header):
            raise BadInput(f"{path}:{line}: the row does not have the {len(header)} columns of the header, but {len(cells)}"
                           + ("; a text with commas stands in quotation marks" if path.suffix == ".csv" else ""))
        yield line, dict(zip(header, cells, strict=True))


def _sentences(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    tokens: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        line = line.rstrip("\r\n \t")
        if line and not line.startswith(DOCUMENT_START):
            cells = line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]
            if len(cells) < 2 or not cells[0].strip():
                raise BadInput(f"{path}:{number}: a token, then its tag in the last column is needed, got {line!r}")
            start = start if tokens else number
            tokens.append(cells[0])
            tags.append(cells[-1])
        elif tokens:
            yield start, {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


# --- columns ----------------------------------------------------------------------------------------------------------


def column_of(record: Mapping[str, Any], column: str, place: str) -> Any:
    """A column of a row; BadInput names those that there are."""
    if column not in record:
        raise BadInput(f"{place}: no column {column!r}; the columns are {shown(', '.join(map(str, record)))}")
    return record[column]


def shown(text: str, most: int = 200) -> str:
    """The beginning of a text that may be long, for a message."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def text_of(record: Mapping[str, Any], column: str, place: str, numbers: bool = False) -> str:
    """A column as text that is not empty; ``numbers``: whole numbers are written out."""
    value = column_of(record, column, place)
    if isinstance(value, bool) or not isinstance(value, str | int if numbers else str) or not str(value).strip():
        raise BadInput(f"{place}: {column} must be a text that is not empty, got {shown(repr(value))}")
    return str(value)


def label_of(value: str, column: str, place: str) -> str:
    """``value`` if it can be the name of a class, which stands on a line of labels.txt."""
    if len(value.splitlines()) > 1 or value != value.strip("\r\n"):
        raise BadInput(f"{place}: {column} {shown(repr(value))} has a line break; labels stand one to a line in labels.txt")
    if "\0" in value:
        raise BadInput(f"{place}: {column} {shown(repr(value))} has a NUL character; remove it")
    if len(value) > LONGEST_LABEL:
        raise BadInput(f"{place}: {column} has {len(value)} characters, and the name of a class at most {LONGEST_LABEL}; is it another column?")
    return value


def number_of(record: Mapping[str, Any], column: str, place: str) -> float:
    """A column as a finite number."""
    value = column_of(record, column, place)
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or abs(number) > LARGEST_NUMBER:
        raise BadInput(f"{place}: {column} must be a finite number up to {LARGEST_NUMBER:g}, got {shown(repr(value))}")
    return number
