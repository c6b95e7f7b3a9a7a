"""Every stage that changes a model, on every kind of task: it runs, and its result gives what the task needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.flow import registry
from tests.pipeline.small_tasks import TASKS, run_task, write_data

HEAL = "heal = { epochs = 1, batch_size = 8 }\n"
TRANSFER = "transfer = { epochs = 1, batch_size = 8 }\n"
STAGES = {
    "prune-vocab": "",
    "prune-heads": HEAL,
    "prune-gates": "heads = 0.25\ngate_epochs = 1\nmultiple_of = 4\n" + HEAL,
    "prune-neurons": "attention = 0.25\nrounds = 2\nmultiple_of = 4\n" + HEAL,
    "prune-magnitude": HEAL,
    "prune-proximal": "sparsity = 0.0\n" + HEAL,
    "layerdrop": "layers = 1\ndrop_epochs = 1\n" + HEAL,
    "factorize-embeddings": "rank = 8\nheal = { epochs = 1, batch_size = 8, texts = { copies = 1 } }\n",
    "factorize-svd": "removed = 0.3\n" + HEAL,
    "factorize-flop": "removed = 0.0001\n" + HEAL,
    "share-layers": TRANSFER + HEAL,
    "quaternion": TRANSFER + HEAL,
    "distill-mobilebert": (
        "layers = 2\nhidden_size = 32\nbottleneck_size = 16\nheads = 2\nffn_size = 32\nembedding_size = 16\n"
        + TRANSFER + "logits = { epochs = 1, batch_size = 8, texts = { copies = 1 } }\n"
    ),
}  # fmt: skip
PLUMBING = {"finetune", "adopt", "export", "quantize", "tune", "bench", "pack"}


def test_all_stages_are_here():
    assert set(STAGES) | PLUMBING == set(registry.STAGES.built_in)


@pytest.fixture(scope="module")
def go(tmp_path_factory, tiny_model):
    """Run a stage behind a fine-tuning that is done once a task."""
    folder: Path = tmp_path_factory.mktemp("all-tasks")

    def start(task: str, stage: str, lines: str, unlabeled: str = ""):
        place = folder / task.replace(" ", "-")
        if not place.is_dir():
            write_data(task, place / "data")
            (place / "data" / "more.txt").write_text("play the music now\nlamp off please\n")
        finetune = '[[stage]]\nuse = "finetune"\nepochs = 2\nbatch_size = 8\nlearning_rate = 1e-3\n'
        stages = f'{finetune}[[stage]]\nuse = "{stage}"\n{lines}'
        return run_task(task, stages, place, tiny_model, folder / "cache", unlabeled)

    return start


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_on_a_task(go, stage, task):
    ledger = go(task, stage, STAGES[stage])
    kind = ledger.recipe.task
    before, after = ledger.records[0]["subjects"][0], ledger.records[-1]["subjects"][-1]
    assert after["unique_params"] < before["unique_params"] or stage in ("prune-magnitude", "prune-proximal", "factorize-flop")
    for split in ("validation", "test"):
        assert {metric.name for metric in kind.metrics} & set(after["metrics"][split]) >= {kind.primary.name}


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("text-classification of pairs", "question-answering")])
def test_texts_without_labels_are_learned_from(go, task):
    ledger = go(task, "prune-heads", HEAL, 'unlabeled = "more.txt"\n')
    assert ledger.rows["unlabeled"] == 2


def test_a_figure_below_zero_is_told_as_it_is(tiny_model, tmp_path):
    """Of validation rows whose numbers fall where those of training rise, every choice of layers has a negative correlation."""
    data = write_data("text-regression", tmp_path / "data")
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    (data / "validation.jsonl").write_text("".join(json.dumps(row | {"label": -row["label"]}) + "\n" for row in rows))
    finetune = '[[stage]]\nuse = "finetune"\nepochs = 12\nbatch_size = 8\nlearning_rate = 3e-3\n'
    layerdrop = '[[stage]]\nuse = "layerdrop"\nlayers = 1\ndrop_epochs = 0\nheal = { epochs = 0 }\n'
    ledger = run_task("text-regression", finetune + layerdrop, tmp_path, tiny_model, tmp_path / "cache")
    figure = ledger.records[-1]["subjects"][-1]["metrics"]["validation"]["spearman"]
    assert figure < 0
    assert any(f"best Spearman {figure:.2f}" in note for note in ledger.records[-1]["notes"])
