"""Tokens with tags: reading and repairing, targets on first pieces, the F1 of spans."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.tasks.base import Data
from pipeline.tasks.batches import IGNORED, make_batch
from pipeline.tasks.tagged import span_scores
from pipeline.tasks.token_classification import TokenClassification
from runtimes.decode import decoder
from runtimes.errors import BadInput

ROWS = [
    {"tokens": ["turn", "on", "kitchen", "light"], "tags": ["O", "O", "B-ROOM", "I-ROOM"]},
    {"tokens": ["play", "quux", "now"], "tags": ["O", "B-SONG", "O"]},
]


def task(**options) -> TokenClassification:
    return TokenClassification(data="", **options)


def tagged(*tags: str) -> dict:
    return {"tokens": [f"w{i}" for i in range(len(tags))], "tags": list(tags)}


def perfect(texts, names: list[str], rows) -> np.ndarray:
    """Logits [T, C] that are right on every token with a target, and wrong on all others."""
    wanted = np.where(texts.token_targets["tags"] == IGNORED, 1, texts.token_targets["tags"])
    return np.eye(len(names))[wanted]


@pytest.fixture
def data(write_rows) -> Data:
    return task().read(write_rows(train=ROWS, validation=ROWS, test=ROWS))


def test_tags_are_named_by_type_and_each_has_both_forms(data):
    assert data.labels == {"logits": ["O", "B-ROOM", "I-ROOM", "B-SONG", "I-SONG"]}
    assert data.train == ROWS
    assert data.notes == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (tagged("O", "O") | {"tags": ["O"]}, r"test\.jsonl:2: 2 tokens but 1 tags"),
        ({"tokens": ["a"]}, r"test\.jsonl:2: no column 'tags'; the columns are tokens"),
        ({"tokens": [], "tags": []}, r"test\.jsonl:2: tokens must be a list of texts"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, r"test\.jsonl:2: tokens must be a list of texts"),
        ({"tokens": ["New York"], "tags": ["O"]}, r"test\.jsonl:2: tokens: token 'New York' has a blank"),
        ({"tokens": ["a"], "tags": [1]}, r"test\.jsonl:2: tags must be a list of texts"),
        (tagged("S-ROOM"), r"test\.jsonl:2: tag 'S-ROOM' is neither O nor B-TYPE nor I-TYPE"),
        (tagged("B-"), r"test\.jsonl:2: tag 'B-' is neither"),
        (tagged("B-A\nB"), r"test\.jsonl:2: tags .* line break"),
        (tagged("B-A\n"), r"test\.jsonl:2: tags 'B-A\\n' has a line break"),
        (tagged("B-CITY"), r"test\.jsonl:2: type 'CITY' never occurs in the training rows"),
    ],
)
def test_faults_are_named(write_rows, row, message):
    with pytest.raises(BadInput, match=message):
        task().read(write_rows(train=ROWS, validation=ROWS, test=[ROWS[0], row]))


def test_training_rows_without_a_span_are_refused(write_rows):
    with pytest.raises(BadInput, match="no training row has a tag but O"):
        task().read(write_rows(train=[tagged("O")], validation=ROWS, test=ROWS))


def test_iob1_becomes_bio(write_rows):
    iob1 = [tagged("I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-PER")]
    data = task().read(write_rows(train=iob1, validation=iob1, test=iob1))
    assert data.train[0]["tags"] == ["B-PER", "I-PER", "B-PER", "O", "B-LOC", "B-PER"]
    assert data.notes == ("the tags are IOB1 and were made BIO",)


def test_an_inside_tag_without_its_beginning_is_repaired_and_said(write_rows):
    rows = [tagged("B-PER", "I-PER", "O", "B-LOC"), tagged("O", "I-PER", "I-PER", "O", "B-LOC", "I-PER")]
    data = task().read(write_rows(train=rows, validation=rows[:1], test=rows[:1]))
    assert data.train[1]["tags"] == ["O", "B-PER", "I-PER", "O", "B-LOC", "B-PER"]
    assert len(data.notes) == 1
    assert data.notes[0].startswith("2 spans begin with I- where B- is needed, the first in ")
    assert "train.jsonl:2" in data.notes[0]


def test_conll_files_and_json_lines_hold_the_same(tmp_path, write_rows):
    folder = tmp_path / "conll"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        sentences = ["".join(f"{a} X {b}\n" for a, b in zip(row["tokens"], row["tags"], strict=True)) for row in ROWS]
        (folder / f"{split}.conll").write_text("-DOCSTART- -X- O\n\n" + "\n".join(sentences))
    assert task().read(folder).fingerprint == task().read(write_rows(train=ROWS, validation=ROWS, test=ROWS)).fingerprint


def test_the_first_piece_of_a_word_has_its_tag(tokenizer, data):
    texts = task().encode(tokenizer, data.train, data, 0)
    second = slice(texts.offsets[1], texts.offsets[2])
    assert [tokenizer.id_to_token(i) for i in texts.ids[second]] == ["[CLS]", "play", "q", "##u", "##u", "##x", "now", "[SEP]"]
    assert texts.token_targets["tags"][second].tolist() == [IGNORED, 0, 3, IGNORED, IGNORED, IGNORED, 0, IGNORED]


def test_right_logits_score_100_whatever_other_tokens_say(tokenizer, data):
    texts = task().encode(tokenizer, data.test, data, 0)
    names = data.labels["logits"]
    assert task().evaluate({"logits": perfect(texts, names, data.test)}, texts, data.test, data) == {
        "f1": 100, "precision": 100, "recall": 100, "f1 ROOM": 100, "f1 SONG": 100,
    }  # fmt: skip
    one = texts.take([1])
    assert task().evaluate({"probabilities": perfect(one, names, data.test)}, one, data.test, data)["f1"] == 100


def test_words_that_are_cut_off_count_as_outside_and_are_said(tokenizer, data):
    short = task(max_length=5)  # [CLS] turn on kitchen [SEP]: the span is not whole
    texts = short.encode(tokenizer, data.test[:1], data, 0)
    found = short.evaluate({"logits": perfect(texts, data.labels["logits"], data.test)}, texts, data.test[:1], data)
    assert found["f1"] == 0
    assert found["unseen_words"] == 25


def test_span_scores_by_hand():
    wanted = [["B-A", "I-A", "O", "B-B"], ["B-A", "O", "O", "O"]]
    given = [["B-A", "I-A", "O", "B-A"], ["O", "O", "O", "I-B"]]
    # One of three wanted spans is found, one of three given ones is right.
    assert span_scores(wanted, given) == pytest.approx({"f1": 100 / 3, "precision": 100 / 3, "recall": 100 / 3, "f1 A": 50, "f1 B": 0})


def test_no_span_found_is_no_warning():
    assert span_scores([["B-A"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0, "f1 A": 0}
    assert span_scores([["O"]], [["B-A"]]) == {"f1": 0, "precision": 0, "recall": 0}
    assert span_scores([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0}


def test_losses(tokenizer, data):
    texts = task().encode(tokenizer, data.train, data, 0)
    batch = make_batch(texts, np.arange(2))
    even = {"logits": torch.zeros(len(texts.ids), 5)}
    assert task().loss(even, batch).item() == pytest.approx(math.log(5))
    right = {"logits": 50 * torch.from_numpy(perfect(texts, data.labels["logits"], data.train)).float()}
    assert task().loss(right, batch).item() == pytest.approx(0, abs=1e-5)
    assert task().soft_loss(right, right, batch, 2.0).item() == pytest.approx(0, abs=1e-5)
    assert task().soft_loss(even, right, batch, 2.0).item() > 1
    assert task().loss(even, make_batch(texts.with_ids(texts.ids), np.arange(2))).item() == 0


def test_texts_without_tags_can_be_encoded(tokenizer, data):
    texts = task().encode(tokenizer, [task().unlabeled_row("play (quux) now")], data, 0)
    assert (texts.token_targets["tags"] == IGNORED).all()


def test_the_decoder_finds_the_spans_of_an_example(tokenizer, data):
    made = decoder("token-classification")(task().options(data), data.labels)
    row = data.test[0]
    texts = task().encode(tokenizer, [row], data, 0)
    answer = made.answer(task().example(row), [texts.encoding(0)], [{"logits": 50 * perfect(texts, data.labels["logits"], [row])}])
    assert [(span["type"], span["text"], span["start"], span["end"]) for span in answer["spans"]] == [("ROOM", "kitchen light", 8, 21)]


@pytest.mark.parametrize(("name", "rows", "types"), [("conll2003", [14041, 3250, 3453], 4), ("wnut17", [3394, 1009, 1287], 6)])
def test_real_data(real_data, tokenizer, name, rows, types):
    data = task(max_length=256).read(real_data(name))
    assert [len(data.split(split)) for split in ("train", "validation", "test")] == rows
    assert len(data.labels["logits"]) == 1 + 2 * types
    assert data.notes == ()
    some = data.validation[:200]
    texts = task(max_length=256).encode(tokenizer, some, data, 0)
    scores = task().evaluate({"logits": perfect(texts, data.labels["logits"], some)}, texts, some, data)
    assert scores["f1"] == 100 or "unseen_words" in scores
