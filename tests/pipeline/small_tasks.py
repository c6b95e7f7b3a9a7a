"""Small data for every kind of task, of the words that the tiny model knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.flow.cache import Cache
from pipeline.flow.engine import run
from pipeline.flow.ledger import Ledger
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.reports.run_report import write_report
from tests.conftest import ROWS

TEXTS = [(text, label) for label, texts in ROWS.items() for text in texts]
PAIRS = [(one, other) for one, _ in TEXTS[:6] for other, _ in TEXTS[3:6]] + [(text, text) for text, _ in TEXTS[6:]]
DEVICES = ("light", "lights", "lamp", "lamps")


def tags(text: str) -> dict[str, Any]:
    words = text.split()
    return {"tokens": words, "tags": ["B-DEVICE" if word in DEVICES else "O" for word in words]}


def shared_words(one: str, other: str) -> float:
    return float(len(set(one.split()) & set(other.split())))


def squad(texts: list[str]) -> dict[str, Any]:
    """The last word of each text is the answer."""
    paragraphs = []
    for number, text in enumerate(texts):
        answer = {"text": text.split()[-1], "answer_start": len(text) - len(text.split()[-1])}
        paragraphs.append({"context": text, "qas": [{"id": str(number), "question": "what light", "answers": [answer]}]})
    return {"data": [{"title": f"article {number}", "paragraphs": [paragraph]} for number, paragraph in enumerate(paragraphs)]}


TASKS = {
    "text-classification": ("", [{"text": text, "label": label} for text, label in TEXTS]),
    "text-classification of pairs": (
        'pair_column = "text_pair"\n', [{"text": one, "text_pair": other, "label": "same" if one == other else "other"} for one, other in PAIRS],
    ),
    "text-classification with several labels": (
        "multi_label = true\n", [{"text": text, "label": [label, *(["kitchen"] if "kitchen" in text else [])]} for text, label in TEXTS],
    ),
    "text-regression": ('pooling = "mean"\n', [{"text": text, "label": len(text.split())} for text, _ in TEXTS]),
    "token-classification": ("", [tags(text) for text, _ in TEXTS]),
    "intent-and-slots": ("", [{"label": label} | tags(text) for text, label in TEXTS]),
    "question-answering": ("stride = 2\n", None),
    "sentence-embedding": ("", [{"text": one, "text_pair": other, "label": shared_words(one, other)} for one, other in PAIRS]),
}  # fmt: skip
"""Name, whose first word is the kind -> (further keys of the [task] table, rows)."""


def write_data(name: str, folder: Path, copies: int = 4) -> Path:
    """A data folder of the task ``name``; training rows occur so many times."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = TASKS[name][1]
    for split, count in (("train", copies), ("validation", 1), ("test", 1)):
        if rows is None:
            (folder / f"{split}.json").write_text(json.dumps(squad([text for text, _ in TEXTS] * count)))
        else:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * count))
    return folder


def run_task(name: str, stages: str, place: Path, model: Path, cache: Path, further: str = "") -> Ledger:
    """Run a recipe of the task ``name`` on ``place/data``, which is written if it is not there; the bundle is ``place/out/bundle``.

    Args:
        further: keys of the [task] table.
    """
    data = place / "data"
    if not data.is_dir():
        write_data(name, data)
    recipe = place / "recipe.toml"
    recipe.write_text(f'name = "{name.split()[0]}"\n[model]\nsource = "unset"\n{task_table(name)}{further}{stages}')
    loaded = load_recipe(str(recipe), (), str(model), str(data))
    return run(loaded, place / "out", Cache(cache), Progress(quiet=True), write_report)


def task_table(name: str) -> str:
    """The [task] table of a recipe, without data."""
    return f'[task]\nkind = "{name.split()[0]}"\ndata = "unset"\nmax_length = 16\n{TASKS[name][0]}'
