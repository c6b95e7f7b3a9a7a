"""Quantize, measure the file itself, and where it lost too much keep the worst tensors in float32 until it did not.

Each tensor's damage is measured alone: a file in which only that tensor is quantized, run on texts of the task. Then as few
of the worst as possible are kept. A file that cannot hold its floor with at most ``MAX_KEPT_SHARE`` of its weights in
float32 is refused.

Source of the ranking by one tensor at a time: Dong et al. 2019, HAWQ, arXiv:1905.03696 §4.3 orders layers by such a
sensitivity; here it is the measured change of the outputs and not an eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporters.golden import Results
from exporters.quant_plan import FLOAT32, QuantPlan
from runtimes.errors import GateFailed

MAX_KEPT_SHARE = 0.5
"""Share of the weights' bytes that may stay in float32; beyond it the file is not what was asked for."""


@dataclass(frozen=True)
class Damage:
    """What quantizing one tensor alone does: mean squared change of the outputs, and share of decisions that fall otherwise (per cent)."""

    name: str
    squared_change: float
    decided_otherwise: float


@dataclass(frozen=True)
class Outcome:
    """The plan that holds, the metric of its file and of the file with all tensors quantized, and the tensors kept in float32, worst first."""

    plan: QuantPlan
    score: float
    first_score: float
    kept: tuple[Damage, ...]
    ranking: tuple[Damage, ...]


def quantize_within(
    write: Callable[[QuantPlan, Path], None],
    path: Path,
    plan: QuantPlan,
    sizes: Mapping[str, int],
    outputs: Callable[[Path], Sequence[Results]],
    decide: Callable[[Results], np.ndarray],
    score: Callable[[Path], float],
    floor: float,
    say: Callable[[str], None],
) -> Outcome:
    """Write the file of ``plan`` to ``path``; if its score is below ``floor``, the file of the nearest plan that holds.

    Args:
        write: writes the file of a plan.
        sizes: bytes in float32 of every tensor that a plan can name.
        outputs: what a file gives for each of some probe texts, by name.
        decide: what is decided by the outputs of one text, integers; none for a task of numbers or vectors.
        score: the task's metric of a file; more is better.

    Raises:
        GateFailed: no choice holds; the file of the last try stays at ``path``.
    """
    write(plan, path)
    first = score(path)
    if first >= floor:
        return Outcome(plan, first, first, (), ())
    say(f"{path.name}: {first:.2f}, at least {floor:.2f} is needed; measuring what each tensor does")
    ranking = rank(write, path.with_name(f"probe_{path.name}"), plan, sizes, outputs, decide)
    tries: dict[int, float] = {0: first}

    def holds(count: int) -> bool:
        if count not in tries:
            write(plan.keeping(d.name for d in ranking[:count]), path)
            tries[count] = score(path)
            say(f"{path.name}: with the {count} worst in float32: {tries[count]:.2f}")
        return tries[count] >= floor

    total = sum(sizes.values())
    most = 0
    while most < len(ranking) and sum(sizes[d.name] for d in ranking[: most + 1]) <= MAX_KEPT_SHARE * total:
        most += 1
    low, high = 0, 1  # low never holds
    while high < most and not holds(high):
        low, high = high, high * 2
    high = min(high, most)
    if high == 0 or not holds(high):
        worst = ", ".join(f"{d.name} ({d.squared_change:.3g})" for d in ranking[:3])
        raise GateFailed(
            f"{path.name}: {tries[max(tries)]:.2f} with {max(tries)} of {len(ranking)} tensors in float32, {floor:.2f} is needed and no more than "
            f"{MAX_KEPT_SHARE:.0%} of the weights may stay; the most damage is done by {worst}. Allow a larger drop, or choose another scheme"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    final = plan.keeping(d.name for d in ranking[:high])
    write(final, path)  # the last try need not have been the best
    return Outcome(final, tries[high], first, tuple(ranking[:high]), tuple(ranking))


def rank(
    write: Callable[[QuantPlan, Path], None],
    path: Path,
    plan: QuantPlan,
    sizes: Mapping[str, int],
    outputs: Callable[[Path], Sequence[Results]],
    decide: Callable[[Results], np.ndarray],
) -> list[Damage]:
    """Damage of every tensor that ``plan`` quantizes, worst first. ``path`` is written and removed."""
    write(QuantPlan(FLOAT32), path)
    exact = outputs(path)
    decided = np.concatenate([decide(result) for result in exact])
    found = []
    for name in sizes:
        if plan.precision(name) == FLOAT32:
            continue
        write(plan.only(name), path)
        got = outputs(path)
        otherwise = np.concatenate([decide(result) for result in got]) != decided
        share = float(np.mean(otherwise)) if otherwise.size else 0.0
        found.append(Damage(name, _squared_change(got, exact), round(100 * share, 3)))
    path.unlink()
    return sorted(found, key=lambda d: (-d.squared_change, d.name))


def _squared_change(got: Sequence[Results], exact: Sequence[Results]) -> float:
    """Mean over the values of each output, then over the outputs, so that one with a result per token does not outvote the others."""
    means = []
    for name in exact[0]:
        changes = np.concatenate([(mine[name] - wanted[name]).ravel() for mine, wanted in zip(got, exact, strict=True)])
        means.append(float(np.mean(changes**2)))
    return float(np.mean(means))
