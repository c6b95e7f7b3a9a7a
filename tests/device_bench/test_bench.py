"""A whole bench of a real bundle: this machine, places that fail, files that are refused, and what the document says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from device_bench import bench as module
from device_bench.bench import TIERS, Plan, Tier, bench, failed
from device_bench.lab import Place, parse_places
from device_bench.measurement import Care
from runtimes.bundle import open_bundle
from runtimes.errors import BadInput, IntegrityError, TargetUnreachable

FILE = "tflite/model_int8.tflite"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setitem(TIERS, "short", Tier(inferences=20, seconds=0.02, rounds=2))


def plan(**changes) -> Plan:
    return replace(Plan(tier="short", threads=[1], lengths=[8, 4096], care=Care()), **changes)


def run(bundle, places=None, **changes):
    return bench(open_bundle(bundle), places or [Place("local")], plan(**changes), lambda message: None)


def test_every_file_is_measured_and_the_first_twice(tiny_run):
    document = run(tiny_run / "bundle")
    (target,) = document["targets"]
    names = [entry.file for entry in open_bundle(tiny_run / "bundle").models]
    rows = [row for row in target["measurements"] if row["case"] == "texts"]
    assert [row["file"] for row in rows] == [*names, names[0]]
    assert [row["repeat"] for row in rows] == [False] * len(names) + [True]
    assert {row["length"] for row in target["measurements"]} == {None, 8}
    assert all(row["count"] >= 20 and len(row["round_samples_ms"]) == 2 and row["memory"]["peak_bytes"] > 0 for row in rows)
    assert document["texts"] == len(list(open_bundle(tiny_run / "bundle").golden_cases()))
    assert (target["error"], target["refused"], target["emulated"]) == (None, [], False)
    assert target["conditions"]["architecture"]
    assert failed(document) == []
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_texts_of_ones_own(tiny_run):
    document = run(tiny_run / "bundle", files=[FILE], texts=["turn on the light", "play"], repeat=False)
    assert (document["texts"], document["texts_from"]) == (2, "file")
    assert [row["file"] for row in document["targets"][0]["measurements"]] == [FILE] * 2


def test_a_file_that_gives_other_outputs_is_refused_and_the_others_are_measured(tiny_run, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_run / "bundle", folder)
    cases = [json.loads(line) for line in (folder / "golden/cases.jsonl").read_text(encoding="utf-8").splitlines()]
    for case in cases:
        case["logits"][FILE][0] += 1.0
    (folder / "golden/cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    document = run(folder)
    target = document["targets"][0]
    assert FILE not in {row["file"] for row in target["measurements"]}
    assert len(target["measurements"]) > 0
    assert [(one["file"], one["error"]["exit_code"]) for one in target["refused"]] == [(FILE, IntegrityError.exit_code)]
    assert "golden case 1 differs" in failed(document)[0]["message"]


def test_one_broken_board_does_not_stop_the_others(tiny_run, monkeypatch):
    monkeypatch.setenv("POCKETBERT_SSH", "ssh -F none -o ConnectTimeout=5")
    places = parse_places("ssh:nobody@127.0.0.1:9,local,ssh:nobody@127.0.0.1:19")
    document = run(tiny_run / "bundle", places, files=[FILE], repeat=False)
    first, here, last = document["targets"]
    assert [first["on"], here["on"], last["on"]] == [place.on for place in places]
    assert here["error"] is None
    assert len(here["measurements"]) == 2
    assert first["error"]["exit_code"] == last["error"]["exit_code"] == TargetUnreachable.exit_code
    assert [failure["name"] for failure in failed(document)] == [first["name"], last["name"]]


def test_sustained_run(tiny_run):
    document = run(tiny_run / "bundle", files=[FILE], repeat=False, sustained_minutes=0.01, window_seconds=0.1)
    (sustained,) = document["targets"][0]["sustained"]
    assert (sustained["file"], sustained["threads"]) == (FILE, 1)
    assert len(sustained["windows"]) >= 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tier": "slow"}, "tier 'slow': known are rapid, quick, normal"),
        ({"files": ["model.pt"]}, "the bundle has no file 'model.pt'; it has "),
        ({"texts": ["a"], "answers": ["on", "off"]}, "2 answers for 1 texts"),
    ],
)
def test_plans_that_no_place_could_follow(changes, says, tiny_run):
    with pytest.raises(BadInput, match=says):
        run(tiny_run / "bundle", **changes)


def test_threads_are_one_and_the_strong_cores_that_may_be_used():
    conditions = {"affinity": list(range(8)), "cores": list(range(8)), "clusters": None}
    assert module._thread_counts(conditions) == [1, 8]
    assert module._thread_counts({**conditions, "clusters": [{"cores": [0, 1, 2, 3]}, {"cores": [4, 5, 6]}]}) == [1, 3]
    assert module._thread_counts({**conditions, "affinity": [0, 1], "clusters": [{"cores": [0, 1, 2, 3]}, {"cores": [4, 5]}]}) == [1, 2]
    assert module._thread_counts({"affinity": None, "cores": None, "clusters": None}) == [1]
