"""Files of rows: each form gives the same rows, splits are made where they are missing, and faults name file and line."""

from __future__ import annotations

import csv
import json
import math

import pytest

from pipeline.tasks import TASKS
from pipeline.tasks.base import Data
from pipeline.tasks.files import (
    add_unlabeled,
    draw_groups,
    fill_missing,
    fingerprint,
    hold_out,
    number_of,
    read_records,
    read_splits,
    split_files,
    text_of,
)
from pipeline.tasks.text_regression import TextRegression
from runtimes.errors import BadInput


def records(path, content: str | bytes) -> list:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_records(path))


def test_json_lines(tmp_path):
    rows = records(tmp_path / "a.jsonl", '\ufeff{"text": "a\\nb"}\r\n\r\n{"text": "\u2028\\ud83d\\ude00"}\n')
    assert rows == [(1, {"text": "a\nb"}), (3, {"text": "\u2028😀"})]


def test_csv_is_quoted_and_rows_have_the_number_of_their_first_line(tmp_path):
    rows = records(tmp_path / "a.csv", 'text,label\n"two\nlines, ""said""",a\n\nx,b\n')
    assert rows == [(2, {"text": 'two\nlines, "said"', "label": "a"}), (5, {"text": "x", "label": "b"})]


def test_tsv_is_not_quoted(tmp_path):
    rows = records(tmp_path / "a.tsv", 'text\tlabel\n"an open quote\ta\r\n\'\t"b"\n')
    assert rows == [(2, {"text": '"an open quote', "label": "a"}), (3, {"text": "'", "label": '"b"'})]


