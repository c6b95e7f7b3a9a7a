"""Fine-tuning: what is wrong with the data is told before it begins."""

from __future__ import annotations

import json

import pytest

from pipeline.stages import finetune
from runtimes.errors import BadInput
from tests.pipeline.small_tasks import run_task, write_data


@pytest.mark.parametrize("split", ["train", "validation", "test", "unlabeled"])
def test_a_question_longer_than_a_window_is_told_before_any_training(tiny_model, tmp_path, monkeypatch, split):
    """In test rows it was found after all of it, and the training was lost."""

    def began(job):
        raise AssertionError("training began")

    monkeypatch.setattr(finetune, "train", began)
    data, question = write_data("question-answering", tmp_path / "data"), "turn off the light " * 20
    (data / "more.txt").write_text(f"{question if split == 'unlabeled' else 'what'}\tlight off\n")
    if split != "unlabeled":
        read = json.loads((data / f"{split}.json").read_text())
        read["data"][3]["paragraphs"][0]["qas"][0]["question"] = question
        (data / f"{split}.json").write_text(json.dumps(read))
    with pytest.raises(BadInput, match=rf"task\.data: {split} rows: question {0 if split == 'unlabeled' else 3}: the question has 80 tokens"):
        run_task("question-answering", '[[stage]]\nuse = "finetune"\n', tmp_path, tiny_model, tmp_path / "cache", 'unlabeled = "more.txt"\n')
