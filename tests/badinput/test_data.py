"""Bad data ends in a sentence that names the file, and the row where there is one."""

from __future__ import annotations

import pytest

from tests.badinput.data import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data(tried, case):
    tried(case)


def test_names_of_cases_are_their_own():
    assert len({case.name for case in CASES}) == len(CASES)
