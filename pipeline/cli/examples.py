"""Examples from the command line, from lines and from files: what ``predict`` answers and ``bench`` runs.

An example has the columns of the bundle's task. On a line they stand in order with tabs between them; in a file under their names.

What this file does not do: know any task. Where a file also holds the right answers, the task of the bundle's own recipe reads it, and
scores what a place gives.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.console import quieten_libraries
from runtimes.errors import BadInput

if TYPE_CHECKING:
    import numpy as np

    from pipeline.tasks.base import Data, Row, Task
    from runtimes.bundle import Bundle
    from runtimes.decode.base import Decoder

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""How a file in UTF-16 begins."""
Example = dict[str, str]
Score = Callable[[Sequence[Sequence[Mapping[str, "np.ndarray"]]]], dict[str, float]]
"""Outputs of each example's inputs -> metrics by name, the primary one first."""

TABLES = (".jsonl", ".csv", ".tsv")
LOCK = "recipe.lock.toml"
OF_TRAINING = ("kind", "data", "unlabeled", "evaluation_rows", "limit_per_label", "out_of_scope")
"""Keys of a recipe's task that do not say how a file of rows is read."""


def lines_of(raw: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
    """(place, text) of each line of a stream of bytes, as they come.

    Raises:
        BadInput: a line that is not UTF-8, with its number; half of a surrogate pair is none.
    """
    for number, line in enumerate(raw, start=1):
        if number == 1 and (line.startswith(UTF16_MARKS) or b"\0" in line):
            raise BadInput(f"{name}:1: this looks like UTF-16 or a binary file; convert the input to UTF-8")
        try:
            yield f"{name}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1} is not UTF-8"
            raise BadInput(f"{name}:{number}: {wrong}; convert the input to UTF-8") from error


def example_of_line(decoder: Decoder, text: str, place: str) -> Example:
    """The example on a line: its columns in order, with tabs between them; of one column the whole line.

    Raises:
        BadInput: a column is missing; it names the place and the columns.
    """
    try:
        return decoder.example(tuple(text.split("\t", len(decoder.columns) - 1)))
    except BadInput as error:
        raise BadInput(f"{place}: {error}, with tabs between them") from error


def example_of_arguments(decoder: Decoder, text: str, pair: str | None) -> Example:
    """The example that an argument and ``--pair`` make.

    Raises:
        BadInput: a pair that is missing or not wanted, or an argument that is not UTF-8.
    """
    for name, value in (("TEXT", text), ("--pair", pair)):
        try:
            (value or "").encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{name}: not UTF-8 at character {error.start + 1}; set the terminal to UTF-8") from error
    if pair is None and len(decoder.columns) > len(decoder.optional) + 1:
        first, second = decoder.columns[:2]
        raise BadInput(f"--pair is missing: the task of this bundle, {decoder.kind}, takes {first} (TEXT) and {second} (--pair)")
    if pair is not None and len(decoder.columns) < 2:
        raise BadInput(f"--pair: the task of this bundle, {decoder.kind}, takes {decoder.columns[0]} alone")
    return decoder.example((text,) if pair is None else (text, pair))


def read_examples(bundle: Bundle, path: Path, most: int, say: Callable[[str], None]) -> tuple[list[Example], Score | None]:
    """At most ``most`` examples of a file, drawn at random but always the same ones, and how to score them.

    Args:
        path: ``.txt`` with an example a line; otherwise a file as the recipe's data has it, or a table with the columns of the bundle.
        say: told why there is no score, if the file is one that could have answers.

    Returns:
        Examples, and None for the score where the right answers are not known.

    Raises:
        BadInput: no such file, none that can be read, or no example in it.
    """
    from pipeline.tasks.files import is_there

    if not is_there(path) or not path.is_file():
        raise BadInput(f"--texts {str(path)[:200]}: no such file")
    decoder = bundle.decoder()
    if path.suffix == ".txt":
        with path.open("rb") as raw:
            found = [example_of_line(decoder, text, place) for place, text in lines_of(raw, str(path)) if text.strip()]
        return _drawn(found, path, most), None
    try:
        task, data = _read_as_task(bundle, path)
        rows = _drawn(data.test, path, most)
        return [task.example(row) for row in rows], _score(bundle, task, replace(data, test=rows), path)
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed; pip install 'pocketbert[train]'"
    except BadInput as error:
        if path.suffix not in TABLES:
            raise
        reason = str(error)
    if path.suffix not in TABLES:
        raise BadInput(f"--texts {path}: .txt, {', '.join(TABLES)} can be read here; {reason}")
    examples = _drawn(_read_table(decoder, path), path, most)
    say(f"no scores: {reason}")
    return examples, None


def _drawn(found: Sequence[Any], path: Path, most: int) -> list[Any]:
    import numpy as np

    if not found:
        raise BadInput(f"--texts {path}: no text in it")
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:most]]


def _read_table(decoder: Decoder, path: Path) -> list[Example]:
    """Rows with the columns of the bundle; further columns are left alone."""
    from pipeline.tasks.files import read_records

    examples = []
    for line, record in read_records(path):
        try:
            examples.append(decoder.example({column: record[column] for column in decoder.columns if column in record}))
        except BadInput as error:
            raise BadInput(f"{path}:{line}: {error}; the columns are {', '.join(map(str, record))}") from error
    return examples


def _read_as_task(bundle: Bundle, path: Path) -> tuple[Task, Data]:
    """The task of the bundle's recipe, and the rows of the file as its test rows, with the classes of the bundle."""
    quieten_libraries()
    from pipeline.tasks import TASKS, read_file

    kind, lock = bundle.task["kind"], bundle.folder / LOCK
    try:
        table = tomllib.loads(lock.read_text(encoding="utf-8"))["task"]
        task = TASKS[kind](data=str(path), **{key: value for key, value in table.items() if key not in OF_TRAINING})
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{lock}: the task cannot be read from it: {error}") from error
    data = read_file(task, path)
    return task, replace(data, labels={output: list(names) for output, names in bundle.labels.items()})


def _score(bundle: Bundle, task: Task, data: Data, path: Path) -> Score:
    from tokenizers import Tokenizer

    from pipeline.stages.file_evaluation import joined

    rows: list[Row] = data.test
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_file))
    tokenizer.encode_special_tokens = bundle.special_tokens == "text"
    try:
        texts = task.encode(tokenizer, rows, data, bundle.manifest["tokenizer"].get("pad_id", 0))
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path}: {error} is none of the classes of the bundle") from error

    def score(outputs: Sequence[Sequence[Mapping[str, np.ndarray]]]) -> dict[str, float]:
        flat = [dict(one) for inputs in outputs for one in inputs]
        if len(flat) != len(texts):
            raise BadInput(f"{path}: the bundle makes {len(flat)} inputs of its rows, and its task {len(texts)}; they are of different versions")
        found = task.evaluate(joined(flat), texts, rows, data)
        return {task.primary.name: found[task.primary.name]} | found

    return score
