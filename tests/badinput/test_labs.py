"""Bad lab files, arguments of ``bench`` and files of measurements end in a sentence that names the place."""

from __future__ import annotations

import pytest

from tests.badinput.labs import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_labs(tried, case):
    tried(case)


def test_names_of_cases_are_their_own():
    assert len({case.name for case in CASES}) == len(CASES)
