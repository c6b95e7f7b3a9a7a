"""What a model is compressed for: reading labelled data, making batches of it, and the metric."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.errors import BadInput

if TYPE_CHECKING:
    from pipeline.flow.recipe import TaskSection
    from pipeline.tasks.text_classification import ClassificationData

BUILT_IN_DATA = "builtin:commands"
DATA_FOLDERS = (".", "data", "../shared/data")
"""Where a relative name of a data folder is looked up, after the recipe's own folder and ``POCKETBERT_DATA``."""


def load_data(task: TaskSection, recipe_folder: Path | None) -> ClassificationData:
    """The data that ``task.data`` names: a folder, or the built-in commands.

    Raises:
        BadInput: no such folder, or a fault in its files.
    """
    from pipeline.tasks.commands import make_commands
    from pipeline.tasks.text_classification import read_folder

    if task.data.startswith("builtin:"):
        if task.data != BUILT_IN_DATA:
            raise BadInput(f"task.data: unknown {task.data!r}; the only built-in data is {BUILT_IN_DATA!r}")
        return make_commands()
    tried = list(search(task.data, recipe_folder))
    for folder in tried:
        if folder.is_dir():
            return read_folder(folder, task.text_column, task.label_column, task.limit_per_label)
    raise BadInput(f"task.data: no folder {task.data!r}; looked for {', '.join(map(str, tried))}. --data names another")


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
