"""Numbers of texts: reading, a loss that does not depend on their unit, and correlations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.tasks.base import Data
from pipeline.tasks.batches import make_batch
from pipeline.tasks.text_regression import TextRegression, correlations
from runtimes.decode import decoder
from runtimes.errors import BadInput

ROWS = [{"text": f"turn on {word}", "text_pair": f"play {word}", "label": number} for number, word in enumerate("light song music now my".split())]


def task(**options) -> TextRegression:
    return TextRegression(data="", **options)


def scaled(rows: list[dict], factor: float) -> Data:
    rows = [{"text": row["text"], "value": row["label"] * factor} for row in rows]
    return Data(rows, rows, rows, {}, "")


def test_reading_pairs(write_rows):
    data = task(pair_column="text_pair").read(write_rows(train=ROWS, validation=ROWS[:2], test=ROWS[2:]))
    assert data.validation[1] == {"text": "turn on song", "text_pair": "play song", "value": 1.0}
    assert task(pair_column="text_pair").segments == 2
    assert task().segments == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 1}, r"test\.jsonl:6: no column 'text_pair'"),
        ({"text": "x", "text_pair": "y"}, r"test\.jsonl:6: no column 'label'"),
        ({"text": "x", "text_pair": "y", "label": float("nan")}, r"test\.jsonl:6: label must be a finite number up to 1e\+15, got nan"),
        ({"text": "x", "text_pair": "y", "label": "high"}, r"test\.jsonl:6: label must be a finite number up to 1e\+15, got 'high'"),
        ({"text": "x", "text_pair": " ", "label": 1}, r"test\.jsonl:6: text_pair must be a text"),
    ],
)
def test_faults_are_named(write_rows, row, message):
    with pytest.raises(BadInput, match=message):
        task(pair_column="text_pair").read(write_rows(train=ROWS, validation=ROWS, test=[*ROWS, row]))


@pytest.mark.parametrize("factor", [0.01, 1.0, 1000.0])
def test_the_loss_of_a_model_that_knows_the_mean_is_one_in_any_unit(tokenizer, factor):
    data = scaled(ROWS, factor)
    texts = task().encode(tokenizer, data.train, data, 0)
    batch = make_batch(texts, np.arange(len(texts)))
    mean = torch.full((len(texts), 1), 2.0 * factor)
    right = torch.tensor([[row["value"]] for row in data.train])
    assert task().loss({"logits": mean}, batch).item() == pytest.approx(1, rel=1e-4)
    assert task().soft_loss({"logits": mean}, {"logits": right}, batch, 2.0).item() == pytest.approx(1, rel=1e-4)
    # Altered copies have no target; the loss against a teacher keeps its scale all the same.
    copies = make_batch(texts.with_ids(texts.ids), np.arange(len(texts)))
    assert task().soft_loss({"logits": mean}, {"logits": right}, copies, 2.0).item() == pytest.approx(1, rel=1e-4)


def test_pairs_have_two_segments(tokenizer, write_rows):
    paired = task(pair_column="text_pair", max_length=8)
    data = paired.read(write_rows(train=ROWS, validation=ROWS, test=ROWS))
    texts = paired.encode(tokenizer, data.train, data, 0)
    assert texts.types is not None and set(texts.types) == {0, 1}
    assert texts.lengths.max() == 8


def test_correlations():
    wanted = np.arange(10.0)
    assert correlations(wanted**3, wanted)["spearman"] == pytest.approx(100)
    assert 90 < correlations(wanted**3, wanted)["pearson"] < 93
    assert correlations(np.ones(10), wanted) == {"spearman": 0.0, "pearson": 0.0}
    # Nearly constant float32 values are no reason to warn.
    assert abs(correlations(np.float32(1000) + np.float32(1e-4) * np.arange(10, dtype=np.float32), wanted)["pearson"]) > 0


def test_metrics_are_those_of_the_rows_taken(tokenizer):
    data = scaled(ROWS, 1.0)
    texts = task().encode(tokenizer, data.test, data, 0).take([3, 1, 2])
    assert task().evaluate({"logits": np.array([[3.1], [1.0], [2.2]])}, texts, data.test, data)["spearman"] == pytest.approx(100)


def test_the_decoder_takes_the_options():
    made = decoder("text-regression")(task(pair_column="text_pair").options(scaled(ROWS, 1.0)), {})
    assert made.columns == ("text", "text_pair")
    assert task(pair_column="text_pair").example({"text": "a", "text_pair": "b", "value": 1.0}) == {"text": "a", "text_pair": "b"}


def test_stsb(real_data):
    data = task(pair_column="text_pair").read(real_data("glue/stsb"))
    assert [len(data.split(split)) for split in ("train", "validation", "test")] == [5749, 1500, 1379]
    assert (min(row["value"] for row in data.train), max(row["value"] for row in data.train)) == (0.0, 5.0)
