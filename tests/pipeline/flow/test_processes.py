"""One run in two processes gives what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.flow.cache import Cache
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.inference import predict
from pipeline.tasks.batches import encode
from tests.conftest import RECIPE_HEAD, ROWS

STAGES = {
    "prune-heads": "fraction = 0.5\nheal = { epochs = 2, batch_size = 8 }\n",
    "layerdrop": "layers = 1\ndrop_epochs = 1\nheal = { epochs = 1, batch_size = 8 }\n",  # layers without gradients in a step
    "distill-mobilebert": "layers = 2\nhidden_size = 32\nbottleneck_size = 16\nheads = 2\nffn_size = 32\nembedding_size = 16\n"
    "transfer = { epochs = 6, batch_size = 8, learning_rate = 3e-3 }\n"
    "logits = { epochs = 12, batch_size = 8, learning_rate = 3e-3, texts = { copies = 0 } }\n",  # layers that learn one after another
}
TOLERANCE = {"prune-heads": 0.05, "layerdrop": 0.05, "distill-mobilebert": 0.5}
"""Of the logits' norm. A random student amplifies the rounding of bfloat16 most; untrained it would be at about 1.4."""


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_the_same_model_within_tolerance(stage, tiny_model, tiny_data, tmp_path):
    """Without dropout, whose dice fall otherwise, the mean of two halves' gradients is the whole batch's."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text()) | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "two.toml"
    finetune = 'use = "finetune"\nepochs = 3\nbatch_size = 8\nlearning_rate = 1e-3\nprecision = "fp32"'
    recipe.write_text(f'name = "two"\n{RECIPE_HEAD}[[stage]]\n{finetune}\n[[stage]]\nuse = "{stage}"\n{STAGES[stage]}')
    launchers = {
        "one": [sys.executable, "-m"],
        "two": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m"],
    }
    logits = {}
    for name, launcher in launchers.items():
        command = [*launcher, "pipeline.cli", "run", str(recipe), "--model", str(model), "--data", str(tiny_data)]
        command += ["--cache", str(tmp_path / name), "--out", str(tmp_path / f"out-{name}")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report  ") == 1, "the second process prints nothing"
        record = [r for r in json.loads((tmp_path / f"out-{name}" / "ledger.json").read_text())["stages"]][-1]
        folder: Path = Cache(tmp_path / name).artifacts(record["key"], record)["model"].folder
        logits[name] = predict(*_with_texts(Checkpoint.load(folder)))["logits"]
    assert not torch.equal(logits["one"], logits["two"]), "two really took part: sums in another order round otherwise"
    assert (logits["one"] - logits["two"]).norm() < TOLERANCE[stage] * logits["one"].norm()


def _with_texts(checkpoint: Checkpoint):
    return checkpoint.model, encode(checkpoint.tokenizer, [text for texts in ROWS.values() for text in texts], 16, 0)
