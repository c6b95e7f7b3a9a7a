"""A small trained model, and stages run on it as a recipe runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from pipeline.flow.cache import Cache
from pipeline.flow.engine import run
from pipeline.flow.ledger import Ledger
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.models.checkpoint import Checkpoint
from pipeline.reports.run_report import write_report
from tests.conftest import RECIPE_HEAD

RECIPE = f"""
name = "methods"
{RECIPE_HEAD}
[[stage]]
use = "finetune"
epochs = 12
batch_size = 8
learning_rate = 3e-3
"""


@pytest.fixture(scope="session")
def recipe_head() -> str:
    """A recipe up to its fine-tuning; stages can be appended."""
    return RECIPE


@pytest.fixture(scope="session")
def small_model(tmp_path_factory, tiny_model) -> Path:
    """Folder of a BERT with 4 layers of 4 heads and random weights."""
    folder = tmp_path_factory.mktemp("small")
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, max_position_embeddings=32
    )
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder


Run = Callable[..., tuple[Ledger, Checkpoint]]


@pytest.fixture(scope="session")
def run_stages(tmp_path_factory, small_model, tiny_data) -> Run:
    """Run stages, each a TOML table's lines, after a fine-tuning that is done once: (ledger, the model they leave), and folders by role."""
    folder = tmp_path_factory.mktemp("methods")
    cache = Cache(folder / "cache")

    def run_them(*stages: str, folders: bool = False) -> tuple:
        path = folder / "recipe.toml"
        path.write_text(RECIPE + "".join(f"[[stage]]\n{stage}\n" for stage in stages))
        with threads(1):
            recipe = load_recipe(str(path), model=str(small_model), data=str(tiny_data))
            ledger = run(recipe, folder / "out", cache, Progress(quiet=True), write_report)
        made = {}
        for record in ledger.records:
            made |= {role: artifact.folder for role, artifact in cache.artifacts(record["key"], record).items()}
        checkpoint = Checkpoint.load(made["model"])
        return (ledger, checkpoint, made) if folders else (ledger, checkpoint)

    return run_them


@pytest.fixture(scope="session")
def trained(run_stages) -> Checkpoint:
    """The fine-tuned model, before any method."""
    return run_stages()[1]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """These models are too small for two. Given back, because what a training ends with depends on the number."""
    with threads(1):
        yield
