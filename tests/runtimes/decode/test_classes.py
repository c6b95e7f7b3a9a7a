"""Classes, numbers and vectors: answers, decisions, and margins within which decisions cannot change."""

from __future__ import annotations

import json

import numpy as np
import pytest

from runtimes.decode.classes import lead, log_odds, sigmoid, softmax
from runtimes.decode.sentence_embedding import SentenceEmbedding
from runtimes.decode.text_classification import TextClassification
from runtimes.decode.text_regression import TextRegression
from runtimes.errors import IntegrityError
from runtimes.text import TextEncoder

LABELS = {"logits": ["a", "b", "c", "d", "e", "f"]}
RAW = np.array([0.5, 3.0, -1.0, 2.0, 0.0, 1.0], np.float32)


def options(kind: str, **changes) -> dict:
    return {"kind": kind, "columns": ["text"], "segments": 1, "decode": "softmax"} | changes


def classifier(**changes) -> TextClassification:
    return TextClassification(options("text-classification", **changes), LABELS)


def answer(decoder, **outputs) -> dict:
    found = decoder.answer({"text": "x"}, [], [outputs])
    assert json.loads(json.dumps(found)) == found, "an answer is plain JSON"
    return found


def test_the_best_class_and_the_five_best():
    found = answer(classifier(), logits=RAW)
    probabilities = np.exp(RAW) / np.exp(RAW).sum()
    assert found["label"] == "b" and found["probability"] == pytest.approx(probabilities[1])
    assert [one["label"] for one in found["labels"]] == ["b", "d", "f", "a", "e"]
    assert [one["probability"] for one in found["labels"]] == pytest.approx(sorted(probabilities)[:0:-1])
    assert classifier().line(found) == f"b\t{probabilities[1]:.4f}"


def test_a_file_that_gives_probabilities_is_not_scaled_again():
    given = softmax(RAW)
    found = answer(classifier(decode="none"), probabilities=given)
    named = TextClassification(options("text-classification", decode="none"), {"probabilities": LABELS["logits"]})
    assert found == answer(named, probabilities=given)
    assert found["probability"] == pytest.approx(given[1])


def test_below_the_threshold_it_is_none_of_them():
    best = float(softmax(RAW.astype(np.float64))[1])
    unsure, sure = classifier(threshold=best + 1e-6), classifier(threshold=best - 1e-6)
    found = answer(unsure, logits=RAW)
    assert found["label"] is None and found["probability"] == pytest.approx(best) and found["labels"][0]["label"] == "b"
    assert unsure.line(found) == f"(none)\t{best:.4f}"
    assert answer(sure, logits=RAW)["label"] == "b"
    assert (unsure.decisions({"logits": RAW}).tolist(), sure.decisions({"logits": RAW}).tolist()) == ([-1], [1])


@pytest.mark.parametrize("threshold", [None, 0.7])
def test_several_labels_are_all_that_reach_the_threshold(threshold):
    decoder = classifier(decode="sigmoid", multi_label=True, threshold=threshold)
    probabilities = 1 / (1 + np.exp(-RAW))
    wanted = [(LABELS["logits"][i], probabilities[i]) for i in np.argsort(-RAW) if probabilities[i] >= (threshold or 0.5)]
    found = answer(decoder, logits=RAW)
    assert [one["label"] for one in found["labels"]] == [label for label, _ in wanted]
    assert [one["probability"] for one in found["labels"]] == pytest.approx([p for _, p in wanted])
    assert set(found) == {"labels"}
    assert decoder.line(found).split("\t")[::2] == [label for label, _ in wanted]
    assert decoder.decisions({"logits": RAW}).tolist() == [int(p >= (threshold or 0.5)) for p in probabilities]
    nothing = answer(decoder, logits=np.full(6, -9.0, np.float32))
    assert nothing == {"labels": []} and decoder.line(nothing) == "(none)"


@pytest.mark.parametrize(
    "decoder",
    [
        classifier(), classifier(threshold=0.4), classifier(threshold=0.0), classifier(threshold=1.0),
        classifier(decode="sigmoid", threshold=0.6), classifier(decode="sigmoid", multi_label=True), classifier(decode="none"),
        classifier(decode="none", threshold=0.3), classifier(decode="none", multi_label=True, threshold=0.2),
    ],
)  # fmt: skip
def test_no_decision_changes_while_outputs_move_by_less_than_half_its_margin(decoder):
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        raw = random.normal(size=6) * 2
        raw = softmax(raw) if decoder.decode == "none" else raw
        decisions, margins = decoder.decisions({"logits": raw}), decoder.margins({"logits": raw})
        assert decisions.dtype.kind == "i" and decisions.shape == margins.shape and (margins >= 0).all()
        for _ in range(20):
            shift = float(random.choice(np.append(margins, 1.0)))
            shift = min(shift, 5.0) * 0.499
            moved = raw + random.choice([-shift, shift], size=6)
            firm = margins > 2 * shift
            held += firm.sum()
            assert (decoder.decisions({"logits": moved})[firm] == decisions[firm]).all()
    assert held > 100


def test_margins_are_tight_where_two_classes_compete():
    raw = np.array([0.0, 1.0, 0.25, -1, -1, -1])
    assert classifier().margins({"logits": raw}).tolist() == [0.75]
    over, under = raw + np.array([0, -0.376, 0.376, 0, 0, 0]), raw + np.array([0, -0.374, 0.374, 0, 0, 0])
    assert (classifier().decisions({"logits": over}).tolist(), classifier().decisions({"logits": under}).tolist()) == ([2], [1])


