"""How much latency changed between two measurements of the same texts, how sure that is, and what is mere noise.

Samples come in rounds (a fresh process each), and within a round the same texts run over and over in the same order. The
statistic is built for what disturbs a measurement:

* *Per text.* A median over all samples lies between two clusters wherever texts fall into two buckets of nearly equal share,
  and jumps. So every text is compared with itself, and the logarithms of the ratios are averaged: every text counts the same,
  and a change that only long texts feel still shows.
* *Lower quartile of a text's repeats in a round, and of the rounds.* Interrupts, other processes and throttled clocks only
  ever add time (Chen and Revels 2016, "Robust benchmarking in noisy environments", arXiv:1608.04295), so the truth lies at the
  low end. They take the minimum; one lucky sample decides that, so we take the quartile, which holds while a quarter of the
  samples are undisturbed. On a loaded two-core machine its difference between two runs of one file had a standard deviation
  of 1.6 and 2.2 % for two files, that of the median of all samples 3.4 and 2.4 %, that of the mean 28 and 31 %.
* *Hierarchical bootstrap* for the interval (Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time"): rounds are
  drawn anew, then texts, the same texts on both sides. Few rounds make bootstrap intervals too short; they are widened as in
  Hesterberg 2015, "What teachers should know about the bootstrap", section 3.3, by Student's t over the normal quantile and
  sqrt(n / (n - 1)).
* *Noise floor.* Rounds that follow each other share the state of the machine, so the interval alone takes every other A/A
  comparison of two documents for a difference. The floor is what two runs of one file may differ by.

What this does not do: say anything about tails (p90, p99), or about a slow-down that meets fewer than three in four of a text's
repeats; correct for a machine that is slower today than yesterday by more than the floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
QUARTILE = 0.25
CHUNK = 4_000_000
"""Most numbers that one step of the bootstrap holds at once."""

BETWEEN_RUNS = 0.03
"""Least floor between two documents: rounds can agree perfectly in an hour in which the machine is 3 % slower."""
DRIFT = 3.0
"""Standard deviations between rounds that are added to it, as independent errors add.

Both chosen on runs of two files, a minute apart, on a two-core machine beside a training: of 76 A/A comparisons 73 said no
difference, of 78 slow-downs of 10 % that were planted all were found. ``benchmarks/comparison.py`` measures it on a quiet one.
"""
WITHIN_RUN = 0.01
"""Least floor in one document, whose rounds were taken in turns."""


@dataclass(frozen=True)
class Change:
    """Of b against a, as fractions: 0.1 is ten percent slower. ``low`` and ``high`` bound it with 95 % confidence."""

    change: float
    low: float
    high: float


def typical(rounds: Sequence[Sequence[float]], texts: int) -> np.ndarray:
    """Logarithm of what each text usually takes in each round, float [R, texts].

    Args:
        rounds: positive samples of each round in the order they were taken; sample i is of text i modulo ``texts``. A last
            pass over the texts that is not complete is left out.

    Raises:
        ValueError: a round that is shorter than ``texts``.
    """
    rows = []
    for samples in rounds:
        passes = len(samples) // texts
        if not passes:
            raise ValueError(f"a round of {len(samples)} samples for {texts} texts")
        grid = np.log(np.asarray(samples[: passes * texts], dtype=float)).reshape(passes, texts)
        rows.append(np.quantile(grid, QUARTILE, axis=0))
    return np.stack(rows)


def location(rounds: np.ndarray) -> float:
    """Logarithm of the typical latency in [R, T]: the lower quartile of each text's rounds, averaged over texts."""
    return float(_over_rounds(rounds[None]).mean())


