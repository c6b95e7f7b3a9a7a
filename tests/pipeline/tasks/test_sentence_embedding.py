"""Vectors of sentences: pairs stay together, cosines follow scores, texts alone are for students."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.tasks.base import Data
from pipeline.tasks.batches import make_batch, shuffled_rows
from pipeline.tasks.sentence_embedding import SentenceEmbedding
from runtimes.decode import decoder
from runtimes.errors import BadInput

ROWS = [{"text": f"turn on {word}", "text_pair": f"play {word}", "label": number} for number, word in enumerate("light song music now my".split())]
ALONE = [{"text": row["text"]} for row in ROWS]


def task(**options) -> SentenceEmbedding:
    return SentenceEmbedding(data="", **options)


def vectors(cosines) -> np.ndarray:
    """Unit vectors [2N, 2] of pairs with these cosines."""
    angles = np.arccos(cosines)
    return np.stack([np.stack([np.ones_like(angles), np.zeros_like(angles)], -1), np.stack([np.cos(angles), np.sin(angles)], -1)], 1).reshape(-1, 2)


@pytest.fixture
def data(write_rows) -> Data:
    return task().read(write_rows(train=ROWS, validation=ROWS, test=ROWS))


def test_pairs_are_two_inputs_that_stay_together(tokenizer, data):
    texts = task().encode(tokenizer, data.train, data, 0)
    assert len(texts) == 10
    assert texts.types is None
    assert texts.rows.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for rows in shuffled_rows(texts, 4, 0, 0):
        assert (rows[::2] + 1 == rows[1::2]).all()


def test_training_rows_may_be_texts_alone(tokenizer, write_rows):
    data = task().read(write_rows(train=ALONE, validation=ROWS, test=ROWS))
    texts = task().encode(tokenizer, data.train, data, 0)
    assert (len(texts), texts.group) == (5, 1)
    with pytest.raises(BadInput, match="texts alone"):
        task().loss({"sentence_embedding": torch.zeros(5, 2)}, make_batch(texts, np.arange(5)))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"validation": [*ROWS, ALONE[0]]}, r"validation\.jsonl:6: no column 'text_pair'; validation rows are pairs"),
        ({"test": ALONE}, r"test\.jsonl:1: no column 'text_pair'; test rows are pairs"),
        ({"train": [*ROWS, ALONE[0]]}, r"train\.jsonl:6: is a text alone; 5 of 6 training rows are pairs, and all of them must be, or none"),
        ({"train": [*ALONE, *ALONE, ROWS[0]]}, r"train\.jsonl:\d+: is a pair; 1 of \d+ training rows are pairs"),
        ({"train": [ROWS[0] | {"label": float("nan")}]}, r"train\.jsonl:1: label must be a finite number"),
        ({"train": [{"text": "a", "text_pair": "b"}]}, r"train\.jsonl:1: no column 'label'"),
    ],
)
def test_faults_are_named(write_rows, splits, message):
    with pytest.raises(BadInput, match=message):
        task().read(write_rows(**{"train": ROWS, "validation": ROWS, "test": ROWS} | splits))


def test_scores_that_are_all_equal_teach_nothing(tokenizer, write_rows):
    equal = [row | {"label": 1} for row in ROWS]
    data = task().read(write_rows(train=equal, validation=ROWS, test=ROWS))
    with pytest.raises(BadInput, match="every pair has the score 1"):
        task().encode(tokenizer, data.train, data, 0)
    assert len(task(score_range=(0, 5)).encode(tokenizer, data.train, data, 0)) == 10
    with pytest.raises(ValueError, match="must rise"):
        task(score_range=(5, 0))


def test_losses(tokenizer, data):
    texts = task().encode(tokenizer, data.train, data, 0)
    batch = make_batch(texts, np.arange(10))
    right = torch.from_numpy(vectors(np.arange(5) / 4)).float()
    assert task().loss({"sentence_embedding": right}, batch).item() == pytest.approx(0, abs=1e-6)
    wrong = torch.from_numpy(vectors(np.zeros(5))).float()
    assert task().loss({"sentence_embedding": wrong}, batch).item() == pytest.approx(np.mean((np.arange(5) / 4) ** 2), rel=1e-5)
    assert task().soft_loss({"sentence_embedding": right}, {"sentence_embedding": right}, batch, 2.0).item() == pytest.approx(0, abs=1e-6)
    assert task().soft_loss({"sentence_embedding": -right}, {"sentence_embedding": right}, batch, 2.0).item() == pytest.approx(2, rel=1e-5)


def test_the_metric_is_the_rank_of_the_cosines(tokenizer, data):
    texts = task().encode(tokenizer, data.test, data, 0)
    given = {"sentence_embedding": vectors((np.arange(5) / 5) ** 3)}
    assert task().evaluate(given, texts, data.test, data)["spearman"] == pytest.approx(100)
    assert task().evaluate({"sentence_embedding": vectors(np.ones(5))}, texts, data.test, data)["spearman"] == 0


def test_heads(data):
    assert task().heads(data)[0] | {"tokens": "mean", "size": None, "normalized": True} == task().heads(data)[0]
    assert task(pooling="first", size=8).heads(data)[0]["size"] == 8


def test_the_decoder_compares_two_texts_and_knows_one(data):
    made = decoder("sentence-embedding")(task().options(data), {})
    first, second = ({"sentence_embedding": vector} for vector in vectors(np.array([0.5])))
    assert made.answer(task().example(data.test[0]), [], [first, second])["similarity"] == pytest.approx(0.5)
    assert task().example({"text": "alone"}) == {"text": "alone"}


def test_stsb(real_data):
    data = task().read(real_data("glue/stsb"))
    assert [len(data.split(split)) for split in ("train", "validation", "test")] == [5749, 1500, 1379]
