"""Tags of words -> spans.

Tags are BIO: ``B-X`` begins a span of type X, ``I-X`` goes on with it, ``O`` is outside. An ``I-X`` that follows no X begins a span, and so
does a bare ``X``, which otherwise goes on as ``I-X`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

OUTSIDE = "O"


def spans_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Spans as (type, first word, last word + 1), in order.

    >>> spans_of(["O", "B-PER", "I-PER", "B-PER", "I-LOC"])
    [('PER', 1, 3), ('PER', 3, 4), ('LOC', 4, 5)]
    """
    spans: list[tuple[str, int, int]] = []
    before = None
    for i, tag in enumerate(tags):
        begins, kind = _read(tag)
        if kind is not None and kind == before and not begins:
            spans[-1] = (kind, spans[-1][1], i + 1)
        elif kind is not None:
            spans.append((kind, i, i + 1))
        before = kind
    return spans


def _read(tag: str) -> tuple[bool, str | None]:
    """Whether a tag begins a span, and the type of the span; None outside."""
    if tag == OUTSIDE:
        return False, None
    return (tag[0] == "B", tag[2:]) if tag[:2] in ("B-", "I-") else (False, tag)
