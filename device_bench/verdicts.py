"""What a comparison found for one row, what a gate makes of it, and how it is told: plain table, Markdown, JUnit XML.

Instructions have a table of their own and are never shown as time. All functions are pure: the same comparisons give the same
text.

What this does not do: judge (``comparison.py`` does); write files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from xml.etree import ElementTree

from runtimes.errors import BadInput

NOTE = (
    "change: of what each text usually takes (lower quartile of its repeats), averaged over texts, with its 95 % interval; "
    "smaller changes than the floor are noise"
)


class Verdict(StrEnum):
    """In the order of a summary."""

    SLOWER = "slower"
    FASTER = "faster"
    NOT_SEEN = "no difference seen"
    MORE = "more instructions"
    FEWER = "fewer instructions"
    SAME = "same instructions"
    REFUSED = "not comparable"
    ONLY_FIRST = "only in the first"
    ONLY_SECOND = "only in the second"


@dataclass(frozen=True)
class Comparison:
    """One row of a document against its counterpart.

    Args:
        file: in the bundle.
        threads: None for instructions.
        case: "texts", "length" or "instructions".
        length: tokens of case "length", else None.
        base: p50 in milliseconds, or instructions per text, of the first; None where it has no such row.
        new: the same of the second.
        change: fraction by which the typical latency of a text (not p50; see ``latency_change.py``) or the instruction count
            changed; 0.1 is ten percent more. None where nothing was judged, as are the next three.
        low, high: its 95 % interval.
        floor: smaller changes are noise; 0 for instructions.
        reason: why nothing was judged.
        warnings: what may explain a difference.
        against: the file this one is compared with, if it is another one.
    """

    target: str
    file: str
    threads: int | None
    case: str
    length: int | None
    verdict: Verdict
    base: float | None = None
    new: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    reason: str = ""
    warnings: tuple[str, ...] = ()
    against: str = ""

    @property
    def emulated(self) -> bool:
        return self.case == "instructions"

    @property
    def setting(self) -> str:
        """What was measured: ``texts, 1 thread``, ``32 tokens, 2 threads`` or ``instructions``."""
        if self.emulated:
            return "instructions"
        return f"{'texts' if self.length is None else f'{self.length} tokens'}, {self.threads} thread{'s' * (self.threads != 1)}"

    @property
    def described(self) -> str:
        """The row and its verdict in one line."""
        told = self.verdict
        if self.change is not None and not self.emulated:
            told += f" ({_percent(self.change)}, {_interval(self)}; floor {_percent(self.floor, sign=False)})"
        elif self.change:
            told += f" ({_exact_percent(self.change)})"
        elif self.reason:
            told += f": {self.reason}"
        return f"{self.target}: {self.file}{f' against {self.against}' * bool(self.against)}, {self.setting}: {told}"


def gate(comparisons: Sequence[Comparison], max_regression: float) -> list[Comparison]:
    """Rows that are seen to be slower, by more than ``max_regression`` (0.05 is five percent); likewise with instructions."""
    if not 0 <= max_regression < math.inf:
        raise BadInput(f"max regression {max_regression:g}: must be zero or more")
    return [one for one in comparisons if one.verdict in (Verdict.SLOWER, Verdict.MORE) and one.change is not None and one.change > max_regression]


def ungated(comparisons: Sequence[Comparison], max_regression: float) -> list[Comparison]:
    """Rows that :func:`gate` cannot vouch for: not compared, or with a noise floor above ``max_regression``."""
    return [one for one in comparisons if one.change is None or (one.floor is not None and one.floor > max_regression)]


def as_table(comparisons: Sequence[Comparison]) -> str:
    """Aligned lines of plain text, then what was not judged, and warnings."""
    parts = []
    for header, rows in _tables(comparisons):
        grid = [header, *rows]
        widths = [max(len(row[i]) for row in grid) for i in range(len(header))]
        left = (*range(_names(comparisons)), len(header) - 1)
        cells = [[c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in grid]
        parts.append("\n".join("  ".join(row).rstrip() for row in cells))
    return "\n\n".join([*parts, "\n".join([summary(comparisons), *([NOTE] if _timed(comparisons) else []), *_remarks(comparisons)])])


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """The same for a pull request: the count of verdicts, tables with what differs in bold, notes."""
    parts = [summary(comparisons)]
    for header, rows in _tables(comparisons):
        rule = ["--" if i < _names(comparisons) or i == len(header) - 1 else "--:" for i in range(len(header))]
        bold = [[*row[:-1], f"**{row[-1]}**"] if row[-1] not in (Verdict.NOT_SEEN, Verdict.SAME) else row for row in rows]
        parts.append("\n".join(f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in (header, rule, *bold)))
    notes = [*([NOTE] if _timed(comparisons) else []), *_remarks(comparisons)]
    return "\n\n".join([*parts, "\n".join(f"- {_escaped(note)}" for note in notes)]) + "\n"


def as_junit(comparisons: Sequence[Comparison], max_regression: float) -> str:
    """JUnit XML with a test case per row: a failure where :func:`gate` fails it, skipped where nothing was judged."""
    failing = gate(comparisons, max_regression)
    skipped = sum(one.change is None for one in comparisons)
    counts = {"tests": str(len(comparisons)), "failures": str(len(failing)), "errors": "0", "skipped": str(skipped)}
    root = ElementTree.Element("testsuites", name="pocketbert compare", **counts)
    suite = ElementTree.SubElement(root, "testsuite", name="pocketbert compare", **counts)
    for one in comparisons:
        name = f"{one.file}{f' against {one.against}' * bool(one.against)}, {one.setting}"
        case = ElementTree.SubElement(suite, "testcase", classname=_printable(one.target), name=_printable(name))
        if one in failing:
            message = f"{one.described}; at most {_percent(max_regression, sign=False)} is allowed"
            ElementTree.SubElement(case, "failure", type=one.verdict, message=_printable(message))
        elif one.change is None:
            ElementTree.SubElement(case, "skipped", message=_printable(f"{one.verdict}: {one.reason}"))
        told = "\n".join([one.described, *one.warnings])
        ElementTree.SubElement(case, "system-out").text = _printable(told)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def summary(comparisons: Sequence[Comparison]) -> str:
    """How many rows got which verdict: ``1 slower, 3 no difference seen``."""
    counts = [(verdict, sum(one.verdict == verdict for one in comparisons)) for verdict in Verdict]
    return ", ".join(f"{count} {verdict}" for verdict, count in counts if count) or "nothing to compare"


def _tables(comparisons: Sequence[Comparison]) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows of text): first what was timed, then what was counted. Cells that say where come first, the verdict last."""
    against = any(one.against for one in comparisons)
    where = ["target", "file", *(["against"] if against else [])]
    timed = [[*_place(one, against), one.setting, _ms(one.base), _ms(one.new), *_judged(one), one.verdict] for one in _timed(comparisons)]
    counted = [
        [*_place(one, against), one.setting, _millions(one.base), _millions(one.new), _exact_percent(one.change), one.verdict]
        for one in comparisons if one.emulated
    ]  # fmt: skip
    first = "p50 ms of that" if against else "p50 ms before"
    headers = [*where, "measured", first, "p50 ms of this" if against else "p50 ms after", "change", "95 % interval", "floor", "verdict"]
    numbers = [*where, "emulated", "M before", "M after", "change", "verdict"]
    return [(header, rows) for header, rows in ((headers, timed), (numbers, counted)) if rows]


