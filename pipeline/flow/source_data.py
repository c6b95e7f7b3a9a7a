"""The data of a recipe as its source needs it: texts without labels, and classes in the order of a head that is taken as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import tasks
from pipeline.models.own_task import own_labels
from pipeline.tasks.base import Data, Row, Task
from pipeline.tasks.files import add_unlabeled
from runtimes.errors import BadInput

if TYPE_CHECKING:
    from pipeline.flow.recipe import Recipe

VOCABULARY = "builtin:vocabulary"
LABELLED = ("label", "labels", "tags")
"""Columns of rows that hold names of classes."""


def load_data(recipe: Recipe, source: Path, recipe_folder: Path | None) -> Data:
    """Rows of the recipe's task.

    Args:
        source: folder of the model that the recipe starts from.

    Raises:
        BadInput: see :func:`pipeline.tasks.load_data`; classes that the source's head does not have.
    """
    task, as_it_is = recipe.task, any(stage.use == "adopt" for stage in recipe.stages)
    if not task.needs_labels:
        return unlabelled(task, source, recipe_folder, recipe.seed)
    data = tasks.load_data(task, recipe_folder)
    return with_classes(data, own_labels(source)) if as_it_is else data


def unlabelled(task: Task, source: Path, recipe_folder: Path | None, seed: int) -> Data:
    """Texts of a file, or random words of the source's vocabulary: all of them to choose lengths by, one half each as validation and test rows."""
    empty = Data([], [], [], own_labels(source), hashlib.sha256(b"").hexdigest())
    if task.data == VOCABULARY:
        from pipeline.models.hub_fields import read_config
        from pipeline.models.tokenizer_files import read_tokenizer
        from pipeline.models.vocabulary_texts import vocabulary_texts

        rows = vocabulary_texts(read_tokenizer(source, read_config(source)["model_type"])[0], task.columns, seed)
        told = f"no texts were given: {len(rows)} were made of random words of the vocabulary. Real texts tell more: --data or --texts"
        data = replace(empty, unlabeled=[task.unlabeled_row("\t".join(row.values())) for row in rows], notes=(told,))
    else:
        path = tasks.find_data(task, recipe_folder)
        if not path.is_file():
            raise BadInput(f"task.data: {path} is a folder; with task.metric = {task.metric!r} a file of texts is needed, one a line")
        data = add_unlabeled(task, empty, path)
    rows = data.unlabeled
    if len(rows) < 2:
        raise BadInput(f"task.data: {task.data} has one text; two at least are needed, one to choose by and one to report")
    return tasks.with_fewer_rows(task, replace(data, train=rows, validation=rows[::2], test=rows[1::2], unlabeled=[]))


def with_classes(data: Data, own: Mapping[str, list[str]]) -> Data:
    """``data`` with the classes of the source in the source's order; those of the data may be its numbers, or differ in upper and lower case.

    Raises:
        BadInput: a class that the source does not have.
    """
    labels, renamed = dict(data.labels), {}
    for output, names in own.items():
        if output not in labels:
            continue
        known = {name: name for name in names}
        known |= {name.casefold(): name for name in names} | {str(number): name for number, name in enumerate(names)} | known
        found = {label: known.get(label) or known.get(label.casefold()) for label in labels[output]}
        strange = [label for label, name in found.items() if name is None]
        if strange or len(set(found.values())) < len(found):
            raise BadInput(
                f"task.data: the data has the classes {', '.join(labels[output][:10])}, the source's head {', '.join(names[:10])}; "
                f"name them alike (id2label in the model's config.json), or train a head of your own with finetune"
            )
        labels[output] = list(names)
        renamed |= {label: name for label, name in found.items() if label != name}
    splits = {split: [_renamed(row, renamed) for row in data.split(split)] for split in ("train", "validation", "test")} if renamed else {}
    told = ("classes have the source's names: " + ", ".join(f"{given} is {name}" for given, name in renamed.items()),) if renamed else ()
    return replace(data, labels=labels, notes=(*data.notes, *told), **splits)


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    def one(value: Any) -> Any:
        return [one(item) for item in value] if isinstance(value, list) else names.get(value, value)

    return {column: one(value) if column in LABELLED else value for column, value in row.items()}