def relative_change(a: np.ndarray, b: np.ndarray, paired: bool = False, seed: int = 0) -> Change:
    """From ``a`` to ``b``, both as :func:`typical` gives them, [R, T] and [S, T], two rounds or more each.

    Args:
        paired: round r of ``a`` and of ``b`` were taken one after the other, so that what disturbs one disturbs both.

    Raises:
        ValueError: shapes that do not go together, or fewer than two rounds.
    """
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2 or (paired and len(a) != len(b)):
        raise ValueError(f"rounds and texts {a.shape} and {b.shape} cannot be compared")
    estimate = location(b) - location(a)
    low, high = np.quantile(np.concatenate(list(_resampled(a, b, paired, seed))), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    least = min(len(a), len(b))
    quantile = (1 + CONFIDENCE) / 2
    wider = student_quantile(quantile, len(a) + len(b) - 2) / NormalDist().inv_cdf(quantile) * math.sqrt(least / (least - 1))
    bounds = (estimate, estimate + wider * min(0.0, low - estimate), estimate + wider * max(0.0, high - estimate))
    return Change(*(math.expm1(value) for value in bounds))


def spread(*runs: np.ndarray) -> float:
    """Standard deviation between the rounds of one run, from one or more runs [R, T] of two rounds or more.

    Deviations from the median round of their run are pooled, and the quarter of them that is largest is left out, because a wild
    round tells about itself alone; 1.85 makes up for both (normal noise, 3 to 8 rounds in each of two runs).
    """
    deviations = []
    for rounds in runs:
        shifts = np.median(rounds - _over_rounds(rounds[None]), axis=1)
        deviations += list(np.abs(shifts - np.median(shifts)))
    kept = np.sort(deviations)[: len(deviations) - max(1, len(deviations) // 4)]
    return 1.85 * math.sqrt(np.mean(kept**2))


def floor_between_runs(a: np.ndarray, b: np.ndarray, repeats: Sequence[float], least: float = BETWEEN_RUNS) -> float:
    """What two runs of one file may differ by 19 times in 20, as a fraction: from the spread of their rounds and from A/A runs.

    Args:
        repeats: changes from a file to itself, measured twice in one run.
        least: the floor where rounds agree perfectly.
    """
    return max(math.expm1(math.hypot(math.log1p(least), DRIFT * spread(a, b))), floor_within_run(repeats, 0.0))


def floor_within_run(repeats: Sequence[float], least: float = WITHIN_RUN) -> float:
    """What one file may differ by from itself in the same rounds: twice the root mean square of how much it did."""
    return max(least, 2 * math.sqrt(sum(value**2 for value in repeats) / len(repeats))) if repeats else least


def student_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with ``freedom`` degrees stays under with ``probability`` of 0.5 to 1."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return low


def _student_cdf(value: float, freedom: int) -> float:
    """Abramowitz and Stegun 26.7.3 and 26.7.4, for value >= 0."""
    angle = math.atan2(value, math.sqrt(freedom))
    cosine_squared = math.cos(angle) ** 2
    odd = freedom % 2
    term = total = 1.0 if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom, 2):
        term *= cosine_squared * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside * math.cos(angle))
    return (1 + inside) / 2


def _over_rounds(values: np.ndarray) -> np.ndarray:
    """Lower quartile over the rounds of [N, R, T], text by text: [N, T]."""
    return np.quantile(values, QUARTILE, axis=1)


def _resampled(a: np.ndarray, b: np.ndarray, paired: bool, seed: int) -> Iterator[np.ndarray]:
    """The estimate from rounds and texts drawn anew, [RESAMPLES] in pieces."""
    generator = np.random.default_rng(seed)
    texts = a.shape[1]
    drawn_a, which_a = _draw_rounds(len(a), generator)
    drawn_b, which_b = (drawn_a, which_a) if paired else _draw_rounds(len(b), generator)
    locations_a, locations_b = _locations(a, drawn_a), _locations(b, drawn_b)
    size = max(1, CHUNK // texts)
    for start in range(0, RESAMPLES, size):
        piece = slice(start, min(start + size, RESAMPLES))
        # How often each text was drawn; the same texts for both sides.
        weights = generator.multinomial(texts, np.full(texts, 1 / texts), size=piece.stop - piece.start) / texts
        yield ((locations_b[which_b[piece]] - locations_a[which_a[piece]]) * weights).sum(axis=1)


def _draw_rounds(rounds: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(the different sets of rounds that were drawn [U, R], which of them each resample has [RESAMPLES]).

    Five rounds can be drawn in 126 ways only, so that the quartile of each way is computed once.
    """
    draws = np.sort(generator.integers(rounds, size=(RESAMPLES, rounds)), axis=1)
    ways, which = np.unique(draws, axis=0, return_inverse=True)
    return ways, which.reshape(-1)


def _locations(values: np.ndarray, ways: np.ndarray) -> np.ndarray:
    """Lower quartile of each set of rounds, [U, T]."""
    size = max(1, CHUNK // values.size)
    return np.concatenate([_over_rounds(values[ways[start : start + size]]) for start in range(0, len(ways), size)])
