"""A whole run on a tiny model: cached, resumed after a kill, the same bytes twice, gated, and loud about faults."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from pipeline.flow import engine
from pipeline.flow.cache import Cache, tree_sha256
from pipeline.flow.engine import run
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.reports.results import result_rows
from pipeline.reports.run_report import write_report
from pipeline.stages import file_evaluation
from runtimes.errors import BadInput, GateFailed
from tests.conftest import RECIPE_HEAD
from tests.pipeline.small_tasks import run_task, write_data

STAGES = ["finetune", "prune-vocab", "distill-mobilebert", "factorize-embeddings", "export", "quantize", "bench", "pack"]


@pytest.fixture
def go(tiny_recipe, tiny_model, tiny_data):
    def start(out: Path, cache: Path, *overrides: str):
        recipe = load_recipe(str(tiny_recipe), overrides, str(tiny_model), str(tiny_data))
        return run(recipe, out, Cache(cache), Progress(quiet=True), write_report)

    return start


def shipped(bundle: Path) -> str:
    """Hash of a bundle without its measurements."""
    copy = bundle.with_name("without-report")
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("report"))
    try:
        return tree_sha256(copy)
    finally:
        shutil.rmtree(copy)


def test_the_ledger_tells_every_stage_and_file(tiny_run):
    ledger = json.loads((tiny_run / "ledger.json").read_text())
    assert [record["stage"] for record in ledger["stages"]] == STAGES
    assert ledger["outcome"] == "published"
    rows = {row["name"]: row for row in result_rows(ledger)}
    assert rows["teacher"]["test"] > 60, "the tiny teacher learned its three classes"
    for name in ("ONNX fp32", "TFLite fp32", "ONNX int8", "TFLite int8"):
        assert rows[name]["size_bytes"] > 0
        assert rows[name]["p50_ms"] > 0
        assert rows[name]["speedup"] > 0
    assert rows["embeddings of rank 8"]["unique_params"] < rows["student"]["unique_params"] < rows["teacher"]["unique_params"]
    assert rows["teacher"]["speedup"] == pytest.approx(1.0)


def test_nothing_that_ships_tells_where_it_was_made(tiny_run, tiny_model, tiny_data):
    """Model, data, cache and output lie in absolute paths of this machine; a bundle and its ledger name the last part of the first two."""
    base = str(tiny_model.parent)
    assert all(str(place).startswith(base) for place in (tiny_data, tiny_run))
    for file in (p for p in tiny_run.rglob("*") if p.is_file()):
        assert base.encode() not in file.read_bytes(), file
    lock = tomllib.loads((tiny_run / "bundle" / "recipe.lock.toml").read_text())
    assert (lock["model"]["source"], lock["task"]["data"]) == (tiny_model.name, tiny_data.name)
    assert json.loads((tiny_run / "bundle" / "bundle.json").read_text())["provenance"]["model"] == tiny_model.name


def test_running_again_runs_nothing(go, tiny_run):
    ledger = go(tiny_run.parent / "again", tiny_run.parent / "cache")
    assert all(record["cached"] for record in ledger.records)
    assert shipped(tiny_run.parent / "again" / "bundle") == shipped(tiny_run / "bundle")


def test_two_builds_are_byte_identical(go, tiny_run, tmp_path):
    go(tmp_path / "out", tmp_path / "cache")
    for file in sorted(p for p in (tiny_run / "bundle").rglob("*") if p.is_file() and "report" not in p.parts):
        other = tmp_path / "out" / "bundle" / file.relative_to(tiny_run / "bundle")
        assert file.read_bytes() == other.read_bytes(), file.name


@pytest.mark.parametrize(
    ("change", "rerun"), [("quantize.scheme=int8-dynamic", []), ("bench.rounds=1", ["bench"]), ("export.buckets=[4,8]", STAGES[4:])]
)
def test_a_changed_stage_reruns_itself_and_those_after_it(go, tiny_run, tmp_path, change, rerun):
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    ledger = go(tmp_path / "out", tmp_path / "cache", change)
    ran = [record["stage"] for record in ledger.records if not record["cached"]]
    assert [stage for stage in ran if stage != "pack"] == [stage for stage in rerun if stage != "pack"]
    assert ("pack" in ran) == bool(rerun), "the bundle carries the recipe, so it follows every change"


def test_a_damaged_cache_entry_is_made_again(go, tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    (weights,) = (p for p in (tmp_path / "cache" / "stages").glob("*/quantized/onnx/model_quantized.onnx"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(bytes(data))
    ledger = go(tmp_path / "out", tmp_path / "cache")
    assert [r["stage"] for r in ledger.records if not r["cached"]] == ["quantize"]
    assert shipped(tmp_path / "out" / "bundle") == shipped(tiny_run / "bundle")


def test_a_damaged_baseline_file_is_made_again(tiny_run, tiny_recipe, tiny_model, tiny_data, tmp_path):
    """It is made once for all models that are compressed from one; damaged, it must not reach a stage that then hashes it as good."""
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    (shared,) = (tmp_path / "cache" / "shared").glob("*/files/model.onnx")
    whole = shared.read_bytes()
    shared.write_bytes(whole[: len(whole) // 2])
    recipe = load_recipe(str(tiny_recipe), ('export.formats=["onnx"]',), str(tiny_model), str(tiny_data))
    recipe.stages = recipe.stages[:5]
    ledger = run(recipe, tmp_path / "out", Cache(tmp_path / "cache"), Progress(quiet=True), write_report)
    assert [record["cached"] for record in ledger.records] == [True] * 4 + [False]
    written = tmp_path / "cache" / "stages" / ledger.records[-1]["key"] / "baseline_file" / "model.onnx"
    assert written.read_bytes() == shared.read_bytes() == whole


DRIVER = """
import sys
from pathlib import Path
from pipeline.learning import training
from pipeline.flow.cache import Cache
from pipeline.flow.engine import run
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.reports.results import result_rows
from pipeline.reports.run_report import write_report
training.CHECKPOINT_SECONDS, training.CHECKPOINT_SHARE = 0.2, 1.0
recipe, model, data, out, cache = sys.argv[1:]
run(load_recipe(recipe, [], model, data), Path(out), Cache(Path(cache)), Progress(live=False), write_report)
"""


def test_killed_again_and_again_ends_with_the_same_bytes(tiny_run, tiny_recipe, tiny_model, tiny_data, tmp_path):
    """SIGKILL at moments spread over the whole run, then to the end: the bundle is that of an undisturbed run."""
    command = [sys.executable, "-c", DRIVER, *map(str, (tiny_recipe, tiny_model, tiny_data, tmp_path / "out", tmp_path / "cache"))]
    kills = 0
    for delay_seconds in (7, 9, 11, 13, 16, 20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay_seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1
    subprocess.run(command, check=True, capture_output=True)
    assert shipped(tmp_path / "out" / "bundle") == shipped(tiny_run / "bundle")
    assert not list((tmp_path / "cache" / "work").iterdir()), "partial work is removed when its stage is done"


def test_a_gate_that_does_not_hold_publishes_nothing_and_writes_the_ledger(go, tiny_run, tmp_path):
    with pytest.raises(GateFailed, match=r"size_mb is .* MB, the budget allows 0\.001"):
        go(tmp_path / "out", tiny_run.parent / "cache", "budget.size_mb=0.001")
    assert not (tmp_path / "out" / "bundle").exists()
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["outcome"].startswith("failed: ")
    assert [record["stage"] for record in ledger["stages"]] == STAGES[:5], "float32 files ship too"
    assert [gate["ok"] for gate in ledger["gates"]] == [False, False]
    assert "failed" in (tmp_path / "out" / "report.html").read_text()


def test_files_that_do_not_ship_need_not_hold_the_budget(go, tiny_run, tmp_path):
    sizes = {s["file"]: s["size_bytes"] for r in json.loads((tiny_run / "ledger.json").read_text())["stages"] for s in r["subjects"] if s["file"]}
    floats, whole = [f for f in sizes if f in ("onnx/model.onnx", "tflite/model_fp32.tflite")], sum(sizes.values())
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    kept = go(tmp_path / "out", tmp_path / "cache", f"budget.size_mb={whole / 1e6}", "budget.latency_ms=1000.0", 'pack.precisions=["int8"]')
    assert {gate["file"] for gate in kept.gates if gate["gate"] == "size_mb"} == set(sizes) - set(floats)
    assert {gate["file"] for gate in kept.gates if gate["gate"] == "latency_ms"} == set(sizes) - set(floats)
    assert not any((tmp_path / "out" / "bundle" / file).exists() for file in floats)


def test_the_metric_gate_trips_on_a_broken_int8_file(go, tiny_run, tmp_path, monkeypatch):
    """An int8 file that lost its accuracy does not ship: here its codes are scrambled, and the fallback is allowed any loss."""
    from exporters import onnx_writer

    plain = onnx_writer.rows_to_int8

    def broken(weight, bits=8):
        codes, scales = plain(weight, bits)
        return codes[::-1].copy(), scales

    go(tmp_path / "whole", tiny_run.parent / "cache", "budget.metric_drop=15.0")
    monkeypatch.setattr(onnx_writer, "rows_to_int8", broken)
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    with pytest.raises(GateFailed, match=r"^onnx/model_quantized\.onnx: metric_drop is [^;]* the budget allows 15\. No bundle"):
        go(tmp_path / "out", tmp_path / "cache", "budget.metric_drop=15.0", "quantize.metric_drop=100.0")
    assert not (tmp_path / "out" / "bundle").exists()


def test_recalls_are_held_class_by_class(tiny_recipe, tiny_model, tiny_data, tmp_path, monkeypatch):
    """The mean hides a class that is lost: the files answer "on" for every "off", and for "music", which has too few rows to be judged."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    more = [row | {"text": f"{row['text']}{' now' * number}"} for number in range(5) for row in rows if row["label"] != "music" or not number]
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))

    def start(name, *overrides):
        recipe = load_recipe(str(tiny_recipe), ("budget.recall_drop=60.0", 'export.formats=["onnx"]', *overrides), str(tiny_model), str(data))
        recipe.stages = [stage for stage in recipe.stages if stage.use in ("finetune", "export")]
        return run(recipe, tmp_path / name, Cache(tmp_path / "cache"), Progress(quiet=True), write_report)

    held = start("held")
    assert [(gate["file"], gate["gate"], gate["unit"], gate["ok"]) for gate in held.gates] == [
        ("onnx/model.onnx", "recall_drop", f"points of validation recall of '{label}'", True) for label in ("off", "on")
    ]
    plain = file_evaluation.joined

    def lost(outputs):
        logits = plain(outputs)["logits"].copy()
        logits[:, ["music", "off", "on"].index("off")] = -1e9
        return {"logits": logits}

    monkeypatch.setattr(file_evaluation, "joined", lost)
    with pytest.raises(GateFailed, match=r"^onnx/model\.onnx: recall_drop is .* recall of 'off', the budget allows 60\. No bundle"):
        start("lost", "export.max_buckets=3")
    assert "recall of &#39;off&#39;" in (tmp_path / "lost" / "report.html").read_text()


