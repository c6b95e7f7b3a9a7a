"""Buckets: the best of all choices by trial of every one, for any distribution of lengths and any cost."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from exporters.buckets import ROW_TILE, choose_buckets
from exporters.folding import fold
from tests.exporters.encoders import LONGEST, encoder

COSTS: dict[str, Callable[[int], float]] = {
    "linear": lambda n: n,
    "convex": lambda n: 40 * n + 3 * n * n,
    "tiled": lambda n: 16 * -(-n // 16),
    "concave": lambda n: n**0.5,
    "with a start": lambda n: 100 + n,
}


def expected_cost(buckets: list[int], lengths: list[int], cost: Callable[[int], float], longest: int) -> float:
    """Each text in the shortest bucket that holds it, in whole tiles."""
    total = 0.0
    for length in lengths:
        bucket = min(b for b in buckets if b >= min(length, longest))
        total += cost(-(-bucket // ROW_TILE) * ROW_TILE)
    return total


def best_by_trial(lengths: list[int], cost: Callable[[int], float], at_most: int, longest: int) -> float:
    shorter = range(1, longest)
    choices = (others for count in range(at_most) for others in combinations(shorter, count))
    return min(expected_cost([*others, longest], lengths, cost, longest) for others in choices)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_costs_less(name, seed):
    generator = np.random.default_rng(seed)
    longest = int(generator.integers(6, 19))
    histogram = generator.integers(0, 30, longest) * (generator.random(longest) < 0.6)
    histogram[int(generator.integers(longest))] += 1
    lengths = np.repeat(np.arange(1, longest + 1), histogram).tolist()
    generator.shuffle(lengths)
    for at_most in (1, 2, 3, 4):
        buckets = choose_buckets(lengths, COSTS[name], at_most, longest)
        assert buckets == sorted(set(buckets)) and buckets[0] >= 1
        assert buckets[-1] == longest and len(buckets) <= at_most
        best = best_by_trial(lengths, COSTS[name], at_most, longest)
        assert expected_cost(buckets, lengths, COSTS[name], longest) == pytest.approx(best, rel=1e-12)


def test_one_bucket_is_the_longest():
    assert choose_buckets([3, 4, 5], lambda n: n, 1, 32) == [32]


def test_the_longest_is_there_even_if_no_text_needs_it():
    """Training texts are short; a client's may not be."""
    buckets = choose_buckets([4] * 50, lambda n: n, 2, 64)
    assert buckets == [ROW_TILE, 64]


def test_of_equal_choices_it_takes_the_one_that_holds_more():
    """11 to 15 tokens cost the same in whole tiles, so the bucket that is asked for by texts of 11 takes those of 15 too."""
    assert choose_buckets([11] * 10 + [40] * 10, lambda n: n, 2, 40) == [15, 40]
    assert choose_buckets([6] * 10 + [11] * 10 + [40] * 10, lambda n: n * n, 3, 40) == [10, 15, 40]


def test_a_bucket_that_saves_nothing_is_left_out():
    for cost in COSTS.values():
        assert choose_buckets([32] * 9, cost, 4, 32) == [32]
    assert choose_buckets([31, 33, 35], lambda n: n, 4, 35) == [35], "they take the same tiles"
    for at_most in (3, 4, 8):
        buckets = choose_buckets([3] * 5 + [13] * 5 + [14] * 5, lambda n: n, at_most, 64)
        assert buckets == [5, 15, 64]


def test_texts_beyond_the_longest_are_cut_to_it():
    lengths = [3] * 10 + [12] * 10
    assert choose_buckets(lengths + [500] * 7, lambda n: n, 3, 20) == choose_buckets(lengths + [20] * 7, lambda n: n, 3, 20)
    assert choose_buckets([500, 900], lambda n: n, 3, 20)[-1] == 20


def test_more_buckets_never_cost_more():
    generator = np.random.default_rng(0)
    lengths = (3 + generator.poisson(9, 400)).tolist()
    costs = [expected_cost(choose_buckets(lengths, COSTS["convex"], k, 64), lengths, COSTS["convex"], 64) for k in range(1, 9)]
    assert costs == sorted(costs, reverse=True) and costs[3] < 0.5 * costs[0]


def test_it_takes_what_callers_have():
    """Lengths as an array, and the multiply-adds of a folded model as cost."""
    folded = fold(encoder("mobilebert"), LONGEST)
    lengths = np.random.default_rng(1).integers(1, LONGEST + 1, 200)
    buckets = choose_buckets(lengths, folded.multiply_adds, 3, LONGEST)
    assert all(isinstance(bucket, int) for bucket in buckets)
    cost = expected_cost(buckets, lengths.tolist(), folded.multiply_adds, LONGEST)
    assert cost == pytest.approx(best_by_trial(lengths.tolist(), folded.multiply_adds, 3, LONGEST))


@pytest.mark.parametrize(("lengths", "at_most"), [([], 3), (np.array([], int), 1), ([5], 0), ([5], -1)])
def test_nothing_to_choose_from_is_refused(lengths, at_most):
    with pytest.raises(ValueError, match=r"\d+ lengths and -?\d+ buckets: at least one of each is needed"):
        choose_buckets(lengths, lambda n: n, at_most, 16)