def _timed(comparisons: Sequence[Comparison]) -> list[Comparison]:
    return [one for one in comparisons if not one.emulated]


def _names(comparisons: Sequence[Comparison]) -> int:
    """Columns that hold names, not figures."""
    return 4 if any(one.against for one in comparisons) else 3


def _place(one: Comparison, against: bool) -> list[str]:
    return [_printable(cell) for cell in (one.target, one.file, *([one.against] if against else []))]


def _judged(one: Comparison) -> list[str]:
    return [_percent(one.change), _interval(one), _percent(one.floor, sign=False)]


def _remarks(comparisons: Sequence[Comparison]) -> list[str]:
    """What was not judged and why, and each warning of a target once, with the rows it belongs to if not all."""
    told = [one.described for one in comparisons if one.reason]
    for target in dict.fromkeys(one.target for one in comparisons):
        rows = [one for one in comparisons if one.target == target and one.change is not None]
        for warning in dict.fromkeys(warning for one in rows for warning in one.warnings):
            having = [one for one in rows if warning in one.warnings]
            whose = "" if len(having) == len(rows) else f" ({len(having)} of {len(rows)} rows)"
            told.append(f"{target}: {warning}{whose}")
    return [_printable(one) for one in told]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def _millions(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.3f}"


def _percent(value: float | None, sign: bool = True) -> str:
    return "-" if value is None else f"{100 * value + 0.0:{'+' if sign else ''}.1f} %"


def _exact_percent(value: float | None) -> str:
    """Counts repeat, so that the smallest difference is shown."""
    return "-" if value is None else "0 %" if value == 0 else f"{100 * value:+.3g} %"


def _interval(one: Comparison) -> str:
    return "-" if one.low is None or one.high is None else f"{_percent(one.low)[:-2]} to {_percent(one.high)}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _printable(text: str) -> str:
    """What a terminal and XML take: no control characters but line ends."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
