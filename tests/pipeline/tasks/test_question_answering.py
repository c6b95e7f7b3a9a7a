"""Questions about a context: answers at their offsets, windows, and the official scores."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.tasks.base import Data
from pipeline.tasks.batches import IGNORED, make_batch
from pipeline.tasks.question_answering import QuestionAnswering, _question, normalised, token_f1
from runtimes.errors import BadInput

CONTEXT = "please turn off the light in my kitchen and play some music now"


def question(text: str, *answers: str, **more) -> dict:
    return {"id": f"id of {text}", "question": text, "answers": [{"text": a, "answer_start": CONTEXT.index(a)} for a in answers], **more}


def article(title: str, *questions: dict, context: str = CONTEXT) -> dict:
    return {"title": title, "paragraphs": [{"context": context, "qas": list(questions)}]}


ASKED = [question("turn off", "the light", "light"), question("play", "some music")]


def task(**options) -> QuestionAnswering:
    return QuestionAnswering(data="", **{"max_length": 64, "stride": 8} | options)


def write(folder: Path, **splits: list[dict]) -> Path:
    for split, articles in splits.items():
        (folder / f"{split}.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    return folder


@pytest.fixture
def data(tmp_path) -> Data:
    return task().read(write(tmp_path, train=[article("a", *ASKED)], validation=[article("b", *ASKED)], test=[article("c", *ASKED)]))


def perfect(texts, score: float = 50.0) -> dict[str, np.ndarray]:
    """Logits that point at each window's target; at nothing where it has none."""
    found = {}
    for name in ("start", "end"):
        found[f"{name}_logits"] = np.zeros(len(texts.ids), np.float32)
        for window, target in enumerate(texts.targets[name]):
            if target != IGNORED:
                found[f"{name}_logits"][texts.offsets[window] + target] = score
    return found


def test_rows(data):
    assert data.train[0] == {
        "id": "id of turn off", "title": "a", "question": "turn off", "context": CONTEXT, "answers": [(16, "the light"), (20, "light")],
        "may_have_none": False, "impossible": False,
    }  # fmt: skip
    assert task().options(data)["no_answer"] is False


def test_missing_test_questions_are_those_of_whole_articles(tmp_path):
    made = task().read(write(tmp_path, train=[article("a", *ASKED)], validation=[article(title, *ASKED) for title in "bcdef"]))
    assert not {row["title"] for row in made.validation} & {row["title"] for row in made.test}
    assert len(made.validation) + len(made.test) == 10
    assert "no test file" in made.notes[0]


