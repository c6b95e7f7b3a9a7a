"""The floor: a linear model that learns what words tell, judged by the task's own metrics."""

from __future__ import annotations

import pytest

from pipeline.tasks.intent_and_slots import IntentAndSlots
from pipeline.tasks.sentence_embedding import SentenceEmbedding
from pipeline.tasks.text_classification import TextClassification
from pipeline.tasks.text_regression import TextRegression

ACTIONS = {"on": "turn on", "off": "switch off", "music": "play some"}
TEXTS = [(label, f"{words} {thing}") for label, words in ACTIONS.items() for thing in "light lamp song kitchen bedroom".split()]


def test_classes(write_rows):
    rows = [{"text": text, "label": label} for label, text in TEXTS]
    task = TextClassification(data="")
    found = task.floor(task.read(write_rows(train=rows, validation=rows, test=rows)))
    assert found["metrics"]["test"]["accuracy"] == 100
    assert "log_loss" not in found["metrics"]["test"]


def test_two_classes_of_pairs(write_rows):
    rows = [{"text": text, "text_pair": other, "label": str(label == what)} for label, text in TEXTS for what, other in TEXTS[::5]]
    task = TextClassification(data="", pair_column="text_pair")
    assert task.floor(task.read(write_rows(train=rows, validation=rows, test=rows)))["metrics"]["validation"]["accuracy"] > 60


def test_several_labels(write_rows):
    rows = [{"text": text, "label": [label, "polite"][: 1 + number % 2]} for number, (label, text) in enumerate(TEXTS)]
    rows = [row | {"text": row["text"] + " please" * (len(row["label"]) - 1)} for row in rows]
    task = TextClassification(data="", multi_label=True)
    assert task.floor(task.read(write_rows(train=rows, validation=rows, test=rows)))["metrics"]["test"]["accuracy"] == 100


@pytest.mark.parametrize("sets", [(["all", "on"], ["all", "off"]), (["all", "on"], ["all"]), (["a", "b"], ["a", "b"]), (["on"], ["off"])])
def test_a_class_that_every_row_has_is_known(write_rows, sets):
    rows = [{"text": f"turn {way} the light {number}", "label": sets[way == "off"]} for number in range(5) for way in ("on", "off")]
    task = TextClassification(data="", multi_label=True, threshold=0.5)
    found = task.floor(task.read(write_rows(train=rows, validation=rows, test=rows)))["metrics"]["test"]
    assert found["accuracy"] == 100


def test_texts_without_a_word(write_rows):
    rows = [{"text": text, "label": label} for text, label in (("!!", "x"), ("??", "y"), ("\U0001f600", "x"), ("\U0001f62d", "y"))] * 5
    task = TextClassification(data="")
    assert task.floor(task.read(write_rows(train=rows, validation=rows, test=rows)))["metrics"]["test"]["accuracy"] == 100


def test_numbers(write_rows):
    rows = [{"text": text, "label": len(text)} for _, text in TEXTS]
    task = TextRegression(data="")
    assert task.floor(task.read(write_rows(train=rows, validation=rows, test=rows)))["metrics"]["test"]["spearman"] > 90


def test_likeness_needs_no_training(write_rows):
    text = "turn on the kitchen light"
    rows = [{"text": text, "text_pair": " ".join(text.split()[:count]), "label": count} for count in (1, 2, 3, 4, 5)]
    task = SentenceEmbedding(data="")
    alone = [{"text": row["text_pair"]} for row in rows]
    assert task.floor(task.read(write_rows(train=alone, validation=rows, test=rows)))["metrics"]["test"]["spearman"] == pytest.approx(100)


def test_the_intent_alone(write_rows):
    rows = [{"label": label, "tokens": text.split(), "tags": ["O"] * (len(text.split()) - 1) + ["B-X"]} for label, text in TEXTS]
    task = IntentAndSlots(data="")
    assert task.floor(task.read(write_rows(train=rows, validation=rows, test=rows)))["metrics"]["test"] == {"intent_accuracy": 100}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "metric", "least"),
    [
        ("clinc150", TextClassification(data=""), "accuracy", 91),
        ("glue/sst2", TextClassification(data=""), "accuracy", 79),
        ("glue/mrpc", TextClassification(data="", pair_column="text_pair", positive="equivalent"), "f1", 78),
        ("glue/stsb", TextRegression(data="", pair_column="text_pair"), "spearman", 50),
        ("glue/stsb", SentenceEmbedding(data=""), "spearman", 50),
        ("snips", IntentAndSlots(data=""), "intent_accuracy", 97),
    ],
)
def test_real_data(real_data, name, task, metric, least):
    assert task.floor(task.read(real_data(name)))["metrics"]["test"][metric] > least
