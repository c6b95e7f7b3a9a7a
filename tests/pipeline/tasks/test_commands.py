"""The built-in commands: balanced, reproducible, and with wordings in test that training has never seen."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline.tasks import BUILT_IN_DATA, commands, load_data
from pipeline.tasks.base import SPLITS
from pipeline.tasks.commands import FILLERS, INTENTS, ROWS_PER_INTENT, SLOTS, command_rows, split_templates, with_typo
from pipeline.tasks.text_classification import TextClassification

ROOT = Path(__file__).resolve().parents[3]
ANY_FILLER = "|".join(re.escape(f) for f in sorted({f for fs in FILLERS.values() for f in fs}, key=len, reverse=True))


@pytest.fixture(scope="module")
def data():
    return load_data(TextClassification(data=BUILT_IN_DATA), None)


def pattern(template: str) -> re.Pattern[str]:
    """Matches every text that a template makes without typos."""
    parts = re.split(r"\{(\w+)\}", template)
    body = "".join("(?:" + "|".join(SLOTS[p]) + ")" if i % 2 else re.escape(p) for i, p in enumerate(parts))
    return re.compile(f"(?:(?:{ANY_FILLER}) )?{body}(?: (?:{ANY_FILLER}))?")


def templates_of(split: str) -> list[str]:
    return [t for templates in INTENTS.values() for t in split_templates(templates)[split]]


def test_intents_and_labels(data):
    assert len(INTENTS) >= 24
    assert data.labels == {"logits": sorted(INTENTS)}


@pytest.mark.parametrize("split", SPLITS)
def test_as_many_rows_of_every_intent(data, split):
    assert Counter(row["label"] for row in data.split(split)) == dict.fromkeys(INTENTS, ROWS_PER_INTENT[split])


@pytest.mark.parametrize("split", SPLITS)
def test_texts_look_like_a_recognisers(data, split):
    for row in data.split(split):
        assert re.fullmatch(r"[a-z']+( [a-z']+)*", row["text"]), row


def test_no_text_twice(data):
    texts = [row["text"] for split in SPLITS for row in data.split(split)]
    assert len(set(texts)) == len(texts)


def test_rows_are_shuffled(data):
    assert len({row["label"] for row in data.train[:60]}) > 10


def test_same_seed_same_data():
    assert command_rows(3) == command_rows(3)


def test_other_seed_other_data():
    assert command_rows(1) != command_rows(0)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_same_data_in_another_process(data, hash_seed):
    code = "from pipeline.tasks import *; from pipeline.tasks.text_classification import TextClassification as T; "
    code += "print(load_data(T(data=BUILT_IN_DATA), None).fingerprint)"
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == data.fingerprint


def test_the_global_generator_is_left_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    command_rows()
    assert random.random() == expected


def test_templates_are_written_once_and_their_slots_exist():
    every = [t for split in SPLITS for t in templates_of(split)]
    assert len(set(every)) == len(every)
    assert sorted(every) == sorted(t for templates in INTENTS.values() for t in templates)
    assert {slot for t in every for slot in re.findall(r"\{(\w+)\}", t)} == set(SLOTS)


def test_every_intent_has_templates_for_every_split():
    for intent, templates in INTENTS.items():
        counts = [len(split_templates(templates)[split]) for split in SPLITS]
        assert len(templates) >= 10 and counts[0] >= 6 and counts[1] >= 1 and counts[2] >= 2, intent


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_templates_never_occur_in_train(data, split):
    held_out = [pattern(t) for t in templates_of(split)]
    assert [row for row in data.train if any(p.fullmatch(row["text"]) for p in held_out)] == []
    assert sum(any(p.fullmatch(row["text"]) for p in held_out) for row in data.split(split)) > 0.7 * len(data.split(split))


def test_a_text_without_typos_comes_from_one_intent_only(data):
    patterns = [(pattern(t), intent) for intent, templates in INTENTS.items() for t in templates]
    for row in data.test:
        assert {intent for p, intent in patterns if p.fullmatch(row["text"])} <= {row["label"]}, row


@pytest.mark.parametrize("split", SPLITS)
def test_fillers_and_typos_occur_but_not_everywhere(data, split):
    rows = data.split(split)
    known = {w for t in templates_of(split) for w in re.sub(r"\{\w+\}", "", t).split()}
    known |= {w for values in (*SLOTS.values(), *FILLERS.values()) for v in values for w in v.split()}
    misspelt = sum(any(word not in known for word in row["text"].split()) for row in rows)
    assert 0.05 < misspelt / len(rows) < 0.25
    opened = sum(row["text"].startswith(tuple(f + " " for f in FILLERS["opening"])) for row in rows)
    closed = sum(row["text"].endswith(tuple(" " + f for f in FILLERS["closing"])) for row in rows)
    assert 0.2 < opened / len(rows) < 0.6
    assert 0.2 < closed / len(rows) < 0.6


def test_a_typo_changes_exactly_one_word():
    rng = random.Random(0)
    text = "wake me up at half past seven tomorrow"
    seen = set()
    for _ in range(300):
        changed = [(a, b) for a, b in zip(text.split(), with_typo(text, rng).split(), strict=True) if a != b]
        assert len(changed) == 1
        before, after = changed[0]
        assert len(before) >= commands.TYPO_MIN_LETTERS and abs(len(after) - len(before)) <= 1
        seen.add(len(after) - len(before))
    assert seen == {-1, 0, 1}


@pytest.mark.parametrize("text", ["it is on", "i'm up", "mmmm"])
def test_a_text_without_a_long_word_stays_as_it_is(text):
    assert with_typo(text, random.Random(0)) == text


def test_could_you_only_goes_before_a_verb():
    assert "could you" in commands.openings("turn on the lights")
    assert not {"could you", "just"} & set(commands.openings("how is the weather {day}"))
    assert "could you" not in commands.openings("{item} should go on my list")