def test_a_long_csv_field_is_read_and_the_limit_of_the_process_stays(tmp_path):
    before = csv.field_size_limit()
    (_, row), = records(tmp_path / "a.csv", f"text,label\n{'x' * 200_000},a\n")  # fmt: skip
    assert len(row["text"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", ["conll", "txt"])
def test_conll(tmp_path, suffix):
    content = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n\nPeter\tB-PER\nsaid so\tO\n"
    assert records(tmp_path / f"a.{suffix}", content) == [
        (3, {"tokens": ["EU", "rejects"], "tags": ["I-ORG", "O"]}),
        (7, {"tokens": ["Peter", "said so"], "tags": ["B-PER", "O"]}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: byte 0xff is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n{"a": ["\\udc00"]}\n', r"a\.jsonl:2: half of a surrogate pair"),
        ("a.jsonl", '{"a": 1}\n\n{"a"', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", '{"a": 1}\n"a"\n', r"a\.jsonl:2: an object with columns is needed, got str"),
        ("a.csv", "a,b\n1,2\n1\n", r"a\.csv:3: the row does not have the 2 columns of the header, but 1"),
        ("a.csv", 'a,b\n1,2\n"1,2\n3,4\n', r"a\.csv:3: not CSV"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: the header names a column twice"),
        ("a.tsv", "a\tb\n1\t2\t3\n", r"a\.tsv:2: the row does not have the 2 columns of the header, but 3"),
        ("a.conll", "a O\n\nalone\n", r"a\.conll:3: a token, then its tag"),
        ("a.conll", "a O\n\tO\n", r"a\.conll:2: a token, then its tag"),
    ],
)
def test_faults_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(BadInput, match=message):
        records(tmp_path / name, content)


@pytest.mark.parametrize("value", ["x", "", None, True, [1], math.nan, "nan", math.inf, "-inf", 10**400])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(BadInput, match=r"train\.jsonl:7: score must be a finite number"):
        number_of({"score": value}, "score", "train.jsonl:7")


def test_numbers_and_texts():
    assert [number_of({"x": value}, "x", "") for value in (1, -2.5, "3e2", " 4 ")] == [1.0, -2.5, 300.0, 4.0]
    assert text_of({"x": 3}, "x", "", numbers=True) == "3"
    with pytest.raises(BadInput, match="x must be a text"):
        text_of({"x": 3}, "x", "a:1")
    with pytest.raises(BadInput, match="a:1: no column 'y'; the columns are x"):
        text_of({"x": 3}, "y", "a:1")


# --- splits -------------------------------------------------------------------------------------------------------------

ROWS = [{"text": f"text {i}", "kind": "ab"[i % 2], "article": i // 4} for i in range(40)]


def test_a_folder_needs_train_and_one_more(tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        split_files(tmp_path / "none")
    with pytest.raises(BadInput, match="no train file"):
        split_files(tmp_path)
    (tmp_path / "train.csv").write_text("text\nx\n")
    with pytest.raises(BadInput, match="no test file"):
        split_files(tmp_path)
    (tmp_path / "validation.tsv").write_text("text\nx\n")
    assert {split: path.name for split, path in split_files(tmp_path).items()} == {"train": "train.csv", "validation": "validation.tsv"}


def test_an_empty_file_is_refused(write_rows):
    folder = write_rows(train=ROWS, test=[])
    with pytest.raises(BadInput, match=r"test\.jsonl: no rows"):
        read_splits(folder, lambda record, place: record)


def test_missing_validation_rows_are_held_out_of_every_kind(write_rows):
    rows, notes = read_splits(write_rows(train=ROWS, test=ROWS[:3]), lambda record, place: record, by=lambda row: row["kind"])
    assert len(rows["train"]) == 36
    assert sorted(row["kind"] for row in rows["validation"]) == ["a", "a", "b", "b"]
    assert notes == ("no validation file: 4 of the training rows are held out",)
    assert (rows["train"], rows["validation"]) == hold_out(ROWS, by=lambda row: row["kind"])


def test_missing_test_rows_are_half_of_the_validation_rows(write_rows):
    rows, notes = read_splits(write_rows(train=ROWS, validation=ROWS[:10]), lambda record, place: record)
    assert len(rows["validation"]) == len(rows["test"]) == 5
    assert sorted(row["text"] for row in rows["validation"] + rows["test"]) == sorted(row["text"] for row in ROWS[:10])
    assert notes == ("no test file: 5 of the 10 validation rows, drawn by a fixed seed, are the test rows",)


def test_groups_are_not_torn_apart(tmp_path):
    rows, _ = fill_missing({"train": ROWS, "validation": ROWS}, tmp_path, group=lambda row: row["article"])
    assert not {row["article"] for row in rows["validation"]} & {row["article"] for row in rows["test"]}
    assert len(rows["test"]) == 20
    assert draw_groups(ROWS, 0.5) == draw_groups(ROWS, 0.5)


def test_too_few_rows_to_take_some(tmp_path):
    with pytest.raises(BadInput, match="add a validation file"):
        fill_missing({"train": ROWS[:1], "test": ROWS}, tmp_path)
    with pytest.raises(BadInput, match="add a test file"):
        fill_missing({"train": ROWS, "validation": ROWS[:1]}, tmp_path)


# --- texts without labels -------------------------------------------------------------------------------------------------


def numbers(count: int) -> Data:
    rows = [{"text": f"text {i}", "value": float(i)} for i in range(count)]
    return Data(rows, rows[:2], rows[2:4], {}, fingerprint([rows]))


def test_unlabeled_texts_count_in_the_fingerprint_and_leave_out_what_is_judged(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("text 9\n\ntext 1\r\na new text\n")
    data = numbers(10)
    more = add_unlabeled(TextRegression(data=""), data, path)
    assert [row["text"] for row in more.unlabeled] == ["text 9", "a new text"]
    assert more.fingerprint != data.fingerprint
    assert more.notes == ("2 texts without labels from texts.txt; 1 are texts of validation or test and are left out",)


@pytest.mark.parametrize(
    ("kind", "judged", "held", "free"),
    [
        ("text-classification", {"text": "on now", "label": "x"}, "on  now", "on"),
        ("text-regression of pairs", {"text": "one", "text_pair": "other", "value": 1.0}, "one\tother", "other\tone"),
        ("token-classification", {"tokens": ["on", "now"], "tags": ["O", "O"]}, "on now", "now"),
        ("intent-and-slots", {"label": "x", "tokens": ["on", "now"], "tags": ["O", "O"]}, "on now", "now"),
        ("question-answering", {"id": "7", "title": "t", "question": "who", "context": "me"}, "who\tme", "who\tyou"),
        ("sentence-embedding", {"text": "one", "text_pair": "other", "score": 1.0}, "other", "one other"),
    ],
)
def test_what_is_judged_teaches_nothing_in_any_task(tmp_path, kind, judged, held, free):
    keys = {"pair_column": "text_pair"} if kind.endswith("pairs") else {}
    path = tmp_path / "texts.txt"
    path.write_text(f"{held}\n{free}\n")
    task = TASKS[kind.split()[0]](data="", **keys)
    for splits in (([judged], []), ([], [judged])):
        more = add_unlabeled(task, Data([], *splits, {}, ""), path)
        assert more.unlabeled == [task.unlabeled_row(free)]
        assert "1 are texts of validation or test and are left out" in more.notes[0]


def test_unlabeled_faults_name_the_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a\tb\nc\n")
    with pytest.raises(BadInput, match=r"texts\.txt:2: .* both texts with a tab"):
        add_unlabeled(TextRegression(data="", pair_column="text_pair"), Data([], [], [], {}, ""), path)
    path.write_text("\n \n")
    with pytest.raises(BadInput, match="no lines of text"):
        add_unlabeled(TextRegression(data=""), numbers(10), path)


def test_real_files_are_read_whole(real_data):
    folder = real_data("glue/mrpc")
    rows, notes = read_splits(folder, lambda record, place: record)
    assert {split: len(found) for split, found in rows.items()} == {"train": 3668, "validation": 408, "test": 1725}
    assert notes == ()
    lines = (folder / "test.jsonl").read_text().splitlines()
    assert rows["test"] == [json.loads(line) for line in lines]
