"""Read JSON that somebody else wrote: every value is checked where it is read, and a wrong one is named with its place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from runtimes.errors import IntegrityError

_REQUIRED: Any = object()


class Table:
    """A JSON object and the place where it stands, as errors name it; a ``key`` without a default must be there.

    Raises:
        IntegrityError: from every method, and at once if ``raw`` is no object.
    """

    def __init__(self, raw: Any, place: str) -> None:
        if not isinstance(raw, dict):
            raise IntegrityError(f"{place}: {shown(raw)} is not a table")
        self.raw: dict[str, Any] = raw
        self.place = place

    def any(self, key: str) -> Any:
        return self._value(key, "there", lambda value: True, _REQUIRED)

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        return self._value(key, "a text", lambda value: isinstance(value, str), default)

    def one_of(self, key: str, known: Sequence[str], default: Any = _REQUIRED) -> str:
        return self._value(key, f"one of {', '.join(known)}", lambda value: value in known, default)

    def text_or_null(self, key: str, default: Any = _REQUIRED) -> str | None:
        return self._value(key, "a text or null", lambda value: value is None or isinstance(value, str), default)

    def whole(self, key: str, least: int = 0, most: int | None = None, default: Any = _REQUIRED) -> int:
        what = f"a whole number of {least} or more" if most is None else f"a whole number of {least} to {most}"
        return self._value(key, what, lambda value: _is_whole(value, least, most), default)

    def whole_or_null(self, key: str, most: int, default: Any = _REQUIRED) -> int | None:
        return self._value(key, f"a whole number of 0 to {most} or null", lambda value: value is None or _is_whole(value, 0, most), default)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        return self._value(key, "a finite number", is_finite, default)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        return self._value(key, "true or false", lambda value: type(value) is bool, default)

    def texts(self, key: str, default: Any = _REQUIRED) -> tuple[str, ...]:
        return tuple(self._value(key, "a list of texts", lambda value: _is_list_of(value, str), default))

    def whole_numbers(self, key: str, least: int | None = None, most: int | None = None, default: Any = _REQUIRED) -> list[int]:
        what = "a list of whole numbers" if most is None else f"a list of whole numbers of {least or 0} to {most}"
        return self._value(key, what, lambda value: _is_list_of(value, int) and all(_is_whole(one, least, most) for one in value), default)

    def table(self, key: str) -> Table:
        return Table(self.any(key), f"{self.place}: {key}")

    def tables(self, key: str) -> list[Table]:
        """A list of tables; errors count them from 1."""
        values = self._value(key, "a list of tables", lambda value: isinstance(value, list), _REQUIRED)
        return [Table(value, f"{self.place}: {key}[{number}]") for number, value in enumerate(values, start=1)]

    def _value(self, key: str, what: str, holds: Callable[[Any], bool], default: Any) -> Any:
        if key not in self.raw and default is not _REQUIRED:
            return default
        if key not in self.raw:
            raise IntegrityError(f"{self.place}: {key} is missing")
        value = self.raw[key]
        if not holds(value):
            raise IntegrityError(f"{self.place}: {key}: {shown(value)} is not {what}")
        return value


def _is_whole(value: Any, least: int | None, most: int | None) -> bool:
    return type(value) is int and (least is None or value >= least) and (most is None or value <= most)


def is_finite(value: Any) -> bool:
    """A number that float64 holds."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and all(type(one) is kind for one in value)


def shown(value: Any) -> str:
    """``value`` as a message has it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
