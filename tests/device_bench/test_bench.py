"""A whole bench of a bundle: this machine, places that fail, files that are refused, and what the document says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_bench import bench as module
from device_bench.bench import TIERS, Plan, Tier, bench, failed
from device_bench.lab import Place, parse_places
from device_bench.measurement import Care
from device_bench.targets import LocalTarget
from runtimes.backends import load_model
from runtimes.bundle import SCHEMA, open_bundle
from runtimes.decode import decoder
from runtimes.errors import BadInput, IntegrityError, TargetUnreachable
from runtimes.text import TextEncoder
from tests.device_bench.conftest import CLASSES, HIDDEN, OUTPUTS, write_onnx, write_tflite

FILE = "tflite/model.tflite"
PIECES = 200
TEXTS = [{"text": text} for text in ("turn on the light", "play", "switch the lamp off in my kitchen now please")]
QUESTIONS = [
    {"question": "play music", "context": "turn on the light in the kitchen now please switch the lamp off in my bedroom"},
    {"question": "stop", "context": "play the song"},
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(TIERS, "short", Tier(inferences=20, seconds=0.02, rounds=2))


@pytest.fixture
def emulated(monkeypatch):
    """Takes this machine for an emulated one, which agrees with itself."""
    monkeypatch.setattr(module, "open_target", lambda place, say: LocalTarget(name=place.label, emulated=True))


def write_bundle(
    folder: Path, tokenizer: Path, max_length: int, task: Mapping[str, Any], labels: Mapping[str, str], examples: Sequence[Mapping[str, str]]
) -> Path:
    """A bundle of the models that lie in ``folder``, as far as a bench looks at it."""
    shutil.copy(tokenizer, folder / "tokenizer.json")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/model.*"))
    read = decoder(task["kind"])(task, {name: (folder / file).read_text(encoding="utf-8").splitlines() for name, file in labels.items()})
    encoder, cases = TextEncoder(folder / "tokenizer.json", max_length), []
    for example in examples:
        inputs = read.encode(encoder, example)
        outputs = {
            file: [{name: values.tolist() for name, values in model.run(one.ids, one.types).items()} for one in inputs]
            for file in files
            for model in [load_model(folder / file)]
        }
        given = [{"ids": one.ids, "types": one.types} for one in inputs]
        cases.append({"example": example, "inputs": given, "outputs": outputs, "answer": {file: {} for file in files}})
    (folder / "golden").mkdir()
    (folder / "golden/cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    models = [
        {"file": file, "format": file.partition("/")[0], "precision": "fp32", "buckets": [], "tolerance": 1e-3, "metrics": {}} for file in files
    ]
    manifest = {
        "schema": SCHEMA, "name": folder.name, "task": task, "tokenizer": {"file": "tokenizer.json", "max_length": max_length},
        "labels": labels, "golden": {"file": "golden/cases.jsonl"}, "models": models,
    }  # fmt: skip
    (folder / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def weights() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    return tuple(generator.normal(size=size).astype(np.float32) for size in ((PIECES, HIDDEN), (HIDDEN, CLASSES)))


@pytest.fixture(scope="module")
def bundle(tiny_model, tmp_path_factory) -> Path:
    """Classes of texts, in both formats."""
    folder = tmp_path_factory.mktemp("bundle") / "classes"
    for kind in ("onnx", "tflite"):
        (folder / kind).mkdir(parents=True)
    write_onnx(folder / "onnx/model.onnx", *weights())
    write_tflite(folder / FILE, *weights(), (8, 16))
    (folder / "labels.txt").write_text("on\noff\nmusic\n", encoding="utf-8")
    task = {
        "kind": "text-classification", "columns": ["text"], "segments": 1, "decode": "softmax", "multi_label": False, "threshold": None,
    }  # fmt: skip
    return write_bundle(folder, tiny_model / "tokenizer.json", 16, task, {"logits": "labels.txt"}, TEXTS)


@pytest.fixture(scope="module")
def question_bundle(tiny_model, tmp_path_factory) -> Path:
    """Answers in texts, which are read in windows of twelve tokens."""
    folder = tmp_path_factory.mktemp("bundle") / "questions"
    (folder / "onnx").mkdir(parents=True)
    write_onnx(folder / "onnx/model.onnx", *weights())
    task = {
        "kind": "question-answering", "columns": ["question", "context"], "segments": 2, "decode": "none", "stride": 4, "longest_answer": 8,
        "no_answer": False, "null_threshold": 0.0,
    }  # fmt: skip
    return write_bundle(folder, tiny_model / "tokenizer.json", 12, task, {}, QUESTIONS[1:])


def plan(**changes) -> Plan:
    return replace(Plan(tier="short", threads=[1], lengths=[8, 4096], care=Care()), **changes)


def run(bundle, places=None, **changes):
    return bench(open_bundle(bundle), places or [Place("local")], plan(**changes), lambda message: None)


def test_every_file_is_measured_and_the_first_twice(bundle):
    document = run(bundle)
    (target,) = document["targets"]
    names = [entry.file for entry in open_bundle(bundle).models]
    rows = [row for row in target["measurements"] if row["case"] == "texts"]
    assert [row["file"] for row in rows] == [*names, names[0]]
    assert [row["repeat"] for row in rows] == [False] * len(names) + [True]
    assert {row["length"] for row in target["measurements"]} == {None, 8}
    assert all(row["count"] >= 20 and len(row["round_samples_ms"]) == 2 and row["memory"]["peak_bytes"] > 0 for row in rows)
    assert document["texts"] == document["inputs"] == len(list(open_bundle(bundle).golden_cases()))
    assert (target["error"], target["refused"], target["emulated"]) == (None, [], False)
    assert target["conditions"]["architecture"]
    assert failed(document) == []
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_examples_of_ones_own(bundle):
    document = run(bundle, files=[FILE], examples=[{"text": "turn on the light"}, {"text": "play"}], repeat=False)
    assert (document["texts"], document["inputs"], document["texts_from"]) == (2, 2, "file")
    assert [row["file"] for row in document["targets"][0]["measurements"]] == [FILE] * 2


def test_a_file_that_gives_other_outputs_is_refused_and_the_others_are_measured(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    cases = [json.loads(line) for line in (folder / "golden/cases.jsonl").read_text(encoding="utf-8").splitlines()]
    for case in cases:
        case["outputs"][FILE][0]["logits"][0] += 1.0
    (folder / "golden/cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    document = run(folder)
    target = document["targets"][0]
    assert FILE not in {row["file"] for row in target["measurements"]}
    assert len(target["measurements"]) > 0
    assert [(one["file"], one["error"]["exit_code"]) for one in target["refused"]] == [(FILE, IntegrityError.exit_code)]
    assert "golden case 1 differs by 1 in logits" in failed(document)[0]["message"]


def test_one_broken_board_does_not_stop_the_others(bundle, monkeypatch):
    monkeypatch.setenv("POCKETBERT_SSH", "ssh -F none -o ConnectTimeout=5")
    places = parse_places("ssh:nobody@127.0.0.1:9,local,ssh:nobody@127.0.0.1:19")
    document = run(bundle, places, files=[FILE], repeat=False)
    first, here, last = document["targets"]
    assert [first["on"], here["on"], last["on"]] == [place.on for place in places]
    assert here["error"] is None
    assert len(here["measurements"]) == 2
    assert first["error"]["exit_code"] == last["error"]["exit_code"] == TargetUnreachable.exit_code
    assert [failure["name"] for failure in failed(document)] == [first["name"], last["name"]]


def test_sustained_run(bundle):
    document = run(bundle, files=[FILE], repeat=False, sustained_minutes=0.01, window_seconds=0.1)
    (sustained,) = document["targets"][0]["sustained"]
    assert (sustained["file"], sustained["threads"]) == (FILE, 1)
    assert len(sustained["windows"]) >= 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tier": "slow"}, "tier 'slow': known are rapid, quick, normal"),
        ({"files": ["model.pt"]}, "the bundle has no file 'model.pt'; it has "),
        ({"score": lambda outputs: {}}, "a score needs the examples"),
        ({"examples": [{"text": "play"}, {"txt": "play"}]}, "example 2: text missing; text-classification takes text"),
    ],
)
def test_plans_that_no_place_could_follow(changes, says, bundle):
    with pytest.raises(BadInput, match=says):
        run(bundle, **changes)


def test_threads_are_one_and_the_strong_cores_that_may_be_used():
    conditions = {"affinity": list(range(8)), "cores": list(range(8)), "clusters": None}
    assert module._thread_counts(conditions) == [1, 8]
    assert module._thread_counts({**conditions, "clusters": [{"cores": [0, 1, 2, 3]}, {"cores": [4, 5, 6]}]}) == [1, 3]
    assert module._thread_counts({**conditions, "affinity": [0, 1], "clusters": [{"cores": [0, 1, 2, 3]}, {"cores": [4, 5]}]}) == [1, 2]
    assert module._thread_counts({"affinity": None, "cores": None, "clusters": None}) == [1]


# --- agreement ------------------------------------------------------------------------------------------------------


def test_an_emulated_machine_is_held_against_this_one_and_not_timed(bundle, emulated):
    document = run(bundle)
    (target,) = document["targets"]
    assert target["measurements"] == []
    assert [row["file"] for row in target["agreement"]] == [entry.file for entry in open_bundle(bundle).models]
    for row in target["agreement"]:
        assert row["texts"] == row["inputs"] == row["decisions"] == row["same_decisions"] == document["texts"]
        assert (row["same_bits"], row["worst_difference"], row["scores"], row["scores_here"]) == (True, 0.0, None, None)


def test_a_long_text_is_measured_in_its_windows(question_bundle):
    document = run(question_bundle, examples=QUESTIONS, repeat=False, lengths=[])
    (row,) = document["targets"][0]["measurements"]
    assert (document["texts"], failed(document)) == (2, [])
    assert document["inputs"] > 3
    assert row["count"] % document["inputs"] == 0 or row["count"] >= 20


def test_scores_are_of_the_outputs_of_each_example(question_bundle, emulated):
    seen = []

    def score(outputs) -> dict[str, float]:
        seen.append(outputs)
        return {"windows": float(sum(map(len, outputs)))}

    document = run(question_bundle, examples=QUESTIONS, score=score)
    (row,) = document["targets"][0]["agreement"]
    there, here = seen
    for outputs in seen:
        long, short = outputs
        assert (len(outputs), len(short)) == (2, 1)
        assert len(long) == document["inputs"] - 1 > 1
        assert all(sorted(one) == OUTPUTS for one in (*long, *short))
        assert all(one["start_logits"].shape == one["end_logits"].shape == one["slot_logits"].shape[:1] for one in (*long, *short))
    for name, values in there[0][0].items():
        np.testing.assert_array_equal(values, here[0][0][name])
    assert row["scores"] == row["scores_here"] == {"windows": float(document["inputs"])}
    assert (row["texts"], row["inputs"], row["same_bits"]) == (2, document["inputs"], True)
    assert row["decisions"] == row["same_decisions"] == 2 * document["inputs"]  # a start and an end each


def test_a_single_text_keeps_its_digest_and_columns_count(question_bundle, bundle):
    """So that measurements of format 1 can still be compared."""
    document = run(bundle, files=[FILE], examples=[{"text": "turn on"}, {"text": "play"}], repeat=False, lengths=[])
    assert document["texts_sha256"] == hashlib.sha256(b"turn on\nplay").hexdigest()
    one, other = (
        run(question_bundle, examples=[{"question": "play", "context": context}], repeat=False, lengths=[])["texts_sha256"]
        for context in ("the song", "the music")
    )
    assert one != other