WRONG = question("where", "kitchen")
WRONG["answers"][0]["answer_start"] += 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"data": [article("a", WRONG)]}), r"test\.json: question id of where: the answer 'kitchen' does not stand at character 33"),
        (json.dumps({"data": [article("a", WRONG | {"answers": [{"text": "now", "answer_start": -3}]})]}), "does not stand at character -3"),
        (json.dumps({"data": [article("a", question("where"))]}), r"test\.json: question id of where: no answer"),
        (json.dumps({"data": [article("a", question(" ", "now"))]}), r"test\.json: question id of  : question and context must not be empty"),
        (json.dumps({"data": [article("a", question("\ud800", "now") | {"id": "7"})]}), r"test\.json: question 7: half of a surrogate pair"),
        (json.dumps({"data": [article("a", {"id": "7", "question": "where"})]}), r"test\.json: question 7: not in SQuAD's form.*answers"),
        (json.dumps({"data": [article("a", {"id": "7", "question": 3, "answers": []})]}), r"test\.json: question 7: not in SQuAD's form"),
        (json.dumps([1]), r"test\.json: not in SQuAD's form"),
        (json.dumps({"data": []}), r"test\.json: no questions"),
        ('{"data":\n[', r"test\.json:2: not JSON"),
        (b"\xff", r"test\.json:1: byte 0xff is not UTF-8"),
    ],
)
def test_faults_name_file_and_question(tmp_path, content, message):
    write(tmp_path, train=[article("a", *ASKED)], validation=[article("b", *ASKED)])
    (tmp_path / "test.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=message):
        task().read(tmp_path)


def test_a_question_longer_than_the_window_is_named(tokenizer, data):
    rows = [data.train[0] | {"question": "turn on the light " * 20}]
    with pytest.raises(BadInput, match=r"question id of turn off: the question has 80 tokens"):
        task().encode(tokenizer, rows, data, 0)


def test_targets_are_the_tokens_of_the_first_answer(tokenizer, data):
    texts = task().encode(tokenizer, data.train, data, 0)
    assert len(texts) == 2
    for number, wanted in enumerate(["the light", "some music"]):
        encoding = texts.encoding(number)
        start, end = texts.targets["start"][number], texts.targets["end"][number]
        assert CONTEXT[encoding.offsets[start][0] : encoding.offsets[end][1]] == wanted
        assert encoding.types[start] == 1


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_answer_that_ends_with_an_accent_is_a_target(tokenizer, tmp_path, form):
    context, answer = (unicodedata.normalize(form, text) for text in ("turn off musi\u0107 now", "musi\u0107"))
    asked = {"id": "a", "question": "play", "answers": [{"text": answer, "answer_start": context.index(answer)}]}
    splits = {split: [article(split, asked, context=context)] for split in ("train", "validation", "test")}
    data = task().read(write(tmp_path, **splits))
    texts = task().encode(tokenizer, data.train, data, 0)
    (window,) = texts.encodings
    (start,), (end,) = texts.targets["start"], texts.targets["end"]
    assert 0 < start <= end and window.offsets[start][0] == context.index(answer)
    assert task().evaluate(perfect(texts), texts, data.train, data)["exact_match"] == 100


def test_windows_without_the_answer_teach_nothing_in_1_1(tokenizer, data):
    narrow = task(max_length=16, stride=2)
    texts = narrow.encode(tokenizer, data.train, data, 0)
    assert len(texts) > 2
    assert texts.lengths.max() <= 16
    assert sorted(set(texts.rows.tolist())) == [0, 1]
    taught = narrow.trainable(texts)
    assert 2 <= len(taught) < len(texts)
    assert (taught.targets["start"] > 0).all()
    assert narrow.evaluate(perfect(texts), texts, data.train, data) == {"f1": 100, "exact_match": 100}


def test_without_an_answer_the_target_is_the_first_token_in_2_0(tokenizer, tmp_path):
    asked = [ASKED[0] | {"is_impossible": False}, question("switch", is_impossible=True)]
    data = task().read(write(tmp_path, train=[article("a", *asked)], validation=[article("b", *asked)], test=[article("c", *asked)]))
    assert task().options(data)["no_answer"] is True
    narrow = task(max_length=16, stride=2)
    texts = narrow.encode(tokenizer, data.train, data, 0)
    assert (texts.targets["start"][texts.rows == 1] == 0).all()
    assert (texts.targets["start"] == 0).sum() == len(texts) - (texts.targets["start"] > 0).sum()
    assert len(narrow.trainable(texts)) == len(texts)
    whole = task().encode(tokenizer, data.test, data, 0)
    assert task().evaluate(perfect(whole), whole, data.test, data) == {"f1": 100, "exact_match": 100}
    always = {name: np.zeros_like(values) for name, values in perfect(whole).items()}
    for values in always.values():
        values[whole.offsets[:-1]] = 50.0
    assert task().evaluate(always, whole, data.test, data) == {"f1": 50, "exact_match": 50}


def row_of(answer: str, context: str = CONTEXT, second_version: bool = True) -> dict:
    asked = {"id": "7", "question": "where", "answers": [{"text": answer, "answer_start": context.index(answer)}]}
    return _question("a", context, asked, second_version, "here")


@pytest.mark.parametrize("answer", [" the light", "the light ", "\t the light"])
def test_blanks_around_an_answer_are_no_part_of_it(answer):
    row = row_of(answer, f"turn off{answer}in my kitchen")
    ((begin, text),) = row["answers"]
    assert text == "the light" == row["context"][begin : begin + len(text)]
    with pytest.raises(BadInput, match="does not stand at"):
        row_of("  ", "turn  off")


@pytest.mark.parametrize("second_version", [False, True])
@pytest.mark.parametrize("answer", ["\u200bthe light", "the light\x01", "\x01the light\u200b"])
@pytest.mark.parametrize("context", ["{} now", "turn off {}", "turn off {} now", "{}"])
def test_a_character_that_the_tokenizer_drops_does_not_cost_the_answer(tokenizer, answer, context, second_version):
    row = row_of(answer, context.format(answer), second_version)
    texts = task().encode(tokenizer, [row], None, 0)
    encoding, start, end = texts.encoding(0), texts.targets["start"][0], texts.targets["end"][0]
    assert row["context"][encoding.offsets[start][0] : encoding.offsets[end][1]] == "the light"


def test_an_answer_that_no_window_holds_is_told_and_teaches_no_absence(tokenizer, data):
    narrow = task(max_length=16, stride=2)
    rows = [row_of(CONTEXT), row_of("some music"), row_of(CONTEXT, second_version=False)]
    texts = narrow.encode(tokenizer, rows, data, 0)
    assert (texts.targets["start"][texts.rows != 1] == IGNORED).all()
    taught = texts.targets["start"][texts.rows == 1]
    assert (taught > 0).any() and (taught == 0).any() and (taught != IGNORED).all()
    assert narrow.untaught(texts, rows).startswith("2 of 3 answers stand whole in no window and teach nothing")
    assert task().untaught(task().encode(tokenizer, rows, data, 0), rows) == ""


def test_questions_without_an_answer_count_in_whatever_split_they_are(tokenizer, tmp_path):
    """A source that knows them, taken as it is, is judged by them though its training rows are of version 1.1."""
    unanswerable = [article("c", question("switch", is_impossible=True))]
    data = task().read(write(tmp_path, train=[article("a", *ASKED)], validation=[article("b", *ASKED)], test=unanswerable))
    assert task().options(data)["no_answer"] is True
    texts = task().encode(tokenizer, data.test, data, 0)
    assert task().evaluate(perfect(texts), texts, data.test, data) == {"f1": 100, "exact_match": 100}
    assert "which the training rows (1.1) teach no model to say" in data.notes[0]


def test_losses(tokenizer, data):
    texts = task().encode(tokenizer, data.train, data, 0)
    batch = make_batch(texts, np.arange(2))
    even = {name: torch.zeros(len(texts.ids)) for name in ("start_logits", "end_logits")}
    right = {name: torch.from_numpy(values) for name, values in perfect(texts).items()}
    # Padding takes no part: each input is uniform over its own tokens.
    assert task().loss(even, batch).item() == pytest.approx(np.mean(np.log(texts.lengths)), rel=1e-5)
    assert task().loss(right, batch).item() == pytest.approx(0, abs=1e-5)
    assert task().soft_loss(right, right, batch, 2.0).item() == pytest.approx(0, abs=1e-5)
    assert task().soft_loss(even, right, batch, 1.0).item() == pytest.approx(np.mean(np.log(texts.lengths)), rel=1e-4)
    assert math.isfinite(task().soft_loss(right, even, batch, 1.0).item())


@pytest.mark.parametrize(
    ("given", "wanted", "f1", "exact"),
    [
        ("The Cat!", "cat", 1, True),
        ("a  cat", "the\ncat.", 1, True),
        ("black cat", "cat", 2 / 3, False),
        ("dog", "cat", 0, False),
        ("", "", 1, True),
        ("", "cat", 0, False),
        ("theatre", "atre", 0, False),
    ],
)
def test_the_official_comparison(given, wanted, f1, exact):
    assert token_f1(given, wanted) == pytest.approx(f1)
    assert (normalised(given) == normalised(wanted)) is exact


def test_a_stride_that_does_not_move_on_is_refused():
    with pytest.raises(ValueError, match="stride"):
        task(max_length=64, stride=32)


def test_squad(real_data, tokenizer):
    data = task().read(real_data("squad"))
    assert len(data.train) == 11_877
    assert len(data.validation) + len(data.test) == 10_570
    assert {row["title"] for row in data.validation}.isdisjoint({row["title"] for row in data.test})
    rows = data.validation[:20]
    wide = task(max_length=512, stride=128)
    texts = wide.encode(tokenizer, rows, data, 0)
    # The tokenizer knows no long words, so that all answers but those longer than 30 tokens can be found.
    assert wide.model_copy(update={"longest_answer": 200}).evaluate(perfect(texts), texts, rows, data)["f1"] > 95
