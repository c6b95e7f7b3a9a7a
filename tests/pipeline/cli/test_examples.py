"""Examples of every kind of task on the command line: arguments, lines, files; what is no example is refused with its place."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from pipeline.cli.examples import example_of_arguments, example_of_line, lines_of, read_examples
from pipeline.tasks.base import FIDELITY
from runtimes.backends import load_model
from runtimes.bundle import open_bundle
from runtimes.errors import BadInput
from runtimes.text import TextEncoder
from tests.pipeline.cli.test_main import pocketbert, refused
from tests.pipeline.small_tasks import TASKS, run_task

STAGES = """
[[stage]]
use = "finetune"
epochs = 4
batch_size = 8
learning_rate = 3e-3
[[stage]]
use = "export"
formats = ["onnx"]
[[stage]]
use = "pack"
"""
FILE = "onnx/model.onnx"
QUESTION = ("question-answering", "what light", "turn on the light")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """(bundle, data folder) of a task, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("examples")
    known: dict[str, tuple[Path, Path]] = {}

    def make(task: str) -> tuple[Path, Path]:
        if task not in known:
            place = folder / task.replace(" ", "-")
            run_task(task, STAGES, place, tiny_model, folder / "cache")
            known[task] = place / "out" / "bundle", place / "data"
        return known[task]

    return make


@pytest.fixture
def test_file(made):
    def of(task: str) -> Path:
        return next(made(task)[1].glob("test.*"))

    return of


def never(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("task", TASKS)
def test_a_file_with_answers_is_scored_as_the_run_scored_it(task, made, test_file):
    bundle = open_bundle(made(task)[0])
    examples, score = read_examples(bundle, test_file(task), 10_000, never)
    encoder, decoder, model = TextEncoder(bundle.tokenizer_file, bundle.max_length), bundle.decoder(), load_model(bundle.folder / FILE)
    inputs = [decoder.encode(encoder, example) for example in examples]
    found = score([[model.run(one.ids, one.types) for one in each] for each in inputs])
    recorded = next(entry.metrics for entry in bundle.models if entry.file == FILE)
    without_model = {metric.name for metric in FIDELITY}  # a bench has the file alone
    recorded = {name: value for name, value in recorded["test"].items() if name not in without_model}
    assert {name: value for name, value in found.items() if name in recorded} == pytest.approx(recorded, abs=2e-3)
    ledger = json.loads((made(task)[0].parent / "ledger.json").read_text())
    assert next(iter(found)) == ledger["task"]["metrics"][0]["name"], "the primary metric comes first"


def test_examples_are_drawn_the_same_way_every_time(made, test_file):
    bundle = open_bundle(made("text-classification")[0])
    few, score = read_examples(bundle, test_file("text-classification"), 4, never)
    assert few == read_examples(bundle, test_file("text-classification"), 4, never)[0] and len(few) == 4 and score is not None


def test_without_answers_there_are_examples_and_a_reason(made, tmp_path):
    bundle, told = open_bundle(made("text-classification")[0]), []
    path = tmp_path / "texts.csv"
    path.write_text('text,more\n"turn on, the light",1\nplay the song,2\n')
    examples, score = read_examples(bundle, path, 9, told.append)
    assert sorted(example["text"] for example in examples) == ["play the song", "turn on, the light"] and score is None
    assert told == [f"no scores: {path}:2: no column 'label'; the columns are text, more"]
    path.write_text("text,label\nturn on the light,on\nplay the song,swim\n")
    told.clear()
    assert read_examples(bundle, path, 9, told.append)[1] is None
    assert "swim" in told[0] and "none of the classes of the bundle" in told[0]


def test_lines_of_a_text_file(made, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"\xef\xbb\xbfturn on the light\r\n\nplay\tthe song\n")
    examples, score = read_examples(open_bundle(made("text-classification")[0]), path, 9, never)
    assert sorted(example["text"] for example in examples) == ["play\tthe song", "turn on the light"] and score is None
    path.write_text("what light\tturn on the light\nwhat light\n")
    with pytest.raises(BadInput, match=re.escape(f"{path}:2: 1 text given; question-answering takes question, context, with tabs")):
        read_examples(open_bundle(made(QUESTION[0])[0]), path, 9, never)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.jsonl", '{"words": "a"}\n', "x.jsonl:1: text missing; text-classification takes text; the columns are words"),
        ("x.jsonl", '{"text": "\\ud800"}\n', "x.jsonl:1: half of a surrogate pair"),
        ("x.jsonl", "", "no text in it"),
        ("x.txt", "\n\n", "no text in it"),
        ("x.json", "{}", ".json"),
        ("x.xml", "<a/>", ".xml"),
    ],
)
def test_files_without_examples_are_refused(name, content, told, made, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput) as error:
        read_examples(open_bundle(made("text-classification")[0]), tmp_path / name, 9, lambda message: None)
    assert told in str(error.value) and "pocketbert-" not in str(error.value), "no temporary folder is named"


