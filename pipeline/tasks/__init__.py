"""What a model is compressed for: the tasks by name, and where their data lies.

One file a task, each with the class that :mod:`pipeline.tasks.base` describes.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.tasks.base import SPLITS
from runtimes.errors import BadInput
from runtimes.registry import Registry

if TYPE_CHECKING:
    from pipeline.tasks.base import Data, Task

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
    if place.is_file():
        return with_unlabeled(task, with_fewer_rows(task, read_file(task, place)), place.parent)
    return with_unlabeled(task, with_fewer_rows(task, task.read(place)), place)


def find_data(task: Task, recipe_folder: Path | None) -> Path:
    """The folder, or file, that ``task.data`` names; BadInput if there is none."""
    tried = list(search(task.data, recipe_folder))
    for place in tried:
        if place.exists():
            return place
    raise BadInput(f"task.data: no folder or file {task.data!r}; looked for {', '.join(map(str, tried))}. --data names another")


def read_file(task: Task, path: Path) -> Data:
    """The rows of one file as those of every split. A task reads folders, so the file is put into one.

    Raises:
        BadInput: with the file's own name and line.
    """
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
    from pipeline.tasks.files import add_unlabeled

    for name in [task.unlabeled] if isinstance(task.unlabeled, str) else task.unlabeled:
        tried = [folder / name, *search(name, folder.parent)]
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise BadInput(f"task.unlabeled: no file {name!r}; looked for {', '.join(map(str, tried))}")
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
