"""The server that runs the cases, and the small bundle that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.badinput.harness import Case, Outcome, Runner, check
from tests.runtimes.conftest import pieces, tokenizer_file  # noqa: F401
from tests.runtimes.tiny_bundles import write_bundle


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    with Runner() as running:
        yield running


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory, tokenizer_file, pieces) -> Path:  # noqa: F811
    """A bundle of text classification whose files are tables in place of a model."""
    return write_bundle(tmp_path_factory.mktemp("bundle"), "text-classification", tokenizer_file, len(pieces))


@pytest.fixture
def tried(runner, tmp_path, tiny_model, small_bundle) -> Callable[[Case], Outcome]:
    """Run a case and check what it did; ``{model}`` and ``{bundle}`` in its arguments are a tiny model and a small bundle."""

    def run(case: Case) -> Outcome:
        outcome = runner.run(case, tmp_path, model=tiny_model, bundle=small_bundle)
        check(case, outcome)
        return outcome

    return run
