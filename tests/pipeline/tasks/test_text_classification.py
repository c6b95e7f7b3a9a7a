"""Data files: what they hold comes back, and every fault is named with file and line."""

from __future__ import annotations

import json

import pytest

from pipeline.tasks.text_classification import Row, hold_out, read_folder
from runtimes.errors import BadInput

GOOD = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
ONE_CLASS = [{"text": "x", "label": "a"}] * 3


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
        ({"test": None}, r"no test file"),
        ({"test": lines([*GOOD[:2], {"text": "x", "label": "new"}])}, r"test\.jsonl:3: label 'new' never occurs in train\.jsonl"),
        ({"train": lines(GOOD[:2]) + b'{"text": "caf\xe9", "label": "a"}\n'}, r"train\.jsonl:3: byte 0xe9 is not UTF-8"),
        ({"train": lines(ONE_CLASS), "validation": None, "test": lines(ONE_CLASS)}, "at least two classes"),
        ({"train": lines(GOOD) + b"{oops\n"}, r"train\.jsonl:21: not JSON"),
        ({"train": lines(GOOD) + b"[1]\n"}, r"train\.jsonl:21: an object with columns is needed"),
        ({"train": lines([{"text": "  ", "label": "a"}])}, r"train\.jsonl:1: text must be a text that is not empty"),
        ({"train": lines([{"text": "x", "label": None}])}, r"train\.jsonl:1: label must be a text"),
        ({"train": lines([{"text": "x", "label": "a\nb"}])}, r"train\.jsonl:1: label .* line break"),
    ],
)
def test_faults_are_named(tmp_path, files, message):
    with pytest.raises(BadInput, match=message):
        read_folder(folder(tmp_path, **files))


def test_missing_folder(tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        read_folder(tmp_path / "absent")


def test_the_three_formats_hold_the_same_rows(tmp_path):
    rows = [{"text": 'say "hi", please', "label": "a"}, {"text": "tab\tless", "label": "b"}] * 3
    made = {}
    for suffix, separator in (("jsonl", None), ("csv", ","), ("tsv", "\t")):
        place = tmp_path / suffix
        place.mkdir()
        for split in ("train", "validation", "test"):
            if separator is None:
                (place / f"{split}.jsonl").write_bytes(lines(rows))
            else:
                import csv

                with (place / f"{split}.{suffix}").open("w", newline="") as file:
                    writer = csv.DictWriter(file, ["text", "label"], delimiter=separator)
                    writer.writeheader()
                    writer.writerows(rows)
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
    assert {row.label for row in data.validation} == {"a", "b"}
    assert not {row.text for row in data.train} & {row.text for row in data.validation}
    assert "held out" in data.notes[0]
    assert hold_out(data.train) == hold_out(data.train)


def test_limit_per_label_keeps_the_first_rows_of_each_class(tmp_path):
    data = read_folder(folder(tmp_path), limit_per_label=3)
    assert data.train == [Row(f"text {i}", "ab"[i % 2]) for i in range(6)]


def test_fingerprint_follows_the_content(tmp_path):
    first = read_folder(folder(tmp_path)).fingerprint
    assert read_folder(folder(tmp_path)).fingerprint == first
    assert read_folder(folder(tmp_path, test=lines(GOOD[:3]))).fingerprint != first