def test_scales():
    assert sigmoid(np.array([-800.0, 0.0, 800.0])).tolist() == [0.0, 0.5, 1.0]
    assert softmax(np.array([[1000.0, 1000.0], [-1000.0, 0.0]])).tolist() == [[0.5, 0.5], [0.0, 1.0]]
    assert log_odds(sigmoid(np.array([-2.0, 0.5]))) == pytest.approx([-2.0, 0.5])
    assert lead(np.array([[1.0, 5.0, 3.0], [2.0, 2.0, 0.0]])).tolist() == [2.0, 0.0]
    assert lead(np.array([1.0])) == np.inf


def test_a_single_class_is_always_the_answer():
    decoder = TextClassification(options("text-classification", threshold=0.5), {"logits": ["only"]})
    assert answer(decoder, logits=np.array([-3.0]))["label"] == "only"
    assert decoder.margins({"logits": np.array([-3.0])}).tolist() == [np.inf]


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ({"logits": np.zeros(5)}, "the file gives 5 classes, the bundle names 6"),
        ({"logits": np.zeros((3, 6))}, r"the file gives \[3, 6\]; this task reads \[C\]"),
        ({"slot_logits": np.zeros(6)}, "no output logits or probabilities; the file gives slot_logits"),
    ],
)
def test_outputs_of_another_task_are_refused(outputs, says):
    for read in (lambda: classifier().answer({}, [], [outputs]), lambda: classifier().decisions(outputs), lambda: classifier().margins(outputs)):
        with pytest.raises(IntegrityError, match=says):
            read()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"columns": "text"}, r"task: columns: 'text' is not a list of texts"),
        ({"columns": []}, r"task: columns: \[\]; text-classification reads 1 to 2 columns"),
        ({"columns": ["a", "a"]}, "columns of different names"),
        ({"columns": ["a", "b", "c"]}, "reads 1 to 2 columns"),
        ({"segments": 0}, "task: segments: 0 is not a whole number of 1 or more"),
        ({"decode": "argmax"}, "task: decode: 'argmax' is not one of softmax, sigmoid, none"),
        ({"decode": ["softmax"]}, "task: decode: "),
        ({"multi_label": 1}, "task: multi_label: 1 is not true or false"),
        ({"multi_label": True}, "task: decode: softmax makes the classes share"),
        ({"threshold": "0.5"}, "task: threshold: '0.5' is not a finite number"),
        ({"threshold": float("nan")}, "task: threshold: nan is not a finite number"),
        ({"threshold": 2}, r"task: threshold: 2\.0 is not a probability"),
        ({"threshold": True}, "task: threshold: True is not"),
    ],
)
def test_options_that_are_nonsense_are_named(changes, says):
    with pytest.raises(IntegrityError, match=says):
        classifier(**changes)


@pytest.mark.parametrize("key", ["columns", "segments", "decode"])
def test_missing_options_are_named(key):
    kept = {name: value for name, value in options("text-classification").items() if name != key}
    with pytest.raises(IntegrityError, match=f"task: {key} is missing"):
        TextClassification(kept, LABELS)


def test_classes_without_names_are_refused():
    with pytest.raises(IntegrityError, match="no names for the classes of logits; there are names for slot_logits"):
        TextClassification(options("text-classification"), {"slot_logits": ["a"]})


def test_a_number():
    decoder = TextRegression(options("text-regression", decode="none"), {})
    found = answer(decoder, logits=np.array([3.25], np.float32))
    assert found == {"value": 3.25} and decoder.line(found) == "3.25"
    assert len(decoder.decisions({"logits": np.array([3.25])})) == len(decoder.margins({"logits": np.array([3.25])})) == 0
    for wrong in (np.zeros(2), np.zeros(()), np.zeros((1, 1))):
        with pytest.raises(IntegrityError, match="text-regression reads one"):
            decoder.answer({}, [], [{"logits": wrong}])


@pytest.mark.parametrize("columns", [["text"], ["text", "text_pair"]])
def test_a_vector_and_the_likeness_of_two(tokenizer_file, columns):
    decoder = SentenceEmbedding(options("sentence-embedding", decode="none", columns=columns), {})
    encoder = TextEncoder(tokenizer_file, 16)
    assert decoder.columns == ("text", "text_pair")
    one, two = decoder.example("anna"), decoder.example(("anna", "berlin"))
    assert (one, two) == ({"text": "anna"}, {"text": "anna", "text_pair": "berlin"})
    assert [e.ids for e in decoder.encode(encoder, two)] == [encoder.encode("anna").ids, encoder.encode("berlin").ids], "encoded apart"
    vectors = [{"sentence_embedding": np.array([0.6, 0.8], np.float32)}, {"sentence_embedding": np.array([2.0, 0.0], np.float32)}]
    found = decoder.answer(one, decoder.encode(encoder, one), vectors[:1])
    assert found["embedding"] == pytest.approx([0.6, 0.8]) and decoder.line(found) == "0.6\t0.8"
    found = decoder.answer(two, decoder.encode(encoder, two), vectors)
    assert found == {"similarity": pytest.approx(0.6)} and decoder.line(found) == "0.6000"
    nothing = decoder.answer(two, [], [{"sentence_embedding": np.zeros(2)}, vectors[0]])
    assert nothing == {"similarity": 0.0}
    assert len(decoder.decisions(vectors[0])) == len(decoder.margins(vectors[0])) == 0
