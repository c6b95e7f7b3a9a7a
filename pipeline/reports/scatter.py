"""The plot of a run: bubbles over latency and the primary metric, each with a label of its own.

Points are dicts with ``name``, ``detail`` (a second line), ``kind`` (a colour of the page), ``ms``, ``value`` (of the metric) and
``size_mb``, which is the area. Up is better: the axis of a metric of which less is better falls upwards.

What this file does not do: know what a file or a task is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from pipeline.reports.drawing import WIDE, Box, clip, linear_ticks, text_width

TALLEST = 4000  # pixels that a plot may grow to for the sake of its labels
SMALLEST_REACH = 0.01  # of the best value: points that differ by less do not fill the plot


def scatter(points: list[dict[str, Any]], width: int, higher_is_better: bool = True) -> dict[str, Any]:
    """Bubbles over log latency and the metric. The plot grows taller until every label has a place of its own."""
    for height in range(400, TALLEST, 60):
        plot = _bubbles(points, width, height, higher_is_better)
        if place_labels(plot["points"], plot["frame"]):
            return plot
    place_labels(plot["points"], plot["frame"], crowded=True)
    return plot


def _bubbles(points: list[dict[str, Any]], width: int, height: int, higher_is_better: bool) -> dict[str, Any]:
    left, top, right, bottom = frame = (44.0, 24.0, width - 4.0, height - 44.0)
    largest = 34.0 if width == WIDE else 20.0
    inner_width, inner_height = right - left - 2 * largest - 16, bottom - top - 2 * largest - 16
    heaviest, room = max(p["size_mb"] for p in points), min(right - left - 16, 260)
    low, high = (math.log10(pick(p["ms"] for p in points)) for pick in (min, max))
    least, most = (pick(p["value"] for p in points) for pick in (min, max))
    decades, reach = max(high - low, math.log10(4)), max(most - least, SMALLEST_REACH * max(abs(least), abs(most)), 1e-6)

    def x_of(ms: float) -> float:
        return (left + right) / 2 + (math.log10(ms) - (low + high) / 2) / decades * inner_width

    def y_of(value: float) -> float:
        above = (value - (least + most) / 2) / reach * inner_height
        return (top + bottom) / 2 - (above if higher_is_better else -above)

    x_ticks = [10.0**e * s for e in range(math.floor(low) - 2, math.ceil(high) + 3) for s in ((1, 2, 5) if decades < 2 else (1,))]
    shown = reach * (bottom - top) / inner_height
    y_ticks, placed = linear_ticks((least + most - shown) / 2, (least + most + shown) / 2, 7), []
    for p in sorted(points, key=lambda p: -p["size_mb"]):
        name, detail = clip(p["name"], 13, room), clip(p["detail"], 11, room)
        placed.append(p | {
            "x": x_of(p["ms"]), "y": y_of(p["value"]), "r": max(2.5, largest * math.sqrt(p["size_mb"] / heaviest)),
            "label": name, "detail": detail, "label_width": max(text_width(name, 13), text_width(detail, 11)),
        })  # fmt: skip
    return {
        "width": width, "height": height, "frame": frame, "points": placed,
        "x_ticks": [(x_of(t), f"{t:g}") for t in x_ticks if left + 10 <= x_of(t) <= right - 10],
        "y_ticks": [(y_of(t), f"{t:g}") for t in y_ticks if abs(t) <= 100 and top + 6 <= y_of(t) <= bottom - 6],
    }  # fmt: skip


def place_labels(points: list[dict[str, Any]], frame: Box, crowded: bool = False) -> bool:
    """Give each point a label box inside ``frame`` that touches no bubble or label; False if one finds no room.

    ``crowded`` takes the nearest box for a label without room, whatever it touches.
    """
    taken = [(p["x"] - p["r"], p["y"] - p["r"], p["x"] + p["r"], p["y"] + p["r"]) for p in points]
    labels: list[Box] = []
    for p in reversed(points):
        free = [box for box in _spots(p, frame) if not any(overlap(box, t) for t in taken)]
        if not free and not crowded:
            return False
        free = free or list(_spots(p, frame))[:1]
        clear = (box for box in free if not any(overlap(dot, label) for dot in _leader(p, box) for label in labels))
        box = next(clear, free[0])
        line = _leader(p, box)
        labels, taken = [*labels, box], [*taken, box, *line]
        anchor = "end" if box[2] <= p["x"] else "start" if box[0] >= p["x"] else "middle"
        label_x = {"start": box[0], "end": box[2], "middle": (box[0] + box[2]) / 2}[anchor]
        p |= {"box": box, "anchor": anchor, "label_x": label_x, "leader": (*line[0][:2], *line[-1][:2]) if line else None}
    return True


def _spots(p: dict[str, Any], frame: Box, height: float = 30.0) -> Iterator[Box]:
    """Label boxes around the bubble that lie in the frame: beside it first, then further and further off."""
    for gap in range(5, int(frame[3]), 12):
        for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), *product((1, -1, 0.5, -0.5), (-1, 1)), (1, -0.5), (-1, -0.5)):
            x = p["x"] + across * (p["r"] + gap + p["label_width"] / 2)
            if down:  # above or below, a label may lean to the side that has room
                half = p["label_width"] / 2 + 3
                x = min(max(x, frame[0] + half), frame[2] - half)
            y = p["y"] + down * (p["r"] + gap + height / 2)
            box = (x - p["label_width"] / 2, y - height / 2, x + p["label_width"] / 2, y + height / 2)
            if box[0] > frame[0] + 2 and box[1] > frame[1] and box[2] < frame[2] - 2 and box[3] < frame[3] - 2:
                yield box


def _leader(p: dict[str, Any], box: Box) -> list[Box]:
    """Dots along the line from a bubble's edge to a label that is not right beside it."""
    dx, dy = min(max(p["x"], box[0]), box[2]) - p["x"], min(max(p["y"], box[1]), box[3]) - p["y"]
    distance = math.hypot(dx, dy)
    steps = [(p["r"] + (distance - p["r"] - 3) * i / 12) / distance for i in range(13)] if distance - p["r"] > 14 else []
    return [(p["x"] + dx * t, p["y"] + dy * t, p["x"] + dx * t, p["y"] + dy * t) for t in steps]


def overlap(a: Box, b: Box, gap: float = 2.0) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap
