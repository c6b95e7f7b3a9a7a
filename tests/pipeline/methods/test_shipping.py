"""Every method's result exports, quantizes and runs on both runtimes; methods stack; senseless orders are refused; kills are survived."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pipeline.flow.cache import Cache
from pipeline.flow.recipe import load_recipe
from pipeline.flow.registry import STAGES
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import count_unique_parameters
from pipeline.reports.catalogue import describe_stage
from pipeline.stages.file_evaluation import file_outputs
from runtimes.errors import BadInput
from runtimes.text import Encoding

QUICK = "heal.epochs = 1\nheal.batch_size = 8\n"
METHODS = {
    "prune-heads": "fraction = 0.75\n",
    "prune-gates": 'heads = 0.5\nffn = 0.5\nhidden = 0.25\nselect = "gain"\nmultiple_of = 8\n',
    "prune-neurons": "ffn = 0.5\nattention = 0.25\nrounds = 2\nmultiple_of = 4\n",
    "layerdrop": "layers = 2\ndrop_epochs = 1\n",
    "prune-magnitude": "sparsity = 0.5\n",
    "prune-proximal": "sparsity = 0.4\nreweight_steps = 5\nprox_epochs = 4\n",
    "factorize-svd": "removed = 0.4\n",
    "factorize-flop": "removed = 0.4\ngate_epochs = 6\ngate_learning_rate = 0.3\n",
    "share-layers": 'share = "ffn"\ngroups = 2\ntransfer.epochs = 1\n',
    "quaternion": "transfer.epochs = 1\n",
}
FILES = {"onnx": ("onnx/model.onnx", "onnx/model_quantized.onnx"), "tflite": ("tflite/model_fp32.tflite", "tflite/model_int8.tflite")}


def method(name: str) -> str:
    return f'use = "{name}"\n{METHODS[name]}{QUICK}'


def results(path, id_lists) -> np.ndarray:
    return np.stack([one["logits"] for one in file_outputs(path, [Encoding(ids, [0] * len(ids)) for ids in id_lists])])


def exported(run_stages, *stages: str):
    """(ledger, model, folder of float32 files, folder of int8 files)."""
    ledger, checkpoint, folders = run_stages(*stages, 'use = "export"\nbuckets = [8, 16]', 'use = "quantize"\nmetric_drop = 100', folders=True)
    return ledger, checkpoint, folders["exported"], folders["quantized"]


@pytest.mark.parametrize("name", METHODS)
def test_method_ships_in_both_formats(run_stages, name):
    """The export stage itself proves float32 files against torch on real texts; int8 files must answer alike."""
    _, checkpoint, full, int8 = exported(run_stages, method(name))
    ids = [[2, 70, 72, 60, 3], [2, 61, 62, 63, 64, 65, 66, 67, 3]]
    expected = torch.cat([checkpoint.model(torch.tensor([i])).logits for i in ids]).detach().numpy()
    for format_, (plain, small) in FILES.items():
        got = results(full / plain, ids)
        assert np.abs(got - expected).max() < 1e-3 * max(1, np.abs(expected).max()), format_
        rough = results(int8 / small, ids)
        assert np.abs(rough - expected).max() < 0.15 * np.abs(expected).max(), format_


@pytest.mark.parametrize("name", [n for n in METHODS if n != "prune-magnitude"])
def test_saving_is_real_in_the_files(run_stages, name):
    _, before, plain, _ = exported(run_stages)
    _, after, cut, _ = exported(run_stages, method(name))
    saved = count_unique_parameters(before.model) - count_unique_parameters(after.model)
    assert saved > 0
    for files in FILES.values():
        assert (plain / files[0]).stat().st_size - (cut / files[0]).stat().st_size > 0.75 * 4 * saved - 8000, files[0]


def test_heads_then_units_then_int8(run_stages):
    ledger, checkpoint, _, _ = exported(run_stages, method("prune-heads"), 'use = "prune-gates"\nffn = 0.5\nmultiple_of = 8\n' + QUICK)
    layers = checkpoint.model.config.layers
    assert sum(layer["heads"] for layer in layers) == 4
    assert sum(sum(layer["ffn_sizes"]) for layer in layers) < 160
    assert {r["stage"] for r in ledger.records} >= {"prune-heads", "prune-gates", "export", "quantize"}
    for subject in ledger.records[-1]["subjects"]:
        assert subject["metrics"]["test"]["accuracy"] > 60


def test_low_rank_after_heads_and_layers(run_stages):
    _, checkpoint, _, _ = exported(run_stages, method("layerdrop"), method("prune-heads"), method("factorize-svd"))
    assert len(checkpoint.model.config.layers) == 2


def test_student_with_bottlenecks_is_cut_too(run_stages):
    student = 'use = "distill-mobilebert"\nlayers = 2\nhidden_size = 32\nbottleneck_size = 16\nheads = 4\nffn_size = 32\nembedding_size = 16\n'
    student += "transfer.epochs = 1\ntransfer.batch_size = 8\nlogits = { epochs = 1, batch_size = 8, learning_rate = 3e-3, texts = { copies = 0 } }\n"
    units = 'use = "prune-neurons"\nffn = 0.5\nattention = 0.25\nmultiple_of = 4\nrounds = 1\n' + QUICK
    _, checkpoint, _, _ = exported(run_stages, student, method("prune-heads"), units, 'use = "factorize-svd"\nremoved = 0.2\n' + QUICK)
    layers = checkpoint.model.config.layers
    assert sum(layer["heads"] for layer in layers) == 2
    assert all(layer["head_size"] == 3 for layer in layers if layer["heads"])


def test_shared_layers_become_quaternion_ones(run_stages):
    _, checkpoint, _, _ = exported(run_stages, 'use = "share-layers"\ngroups = 2\ntransfer.epochs = 1\n' + QUICK, method("quaternion"))
    assert len(checkpoint.model.layers) == 2
    assert checkpoint.model.config.quaternion


def test_single_zeros_do_not_stand_in_the_way_of_sharing(tmp_path, recipe_head):
    path = tmp_path / "recipe.toml"
    for form, fits in (("weights", True), ("structures", False)):
        path.write_text(recipe_head + f'[[stage]]\nuse = "prune-proximal"\nform = "{form}"\n[[stage]]\nuse = "share-layers"\n')
        if fits:
            assert load_recipe(str(path))
        else:
            with pytest.raises(BadInput, match="layers of unequal shape"):
                load_recipe(str(path))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["export", "quantize", "prune-heads"], "changes the model after export has written its files"),
        (["prune-gates", "share-layers"], "cannot follow prune-gates, which leaves layers of unequal shape"),
        (["share-layers", "prune-heads"], "cannot follow share-layers, which leaves layers that share weights: cutting heads layer by layer"),
        (["share-layers", "layerdrop"], "saves no weights"),
        (["factorize-flop", "quaternion"], "leave one of both out"),
        (["prune-magnitude", "quaternion"], "would fill the zeros"),
    ],
)
def test_senseless_orders_are_refused_with_the_reason(recipe_head, tmp_path, stages, message):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_head + "".join(f'[[stage]]\nuse = "{stage}"\n' for stage in stages))
    with pytest.raises(BadInput, match=message):
        load_recipe(str(path))


def test_a_new_student_has_none_of_the_old_ones_traits(recipe_head, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_head + "".join(f'[[stage]]\nuse = "{stage}"\n' for stage in ("prune-heads", "distill-mobilebert", "share-layers")))
    assert len(load_recipe(str(path)).stages) == 4


@pytest.mark.parametrize("name", METHODS)
def test_catalogue_tells_paper_equations_effect_and_every_default(name):
    shown = describe_stage(STAGES[name])
    assert all(len(shown[key]) > 20 for key in ("summary", "paper", "equations", "effect"))
    assert not [option["name"] for option in shown["options"] if not option["help"]], "options without a word"


def test_killed_inside_a_gradual_schedule_ends_with_the_same_bytes(recipe_head, small_model, tiny_data, tmp_path):
    recipe = tmp_path / "gradual.toml"
    pruning = '[[stage]]\nuse = "prune-magnitude"\nsparsity = 0.8\nheal.epochs = 60\nheal.batch_size = 8\n'
    recipe.write_text(recipe_head.replace("epochs = 12", "epochs = 2") + pruning)
    weights = {}
    for name, kills in (("straight", 0), ("killed", 2)):
        cache = tmp_path / name
        rates = "t.CHECKPOINT_SECONDS, t.CHECKPOINT_SHARE = 0.05, 1.0"
        often = f"import pipeline.learning.training as t; {rates}; from pipeline.cli.main import app; app()"
        command = [sys.executable, "-c", often]
        command += ["run", str(recipe), "--model", str(small_model), "--data", str(tiny_data)]
        command += ["--cache", str(cache), "--out", str(tmp_path / f"o{name}")]
        struck = 0
        while struck < kills:
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ)
            before = [p.stat().st_mtime_ns for p in cache.glob("work/*/pruning")]
            while process.poll() is None:
                now = [p.stat().st_mtime_ns for p in cache.glob("work/*/pruning")]
                if now and now != before:
                    time.sleep(0.2)
                    process.send_signal(signal.SIGKILL)
                    struck += 1
                    break
                time.sleep(0.02)
            process.wait()
            assert struck or process.returncode != 0, "the run ended before it could be killed"
        subprocess.run(command, check=True, capture_output=True)
        record = json.loads((tmp_path / f"o{name}" / "ledger.json").read_text())["stages"][-1]
        folder = Cache(cache).artifacts(record["key"], record)["model"].folder
        weights[name] = (folder / "model.safetensors").read_bytes()
        assert int((Checkpoint.load(folder).model.pooler.weight == 0).sum()) == int(0.8 * 32 * 32)
    assert weights["straight"] == weights["killed"]


def test_loss_that_is_no_number_stops_and_names_the_step(run_stages):
    from runtimes.errors import GateFailed

    with pytest.raises(GateFailed, match=r"prune-magnitude: the loss became (nan|inf) at step \d+"):
        run_stages('use = "prune-magnitude"\nsparsity = 0.5\nheal.temperature = 1e-38\nheal.epochs = 4\nheal.batch_size = 8')
