"""A class and tags from one model: a frame counts when both are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.tasks.base import Data
from pipeline.tasks.batches import IGNORED, make_batch
from pipeline.tasks.intent_and_slots import IntentAndSlots
from runtimes.decode import decoder
from runtimes.errors import BadInput

ROWS = [
    {"text": "turn on light", "label": "on", "tokens": ["turn", "on", "light"], "tags": ["O", "O", "B-DEVICE"]},
    {"text": "lamp off", "label": "off", "tokens": ["lamp", "off"], "tags": ["B-DEVICE", "O"]},
    {"text": "lights off now", "label": "off", "tokens": ["lights", "off", "now"], "tags": ["B-DEVICE", "O", "O"]},
]
TASK = IntentAndSlots(data="", max_length=64)


@pytest.fixture
def data(write_rows) -> Data:
    return TASK.read(write_rows(train=ROWS, validation=ROWS, test=ROWS))


def outputs(texts, intents: list[int]) -> dict[str, np.ndarray]:
    """Right tags everywhere, and these classes."""
    tags = np.where(texts.token_targets["tags"] == IGNORED, 0, texts.token_targets["tags"])
    return {"logits": 50 * np.eye(2)[intents], "slot_logits": 50 * np.eye(3)[tags]}


def test_both_have_names(data):
    assert data.labels == {"logits": ["off", "on"], "slot_logits": ["O", "B-DEVICE", "I-DEVICE"]}
    assert [head["outputs"] for head in TASK.heads(data)] == [["logits"], ["slot_logits"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROWS[0] | {"tags": ["O"]}, r"test\.jsonl:2: 3 tokens but 1 tags"),
        (ROWS[0] | {"label": "on\n"}, r"test\.jsonl:2: label 'on\\n' has a line break"),
        (ROWS[0] | {"label": None}, r"test\.jsonl:2: label must be a text"),
        (ROWS[0] | {"label": "dim"}, r"test\.jsonl:2: label 'dim' never occurs"),
        (ROWS[0] | {"tags": ["O", "O", "B-X"]}, r"test\.jsonl:2: type 'X' never occurs"),
    ],
)
def test_faults_are_named(write_rows, row, message):
    with pytest.raises(BadInput, match=message):
        TASK.read(write_rows(train=ROWS, validation=ROWS, test=[ROWS[0], row]))


def test_one_class_is_refused(write_rows):
    with pytest.raises(BadInput, match="use token-classification"):
        TASK.read(write_rows(train=ROWS[1:], validation=ROWS[1:], test=ROWS[1:]))


def test_a_frame_is_right_when_both_are(tokenizer, data):
    texts = TASK.encode(tokenizer, data.test, data, 0)
    given = outputs(texts, [1, 0, 1])
    given["slot_logits"][texts.offsets[1] + 1] = [50, 0, 0]  # the lamp is missed
    found = TASK.evaluate(given, texts, data.test, data)
    assert found["frame_accuracy"] == pytest.approx(100 / 3)
    assert found["intent_accuracy"] == pytest.approx(200 / 3)
    assert found["slot_f1"] == pytest.approx(80)


def test_the_losses_are_added(tokenizer, data):
    texts = TASK.encode(tokenizer, data.train, data, 0)
    batch = make_batch(texts, np.arange(3))
    even = {"logits": torch.zeros(3, 2), "slot_logits": torch.zeros(len(texts.ids), 3)}
    assert TASK.loss(even, batch).item() == pytest.approx(math.log(2) + math.log(3))
    right = {name: torch.from_numpy(values).float() for name, values in outputs(texts, [1, 0, 0]).items()}
    assert TASK.loss(right, batch).item() == pytest.approx(0, abs=1e-5)
    assert TASK.soft_loss(right, right, batch, 2.0).item() == pytest.approx(0, abs=1e-5)
    assert TASK.soft_loss(even, right, batch, 2.0).item() > 1


def test_the_decoder_gives_both(tokenizer, data):
    made = decoder("intent-and-slots")(TASK.options(data), data.labels)
    texts = TASK.encode(tokenizer, data.test[:1], data, 0)
    given = outputs(texts, [1])
    answer = made.answer(TASK.example(data.test[0]), [texts.encoding(0)], [{"logits": given["logits"][0], "slot_logits": given["slot_logits"]}])
    assert answer["label"] == "on"
    assert [(span["type"], span["text"]) for span in answer["spans"]] == [("DEVICE", "light")]


def test_snips(real_data):
    data = TASK.read(real_data("snips"))
    assert [len(data.split(split)) for split in ("train", "validation", "test")] == [13084, 700, 700]
    assert len(data.labels["logits"]) == 7
    assert len(data.labels["slot_logits"]) == 1 + 2 * 39
    assert data.notes == ()
