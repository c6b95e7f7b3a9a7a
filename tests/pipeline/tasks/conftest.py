"""What the tests of tasks share: a tokenizer, files of rows, and the real data where it lies on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pipeline.tasks import search


@pytest.fixture
def tokenizer(tiny_model) -> Tokenizer:
    """WordPiece of a few words and single letters."""
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., Path]:
    """Write rows of each split as JSON lines; the folder."""

    def write(**splits: list[dict]) -> Path:
        for split, rows in splits.items():
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return write


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Folder of a data set; the test is skipped where it is not on this machine."""

    def find(name: str) -> Path:
        found = next((folder for folder in search(name, None) if folder.is_dir()), None)
        if found is None:
            pytest.skip(f"{name} is not on this machine; POCKETBERT_DATA names the folder that holds it")
        return found

    return find