def test_recalls_that_nothing_judges_are_refused(go, tmp_path):
    with pytest.raises(BadInput, match=r"budget\.recall_drop: no class has 20 validation rows, the largest has 5"):
        go(tmp_path / "out", tmp_path / "cache", "budget.recall_drop=2.0")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), "failed: stopped by Ctrl-C; the same command goes on from there"),
        (ZeroDivisionError("by zero"), "failed: ZeroDivisionError: by zero"),
        (SystemExit(1), "failed: SystemExit: 1"),
    ],
    ids=["Ctrl-C", "a fault of ours", "exit"],
)
@pytest.mark.parametrize("where", ["in a stage", "while it is published"])
def test_whatever_ends_a_run_stands_in_the_ledger(go, tiny_run, tmp_path, monkeypatch, error, told, where):
    def ended(*_: object, **__: object):
        raise error

    owner, name = (engine, "_lead") if where == "in a stage" else (shutil, "copyfile")
    monkeypatch.setattr(owner, name, ended)
    with pytest.raises(type(error)):
        go(tmp_path / "out", tiny_run.parent / "cache")
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["outcome"] == told
    assert told.removeprefix("failed: ").split(";")[0] in (tmp_path / "out" / "report.html").read_text()


def test_an_earlier_bundle_survives_a_failed_run(go, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "out")
    before = tree_sha256(tmp_path / "out" / "bundle")
    with pytest.raises(GateFailed):
        go(tmp_path / "out", tiny_run.parent / "cache", "budget.size_mb=0.001")
    assert tree_sha256(tmp_path / "out" / "bundle") == before


