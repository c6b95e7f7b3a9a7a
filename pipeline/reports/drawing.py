"""What the pages have in common: how figures are written, how wide text is, axes with ticks, lines through points.

A page is one file without script, fonts or addresses, that opens from a mail, a zip or a board without network, prints, and
follows the reader's light or dark mode. Templates put the shapes of this module into SVG; plots are laid out twice, for desks
and for phones.

What this does not do: know what is drawn; measure text exactly (fonts differ, so that widths are upper bounds).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

import jinja2

WIDE, NARROW = 940, 360  # plot widths in pixels, for desks and for phones

Box = tuple[float, float, float, float]  # left, top, right, bottom
Point = tuple[float, float]


def render(template: str, view: dict[str, Any]) -> str:
    """The page of a template in this package, with every value escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reports", ""), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"fixed": fixed, "short": short, "score": score, "typeset": typeset}
    return environment.get_template(template).render(view)


# --- text ---------------------------------------------------------------------------------------------------------


def fixed(value: float | None, digits: int, divisor: float = 1, suffix: str = "") -> str:
    """A figure of a column: so many decimals, a dash where it is unknown."""
    return "-" if value is None else f"{value / divisor:.{digits}f}{suffix}"


def short(value: float) -> str:
    """A figure in a sentence, without false precision: 118, 90.5, 2.4, 0.241."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 3}f}"


def score(scores: dict[str, float] | None) -> str:
    """The task's primary metric with its name; a dash where the right answers are unknown."""
    return next((f"{name.replace('_', ' ')} {value:.2f}" for name, value in (scores or {}).items()), "-")


def typeset(text: str) -> str:
    """Figures as a page sets them: true minus, times sign, en dash for the unknown."""
    return "–" if text == "-" else re.sub(r"(?<=\d)x\b", "×", re.sub(r"(?<![\w.-])-(?=\d)", "−", text))


def text_width(text: str, size: float) -> float:
    """Pixels that a text needs at most in any usual sans-serif face."""
    known = dict.fromkeys("mwMW%@…", 1.05) | dict.fromkeys(" .,:;·'|ijl", 0.4)
    return size * sum(known.get(c, 1.05 if east_asian_width(c) in "WF" else 0.82 if c.isupper() else 0.66) for c in text)


def clip(text: str, size: float, room: float) -> str:
    """``text``, cut in the middle where it needs more than ``room`` pixels: names that look alike differ at their ends."""
    cuts = (text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :] for keep in range(len(text) - 1, -1, -1))
    return text if text_width(text, size) <= room else next(cut for cut in cuts if text_width(cut, size) <= room)


# --- axes and lines -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``; ``start`` is the larger one where up is more."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, position = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (position - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """(pixel, label) of round values, at most about ``most``."""
        values = log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)
        return [(self.at(value), f"{value:g}") for value in values]


def axis(values: Iterable[float], start: float, end: float, zero: bool = False, log: bool = False) -> Axis:
    """An axis that holds ``values`` (positive ones if ``log``) with a little room around; from 0 if ``zero``."""
    known = list(values)
    low, high = min(known), max(known)
    if log:
        return Axis(low / 1.08, high * 1.08, start, end, log=True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(0.0 if zero else low - room, high + room, start, end)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten with as many steps between them as fit; a linear scale's ticks where the axis is short of half a decade."""
    if high / low < 3:
        return linear_ticks(low, high, most)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [10.0**decade * step for decade in decades for step in steps if low <= 10.0**decade * step <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def lines(
    size: tuple[float, float], series: Sequence[tuple[int, Sequence[Point | None]]], titles: tuple[str, str],
    zero: tuple[bool, bool] = (False, False), log: tuple[bool, bool] = (False, False), x_values: Sequence[float] = (), dots: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Geometry of a line plot.

    Args:
        size: width and height in pixels.
        series: (number of its colour, points in order of x); None leaves a gap, because nothing was read there.
        titles: of the x and the y axis.
        zero, log: of the x and the y axis.
        x_values: where the x axis has its ticks, instead of round values.
        dots: mark the points.

    Returns:
        width, height, frame, x_ticks and y_ticks [(pixel, label)], titles, paths [(colour, SVG points)], dots [(colour, x, y)].
    """
    width, height = size
    frame = (48.0, 24.0, width - 10.0, height - 44.0)
    left, top, right, bottom = frame
    points = [point for _, each in series for point in each if point is not None]
    x = axis((p[0] for p in points), left, right, zero[0], log[0])
    y = axis((p[1] for p in points), bottom, top, zero[1], log[1])
    paths = []
    for colour, each in series:
        for piece in _pieces(each):
            paths.append((colour, " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in piece)))
    marks = [(colour, x.at(p[0]), y.at(p[1])) for colour, each in series for p in each if p is not None] if dots else []
    x_ticks = [(x.at(value), f"{value:g}") for value in x_values] if x_values else x.ticks(10 if width == WIDE else 5)
    return {
        "width": width, "height": height, "frame": frame, "titles": titles, "x_ticks": x_ticks, "y_ticks": y.ticks(7),
        "paths": paths, "dots": marks,
    }  # fmt: skip


def _pieces(points: Sequence[Point | None]) -> list[list[Point]]:
    """Runs of points without a gap."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [piece for piece in pieces if piece]
