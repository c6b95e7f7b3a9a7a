"""What a model is compressed for: the tasks by name, and where their data lies.

One file a task, each with the class that :mod:`pipeline.tasks.base` describes.
"""

from __future__ import annotations

import os
import random
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.tasks.base import SPLITS
from pipeline.tasks.files import add_unlabeled, is_there, read_text, shown
from runtimes.errors import BadInput
from runtimes.registry import Registry

if TYPE_CHECKING:
    from pipeline.tasks.base import Data, Row, Task

DEFAULT_KIND = "text-classification"
TASKS = Registry("pocketbert.tasks", {
    "text-classification": "pipeline.tasks.text_classification:TextClassification",
    "text-regression": "pipeline.tasks.text_regression:TextRegression",
    "token-classification": "pipeline.tasks.token_classification:TokenClassification",
    "intent-and-slots": "pipeline.tasks.intent_and_slots:IntentAndSlots",
    "question-answering": "pipeline.tasks.question_answering:QuestionAnswering",
    "sentence-embedding": "pipeline.tasks.sentence_embedding:SentenceEmbedding",
})
"""Subclasses of :class:`pipeline.tasks.base.Task`."""
BUILT_IN_DATA = "builtin:commands"
DATA_FOLDERS = (".", "data", "../shared/data")
"""Where a relative name of a data folder is looked up, after the recipe's own folder and ``POCKETBERT_DATA``."""


def load_data(task: Task, recipe_folder: Path | None) -> Data:
    """The data that ``task.data`` names: a folder, or the built-in commands.

    Raises:
        BadInput: no such folder, or a fault in its files.
    """
    if task.data.startswith("builtin:"):
        if task.data != BUILT_IN_DATA:
            raise BadInput(f"task.data: unknown {task.data!r}; the only built-in data is {BUILT_IN_DATA!r}")
        from pipeline.tasks.commands import command_rows

        if task.kind != DEFAULT_KIND:
            raise BadInput(f"task.data: {BUILT_IN_DATA} holds data for {DEFAULT_KIND}, not for {task.kind}")
        return task.make(command_rows(), BUILT_IN_DATA)
    place = find_data(task, recipe_folder)
    if not place.is_dir():
        return with_unlabeled(task, with_fewer_rows(task, read_file(task, place)), place.parent)
    data = task.read(place)
    told = (*rows_seen_twice(task, data), *labels_alike(data))
    return with_unlabeled(task, with_fewer_rows(task, replace(data, notes=(*data.notes, *told))), place)


def rows_seen_twice(task: Task, data: Data) -> list[str]:
    """A sentence where test rows have the texts of training rows: their figures flatter."""
    def texts(row: Row) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(task.example(row).items()))

    seen = {texts(row) for row in data.train}
    count = sum(texts(row) in seen for row in data.test)
    return [f"{count} of the {len(data.test)} rows of test also stand in train, so that the figures of test flatter"] if count else []


def labels_alike(data: Data) -> list[str]:
    """Sentences about classes whose names differ only in case, blanks or Unicode form, which may be one class."""
    found = []
    for names in data.labels.values():
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
        alike = [" and ".join(map(repr, group)) for group in kinds.values() if len(group) > 1]
        if alike:
            told = f"{len(alike)} times labels differ only in case, blanks or Unicode form, such as {alike[0]}"
            found.append(f"{told}; they are different classes here")
    return found


def find_data(task: Task, recipe_folder: Path | None) -> Path:
    """The folder, or file, that ``task.data`` names; BadInput if there is none."""
    tried = list(search(task.data, recipe_folder))
    for place in tried:
        if is_there(place):
            return place
    looked = shown(", ".join(map(str, tried)), 1000)
    raise BadInput(f"task.data: no folder or file {shown(repr(task.data))}; looked for {looked}. --data names another")


def read_file(task: Task, path: Path) -> Data:
    """The rows of one file as those of every split. A task reads folders, so the file is put into one.

    Raises:
        BadInput: with the file's own name and line.
    """
    read_text(path)  # refuses what cannot be read under its own name
    with TemporaryDirectory(prefix="pocketbert-") as name:
        copies = [Path(name) / f"{split}{path.suffix}" for split in SPLITS]
        for copy in copies:
            shutil.copyfile(path, copy)
        try:
            data = task.read(Path(name))
        except BadInput as error:
            told = str(error)
            for copy in (*copies, name):
                told = told.replace(str(copy), str(path))
            raise BadInput(told) from error
    return replace(data, notes=(*data.notes, f"{path.name} serves for every split: choices and final figures are of the same rows"))


def with_fewer_rows(task: Task, data: Data) -> Data:
    """``data`` with at most ``task.evaluation_rows`` rows of validation and of test, in their order."""
    if task.evaluation_rows is None:
        return data
    kept = {}
    for split in ("validation", "test"):
        rows = data.split(split)
        drawn = sorted(random.Random(split).sample(range(len(rows)), min(task.evaluation_rows, len(rows))))
        kept[split] = [rows[i] for i in drawn]
    told = f"{task.evaluation_rows} rows at most of validation and of test are used, drawn by a fixed seed"
    return replace(data, **kept, notes=(*data.notes, told))


def with_unlabeled(task: Task, data: Data, folder: Path) -> Data:
    """``data`` with the rows of ``task.unlabeled``, which count in its fingerprint."""
    if task.unlabeled is None:
        return data
    for name in [task.unlabeled] if isinstance(task.unlabeled, str) else task.unlabeled:
        tried = [folder / name, *search(name, folder.parent)]
        path = next((path for path in tried if is_there(path)), None)
        if path is None:
            raise BadInput(f"task.unlabeled: no file {shown(repr(name))}; looked for {shown(', '.join(map(str, tried)), 1000)}")
        data = add_unlabeled(task, data, path)
    return data


def search(name: str, recipe_folder: Path | None) -> Iterator[Path]:
    """Places where a data folder called ``name`` may lie, in order."""
    if Path(name).is_absolute():
        yield Path(name)
        return
    if recipe_folder is not None:
        yield recipe_folder / name
    for folder in filter(None, os.environ.get("POCKETBERT_DATA", "").split(os.pathsep)):
        yield Path(folder) / name
    for place in DATA_FOLDERS:
        yield Path(place) / name