def test_read_only_output_is_refused_before_any_work(go, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"--out .*file.*cannot be written"):
        go(tmp_path / "file" / "out", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_folder_called_bundle_that_is_none_is_never_replaced(go, tmp_path):
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    (tmp_path / "out" / "bundle" / "thesis.txt").write_text("three years of work")
    with pytest.raises(BadInput, match="none of ours"):
        go(tmp_path / "out", tmp_path / "cache")
    assert (tmp_path / "out" / "bundle" / "thesis.txt").exists()


def test_a_full_disk_loses_nothing(go, tiny_run, tmp_path, monkeypatch):
    """The disk fills while the bundle is published: the earlier one stays whole, and a later run goes on."""
    shutil.copytree(tiny_run, tmp_path / "out")
    before = tree_sha256(tmp_path / "out" / "bundle")

    def full(*_: object, **__: object):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            go(tmp_path / "out", tiny_run.parent / "cache")
    assert tree_sha256(tmp_path / "out" / "bundle") == before
    assert not (tmp_path / "out" / ".bundle.partial").exists()
    ledger = go(tmp_path / "out", tiny_run.parent / "cache")
    assert ledger.outcome == "published"


def test_positions_must_suffice(go, tmp_path):
    with pytest.raises(BadInput, match=r"task\.max_length: 64, but the model has 32 positions"):
        go(tmp_path / "out", tmp_path / "cache", "task.max_length=64")


def test_texts_longer_than_every_bucket_are_cut_and_counted(go, tiny_run, tmp_path):
    shutil.copytree(tiny_run.parent / "cache", tmp_path / "cache")
    ledger = go(tmp_path / "out", tmp_path / "cache", "task.max_length=6", "finetune.epochs=1", "export.buckets=[4]", "bench.lengths=[4]")
    notes = [note for record in ledger.records for subject in record["subjects"] for note in subject["notes"]]
    assert any("fill all 6 tokens; what is longer was cut" in note for note in notes)


def test_a_stage_reads_and_writes_other_roles(go, tiny_run, tmp_path):
    """A student of a student: the first one teaches under the name assistant."""
    text = (tmp_path / "chain.toml")
    text.write_text(
        RECIPE_HEAD
        + """
        [[stage]]
        use = "finetune"
        epochs = 2
        batch_size = 8
        [[stage]]
        use = "prune-heads"
        writes = { model = "assistant" }
        heal = { epochs = 0 }
        [[stage]]
        use = "layerdrop"
        layers = 1
        choose = "every-other"
        drop_epochs = 0
        reads = { teacher = "assistant" }
        heal = { epochs = 1, learn_from = "teacher" }
        """
    )
    recipe = load_recipe(str(text), (), str(tiny_run.parent.parent / "unset"), "unset")
    assert recipe.stages[2].reads == {"teacher": "assistant"}


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ('reads = { tutor = "assistant" }', r"prune-heads\.reads: the stage has no role 'tutor'"),
        ('reads = { teacher = "assistant" }', r"prune-heads: needs 'assistant', which no earlier stage makes; an earlier stage must say writes = "),
        ('writes = { bundle = "assistant" }', r"prune-heads\.writes: the stage has no role 'bundle'"),
    ],
)
def test_roles_that_do_not_exist_are_refused(tmp_path, stage, told):
    path = tmp_path / "r.toml"
    path.write_text(f'[model]\nsource = "m"\n[task]\ndata = "d"\n[[stage]]\nuse = "finetune"\n[[stage]]\nuse = "prune-heads"\n{stage}\n')
    with pytest.raises(BadInput, match=told):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("stage", "keys", "cure"),
    [
        ("finetune", "", "adopt in its place"),
        ("prune-heads", "", "take prune-gates with heads"),
        ("prune-gates", 'select = "gain"\n', 'set select = "l0"'),
        ("layerdrop", 'layers = 1\nheal = { learn_from = "labels" }\n', 'set heal.learn_from = "unpruned"'),
    ],
)
def test_a_stage_that_learns_from_labels_which_there_are_not_is_refused_before_any_work(tiny_model, tmp_path, stage, keys, cure):
    data = write_data("sentence-embedding", tmp_path / "data")
    (data / "train.jsonl").write_text('{"text": "turn on the light"}\n{"text": "lamp off please"}\n')
    number = 1 if stage == "finetune" else 2
    with pytest.raises(BadInput, match=rf"stage\[{number}\]\.{stage}: learns from labels, and the training rows have none; .*{cure}"):
        run_task("sentence-embedding", f'[[stage]]\nuse = "{stage}"\n{keys}', tmp_path, tiny_model, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_gates_need_no_labels(tiny_model, tmp_path):
    """What the refusals advise."""
    data = write_data("sentence-embedding", tmp_path / "data")
    (data / "train.jsonl").write_text('{"text": "turn on the light"}\n{"text": "lamp off please"}\n')
    gates = '[[stage]]\nuse = "prune-gates"\nheads = 0.25\ngate_epochs = 1\nheal = { epochs = 1 }\n'
    assert run_task("sentence-embedding", gates, tmp_path, tiny_model, tmp_path / "cache").outcome == "ok"
