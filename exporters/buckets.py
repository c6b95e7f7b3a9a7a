"""Choose the lengths that a TFLite file has signatures for, from the lengths of the task's own texts.

A text runs in the shortest bucket that holds it and pays for the padding. Given how often each length occurs and what a
bucket costs, the best K buckets are found exactly, by dynamic programming over the lengths (the one-dimensional k-median
problem; Wu 1991, Journal of Algorithms 12).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

ROW_TILE = 5
"""Rows that an 8-bit kernel computes together: XNNPACK's on x86 takes 5, so 11 to 15 tokens cost the same there
(``results/files.json``); those on ARM take 4 or 6, and multiples of 5 waste little on them."""


def choose_buckets(lengths: Sequence[int], cost: Callable[[int], float], at_most: int, longest: int) -> list[int]:
    """At most ``at_most`` lengths with the least expected cost, the last of them ``longest``; fewer where more save nothing.

    Args:
        lengths: of the task's texts in tokens; longer ones count as ``longest``.
        cost: of one text padded to so many tokens, in any unit.

    Raises:
        ValueError: no lengths, or no buckets to choose.
    """
    if not len(lengths) or at_most < 1:
        raise ValueError(f"{len(lengths)} lengths and {at_most} buckets: at least one of each is needed")
    counts = np.bincount(np.minimum(lengths, longest), minlength=longest + 1).astype(float)
    below = np.concatenate([[0.0], np.cumsum(counts)])  # below[n]: texts shorter than n
    tiled = [0.0] + [cost(-(-n // ROW_TILE) * ROW_TILE) for n in range(1, longest + 1)]
    best = [[0.0] + [below[n + 1] * tiled[n] for n in range(1, longest + 1)]]  # one bucket, n, for all texts up to n
    chosen: list[list[int]] = [[0] * (longest + 1)]
    for _ in range(1, at_most):
        row, previous = [0.0] * (longest + 1), [0] * (longest + 1)
        for n in range(1, longest + 1):
            totals = [best[-1][m] + (below[n + 1] - below[m + 1]) * tiled[n] for m in range(n)]
            # Of equal totals the longest bucket: it holds more texts for the same tiles.
            previous[n] = max(m for m in range(n) if totals[m] <= min(totals))
            row[n] = totals[previous[n]]
        best.append(row)
        chosen.append(previous)
    totals = [row[longest] for row in best]
    enough = totals.index(min(totals))  # a bucket that saves nothing would only make the file larger
    buckets, n = [], longest
    for previous in reversed(chosen[: enough + 1]):
        if n == 0:
            break
        buckets.append(n)
        n = previous[n]
    return sorted(buckets)
