"""The code that a stage reaches is part of its key: what it does not reach is not, and a switch leaves all of it out."""

from __future__ import annotations

import os
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


@pytest.fixture
def copied(tmp_path):
    """The packages in a folder where they may be changed."""
    for package in ("pipeline", "runtimes", "exporters", "device_bench"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def changes_with(copied: Path, file: str, code: str) -> bool:
    """Whether what ``code`` prints is another when ``file`` has one more line, and the same when nothing has."""
    def printed() -> str:
        path = os.environ | {"PYTHONPATH": str(copied)}
        return subprocess.run([sys.executable, "-c", code], cwd=copied, env=path, capture_output=True, text=True, check=True).stdout

    before = printed()
    assert printed() == before
    with (copied / file).open("a") as source:
        source.write("# one more line\n")
    return printed() != before


@pytest.mark.parametrize(("kind", "changes"), [("token-classification", True), ("text-regression", False)])
def test_the_decoder_of_a_task_counts_with_the_task(copied, kind, changes):
    """Export and pack find it by the kind; golden cases and answers are its work."""
    code = f"from pipeline.flow.code import task_code; from pipeline.tasks import TASKS; print(task_code(TASKS[{kind!r}](data='x')))"
    assert changes_with(copied, "runtimes/decode/token_classification.py", code) == changes


@pytest.mark.parametrize(("file", "changes"), [("pipeline/models/surgery.py", True), ("pipeline/methods/prune/neurons.py", False)])
def test_the_digest_follows_the_sources(copied, file, changes):
    assert changes_with(copied, file, f"from pipeline.flow.code import code_digest; print(code_digest({HEADS!r}))") == changes
