"""Data files: what they hold comes back, and every fault is named with file and line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.tasks.batches import from_id_lists
from pipeline.tasks.files import hold_out
from pipeline.tasks.text_classification import TextClassification, chosen_threshold
from runtimes.errors import BadInput

GOOD = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
ONE_CLASS = [{"text": "x", "label": "a"}] * 3


def read_folder(folder, **options):
    return TextClassification(data="unused", **options).read(folder)


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def folder(tmp_path, **files):
    contents = {"train": lines(GOOD), "validation": lines(GOOD[:4]), "test": lines(GOOD[:4])} | files
    for name, content in contents.items():
        if content is not None:
            (tmp_path / f"{name}.jsonl").write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train": lines([{"txt": "x", "label": "a"}])}, r"train\.jsonl:1: no column 'text'; the columns are txt, label"),
        ({"train": b""}, r"train\.jsonl: no rows"),
        ({"test": None, "validation": None}, r"no test file"),
        ({"test": lines([*GOOD[:2], {"text": "x", "label": "new"}])}, r"test\.jsonl:3: label 'new' never occurs in the training rows"),
        ({"train": lines(GOOD[:2]) + b'{"text": "caf\xe9", "label": "a"}\n'}, r"train\.jsonl:3: byte 0xe9 is not UTF-8"),
        ({"train": lines(ONE_CLASS), "validation": None, "test": lines(ONE_CLASS)}, "at least two classes"),
        ({"train": lines(GOOD) + b"{oops\n"}, r"train\.jsonl:21: not JSON"),
        ({"train": lines(GOOD) + b"[1]\n"}, r"train\.jsonl:21: an object with columns is needed"),
        ({"train": lines([{"text": "  ", "label": "a"}])}, r"train\.jsonl:1: text must be a text that is not empty"),
        ({"train": lines([{"text": "x", "label": None}])}, r"train\.jsonl:1: label must be a text"),
        ({"train": lines([{"text": "x", "label": "a\nb"}])}, r"train\.jsonl:1: label .* line break"),
        ({"train": lines([{"text": "x", "label": "a\n"}])}, r"train\.jsonl:1: label .* line break"),
        ({"train": b'{"text": "\\ud83d alone", "label": "a"}\n'}, r"train\.jsonl:1: half of a surrogate pair"),
        ({"train": lines(GOOD) + b"[" * 100_000}, r"train\.jsonl:21: not JSON"),
    ],
)
def test_faults_are_named(tmp_path, files, message):
    with pytest.raises(BadInput, match=message):
        read_folder(folder(tmp_path, **files))


def test_missing_folder(tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        read_folder(tmp_path / "absent")


def test_the_three_formats_hold_the_same_rows(tmp_path):
    rows = [{"text": 'say "hi", please', "label": "a"}, {"text": "it's, well, odd", "label": "b"}] * 3
    made = {}
    for suffix, separator in (("jsonl", None), ("csv", ","), ("tsv", "\t")):
        place = tmp_path / suffix
        place.mkdir()
        for split in ("train", "validation", "test"):
            if separator is None:
                (place / f"{split}.jsonl").write_bytes(lines(rows))
            else:
                quoted = (lambda text: '"' + text.replace('"', '""') + '"') if suffix == "csv" else str
                table = [["text", "label"], *([quoted(row["text"]), row["label"]] for row in rows)]
                (place / f"{split}.{suffix}").write_text("".join(separator.join(cells) + "\n" for cells in table))
        made[suffix] = read_folder(place)
    assert made["jsonl"].train == made["csv"].train == made["tsv"].train
    assert made["jsonl"].fingerprint == made["csv"].fingerprint


def test_a_csv_row_of_another_width_is_named(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nx,a\ny,b,c\n")
    (tmp_path / "test.csv").write_text("text,label\nx,a\n")
    with pytest.raises(BadInput, match=r"train\.csv:3: the row does not have the 2 columns"):
        read_folder(tmp_path)


def test_validation_is_held_out_of_training_when_there_is_none(tmp_path):
    data = read_folder(folder(tmp_path, validation=None))
    assert len(data.train) == 18
    assert {row["label"] for row in data.validation} == {"a", "b"}
    assert not {row["text"] for row in data.train} & {row["text"] for row in data.validation}
    assert "held out" in data.notes[0]
    assert hold_out(data.train) == hold_out(data.train)


def test_limit_per_label_keeps_the_first_rows_of_each_class(tmp_path):
    data = read_folder(folder(tmp_path), limit_per_label=3)
    assert data.train == [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]


def test_fingerprint_follows_the_content(tmp_path):
    first = read_folder(folder(tmp_path)).fingerprint
    assert read_folder(folder(tmp_path)).fingerprint == first
    assert read_folder(folder(tmp_path, test=lines(GOOD[:3]))).fingerprint != first


def test_the_test_rows_are_half_of_validation_when_there_are_none(tmp_path):
    data = read_folder(folder(tmp_path, test=None, validation=lines(GOOD)))
    assert (len(data.validation), len(data.test)) == (10, 10)
    assert not {row["text"] for row in data.validation} & {row["text"] for row in data.test}
    assert "no test file: 10 of the 20 validation rows, drawn by a fixed seed, are the test rows" in data.notes


def test_a_field_of_a_table_may_be_long(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text(f"text,label\n{'long ' * 40_000},a\nshort,b\n")
    assert len(read_folder(tmp_path).train[0]["text"]) == 200_000


def test_pairs_need_both_columns_in_every_split(tmp_path):
    pairs = [row | {"text_pair": "other"} for row in GOOD]
    with pytest.raises(BadInput, match=r"validation\.jsonl:1: no column 'text_pair'"):
        read_folder(folder(tmp_path, train=lines(pairs), test=lines(pairs)), pair_column="text_pair")


def test_rows_of_no_class_have_the_columns_of_the_others(tmp_path, tokenizer):
    pairs, strange = lines([row | {"text_pair": "other"} for row in GOOD]), [{"text": "q", "text_pair": "r"}] * 3
    task = TextClassification(data="unused", pair_column="text_pair", out_of_scope="oos")
    given = dict.fromkeys(("train", "validation", "test"), pairs) | dict.fromkeys(("oos_validation", "oos_test"), lines(strange))
    data = task.read(folder(tmp_path, **given))
    assert data.validation[-1] == strange[0] | {"label": None}
    assert len(task.encode(tokenizer, data.validation, data, 0)) == len(GOOD) + 3
    assert task.floor(data)["metrics"]["validation"]["accuracy"] >= 0
    with pytest.raises(BadInput, match=r"oos_test\.jsonl:2: no column 'text_pair'; the columns are text"):
        task.read(folder(tmp_path, **given | {"oos_test": lines([*strange[:1], {"text": "q"}])}))


def test_a_file_of_no_class_without_rows_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"oos_validation\.jsonl: no rows"):
        read_folder(folder(tmp_path, oos_validation=b"\n", oos_test=lines(GOOD)), out_of_scope="oos")


@pytest.mark.parametrize("label", [[], "", [""], 3, None, [True], [1.5]])
def test_a_row_of_several_labels_has_at_least_one(tmp_path, label):
    rows = [{"text": "x", "label": ["a", "b"]}, {"text": "y", "label": label}]
    with pytest.raises(BadInput, match=r"train\.jsonl:2: label must be a list of at least one label"):
        read_folder(folder(tmp_path, train=lines(rows)), multi_label=True)


def test_several_labels_come_as_lists_or_with_commas(tmp_path):
    rows = lines([{"text": "x", "label": ["b", "a"]}, {"text": "y", "label": "a, c"}])
    data = read_folder(folder(tmp_path, train=rows, validation=rows, test=rows), multi_label=True)
    assert [row["labels"] for row in data.train] == [["a", "b"], ["a", "c"]]
    targets = TextClassification(data="unused", multi_label=True).targets(data.train, data)
    assert targets.tolist() == [[1, 1, 0], [1, 0, 1]]


def test_whole_numbers_are_labels_also_in_a_list(tmp_path):
    rows = lines([{"text": "x", "label": [2, 1]}, {"text": "y", "label": "1, 3"}])
    data = read_folder(folder(tmp_path, train=rows, validation=rows, test=rows), multi_label=True)
    assert [row["labels"] for row in data.train] == [["1", "2"], ["1", "3"]]


def test_a_threshold_splits_what_belongs_from_what_does_not():
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.3, 0.2])
    right = np.array([True, True, True, False, False, False])
    in_scope = np.array([True, True, True, True, False, False])
    assert 0.3 < chosen_threshold(confidence, right, in_scope) <= 0.7
    assert chosen_threshold(confidence, right, np.ones(6, bool)) == pytest.approx(0.702, abs=0.01)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("positive", [None, "b"])
@pytest.mark.parametrize("metric", [metric.name for metric in TextClassification.metrics])
def test_a_metric_is_computed_or_refused(metric, positive, several):
    """What is refused only when it is looked up costs the whole training."""
    keys = {"data": "unused", "positive": positive, "multi_label": several}
    rows = [{"text": f"word {label}"} | ({"labels": [label]} if several else {"label": label}) for label in "aabb"]
    plain = TextClassification(**keys)
    data = plain.make(dict.fromkeys(("train", "validation", "test"), rows), "here")
    computed = plain.evaluate({"logits": np.eye(4, 2)}, from_id_lists([[1]] * 4, 0), rows, data)
    if metric in computed:
        assert TextClassification(**keys, metric=metric).primary.name == metric
        return
    with pytest.raises(ValidationError, match=rf"metric: {metric} is .*; this task has accuracy, ") as refused:
        TextClassification(**keys, metric=metric)
    listed = str(refused.value).split("this task has ")[1].split(" [")[0].split(", ")
    assert set(listed) - {"agreement", "divergence"} == {name for name in computed if " " not in name}


def test_metrics_of_a_known_table():
    task = TextClassification(data="unused", positive="b")
    rows = [{"text": "t", "label": label} for label in "aabbb"]
    data = task.make({"train": rows, "validation": rows, "test": rows}, "here")
    logits = np.array([[2.0, 0], [0, 2], [0, 2], [0, 2], [2, 0]])  # a b b b a: two wrong
    found = task.evaluate({"logits": logits}, from_id_lists([[1]] * 5, 0), rows, data)
    assert found["accuracy"] == pytest.approx(60)
    assert found["f1"] == pytest.approx(100 * 2 * 2 / (2 * 2 + 1 + 1))
    assert found["recall a"] == pytest.approx(50)
    assert found["matthews"] == pytest.approx(100 * (1 * 2 - 1 * 1) / np.sqrt(2 * 3 * 3 * 2))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert task.evaluate({"probabilities": probabilities}, from_id_lists([[1]] * 5, 0), rows, data) == pytest.approx(found)