def test_arguments_of_pairs(made):
    question, one = (open_bundle(made(task)[0]).decoder() for task in ("question-answering", "text-classification"))
    likeness = open_bundle(made("sentence-embedding")[0]).decoder()
    assert example_of_arguments(question, "a", "b") == {"question": "a", "context": "b"}
    assert example_of_arguments(likeness, "a", None) == {"text": "a"}
    assert example_of_arguments(likeness, "a", "b") == {"text": "a", "text_pair": "b"}
    assert example_of_line(likeness, "a\tb\tc", "1") == {"text": "a", "text_pair": "b\tc"}
    with pytest.raises(BadInput, match=r"--pair is missing: .*question-answering, takes question \(TEXT\) and context \(--pair\)"):
        example_of_arguments(question, "a", None)
    with pytest.raises(BadInput, match=r"--pair: .*text-classification, takes text alone"):
        example_of_arguments(one, "a", "b")
    with pytest.raises(BadInput, match="--pair: not UTF-8 at character 2"):
        example_of_arguments(question, "a", "b\udce9")


def test_lines_are_utf8_or_refused_with_their_number():
    assert list(lines_of([b"\xef\xbb\xbfa\r\n", "é\n".encode(), b"c"], "in")) == [("in:1", "a"), ("in:2", "é"), ("in:3", "c")]
    for wrong, told in ((b"caf\xe9\n", "in:2: byte 0xe9 at column 4"), (b"\xed\xa0\x80\n", "in:2: byte 0xed at column 1")):
        with pytest.raises(BadInput, match=told):
            list(lines_of([b"good\n", wrong], "in"))


def test_predict_takes_a_question_and_its_context(made):
    bundle = str(made(QUESTION[0])[0])
    done = pocketbert("predict", bundle, QUESTION[1], "--pair", QUESTION[2], "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["example"] == {"question": QUESTION[1], "context": QUESTION[2]} and set(answer) == {"example", "answer", "truncated"}
    lines = pocketbert("predict", bundle, input="what light\tturn on the light\nwhat light\tplay the song\n")
    assert lines.returncode == 0 and len(lines.stdout.splitlines()) == 2, lines.stderr
    refused(pocketbert("predict", bundle, QUESTION[1]), 2, "--pair is missing", "question", "context")
    refused(pocketbert("predict", bundle, input="what light\n"), 2, "standard input:1", "question, context", "tabs")
    refused(pocketbert("predict", bundle, "--pair", "x"), 2, "--pair goes with a text")


def test_predict_gives_a_vector_or_a_likeness(made):
    bundle = str(made("sentence-embedding")[0])
    vector, likeness = (json.loads(pocketbert("predict", bundle, "--json", *given).stdout)["answer"] for given in (["a"], ["a", "--pair", "a"]))
    assert sum(value**2 for value in vector["embedding"]) == pytest.approx(1, abs=1e-4)
    assert likeness["similarity"] == pytest.approx(1, abs=1e-4)


def test_predict_refuses_lines_that_are_not_utf8_and_keeps_what_came_before(made):
    bundle = str(made("text-classification")[0])
    latin = b"turn on the light\ncaf\xe9\n".decode("utf-8", "surrogateescape")
    done = pocketbert("predict", bundle, input=latin, encoding="utf-8", errors="surrogateescape")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "standard input:2: byte 0xe9 at column 4 is not UTF-8" in done.stderr
    assert len(done.stdout.splitlines()) == 1
    refused(pocketbert("predict", bundle, os.fsdecode(b"caf\xe9")), 2, "TEXT: not UTF-8 at character 4")


def test_output_that_is_not_utf8_takes_every_answer(made):
    bundle = str(made("text-classification")[0])
    done = pocketbert("predict", bundle, "put an 今 on", "--json", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["example"] == {"text": "put an 今 on"} and done.stdout.isascii()


def test_bench_scores_what_a_place_gives(made, test_file, tmp_path):
    """Scores are of emulated places alone, so a plain bench only has to run the file's examples."""
    task = "text-classification of pairs"
    arguments = ["--tier", "rapid", "--threads", "1", "--lengths", "", "--texts", str(test_file(task)), "--most-texts", "6"]
    done = pocketbert("bench", str(made(task)[0]), *arguments, "--out", str(tmp_path / "a.json"), "--quiet")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "a.json").read_text())
    assert (document["texts"], document["inputs"], document["texts_from"]) == (6, 6, "file")
