"""Bad lab files, arguments of ``bench`` and measurements end in a sentence that names the place."""

from __future__ import annotations

import json
import random

import pytest

from tests.badinput.harness import faults
from tests.badinput.labs import CASES, VALUES, WHOLE, changed, leaves

SAMPLE = 60


@pytest.mark.parametrize("case", CASES, ids=str)
def test_labs(tried, document, tmp_path, case):
    (tmp_path / "whole.json").write_text(json.dumps(document))
    tried(case)


def test_a_whole_measurement_is_read(runner, document, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(document))
    for given in WHOLE.values():
        assert not faults(runner.command(given, tmp_path, writes=["page.html"]), codes=[0])


@pytest.mark.parametrize("command", WHOLE)
def test_damaged_measurements(runner, document, tmp_path, command):
    """A value is refused by name, or the command can do without it."""
    damages = [(path, name) for path in leaves(document) for name in VALUES]
    wrong = []
    for path, name in random.Random(command).sample(damages, SAMPLE):
        (tmp_path / "bad.json").write_text(json.dumps(changed(document, path, VALUES[name])))
        outcome = runner.command(WHOLE[command], tmp_path, writes=["page.html"])
        found = faults(outcome, (0, 2), ["bad.json"] if outcome.code == 2 else ())
        wrong += [f"{path}: {name}: {one}: {outcome.stderr.strip().splitlines()[-1:]}" for one in found]
    assert not wrong, "\n".join(wrong)
