"""The code that a stage reaches is part of its key: what it does not reach is not, and a switch leaves all of it out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.flow.code import SWITCH, code_digest, reached

ROOT = Path(__file__).parents[3]
HEADS = "pipeline.methods.prune.heads"


def test_a_stage_reaches_what_it_imports_and_what_that_imports():
    found = set(reached(HEADS))
    assert {HEADS, "pipeline.learning.healing", "pipeline.models.surgery", "pipeline.tasks.batches", "runtimes.errors"} <= found
    assert not {name for name in found if name.startswith(("pipeline.reports", "pipeline.cli", "pipeline.stages"))}
    assert "pipeline.methods.prune.neurons" not in found


def test_imports_inside_functions_count():
    assert {"exporters.onnx_writer", "exporters.tflite_writer"} <= set(reached("pipeline.stages.export"))


def test_the_switch_leaves_the_code_out(monkeypatch):
    assert code_digest(HEADS) is not None
    monkeypatch.setenv(SWITCH, "1")
    assert code_digest(HEADS) is None


def test_a_module_of_a_plugin_counts_with_what_it_reaches(tmp_path, monkeypatch):
    (tmp_path / "somebodys_stage.py").write_text("from pipeline.models.surgery import keep_heads\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"somebodys_stage", "pipeline.models.surgery"} <= set(reached("somebodys_stage"))


@pytest.mark.parametrize(("file", "changes"), [("pipeline/models/surgery.py", True), ("pipeline/methods/prune/neurons.py", False)])
def test_the_digest_follows_the_sources(tmp_path, file, changes):
    for package in ("pipeline", "runtimes", "exporters", "device_bench"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        code = f"from pipeline.flow.code import code_digest; print(code_digest({HEADS!r}))"
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    before = digest()
    assert digest() == before
    with (tmp_path / file).open("a") as source:
        source.write("# one more line\n")
    assert (digest() != before) == changes
