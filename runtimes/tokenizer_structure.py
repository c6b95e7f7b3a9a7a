"""Whether a tokenizer.json is one that can be loaded and used in bounded time and memory, checked before the library sees it.

What is refused: a file of more than 64 MB; token ids that int32 does not hold; rules that make a long text of a short one, each replacement
doubling what the one before it made; a template that adds a long row of special tokens to every text; words of any length for a search that
takes the square of it.

What this file does not do: judge regular expressions; :mod:`runtimes.verify` runs the tokenizer in a process with a time limit first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtimes.errors import IntegrityError

MOST_BYTES = 64 * 2**20
WIDEST_ID = 2**31 - 1
"""TFLite files take int32."""
MOST_GROWTH = 1000
"""Characters that the normalizer may make of one."""
MOST_TEMPLATE_PIECES = 64
MOST_WORD_CHARACTERS = 10_000
"""BERT has 100."""


def check_tokenizer(path: Path) -> None:
    """Read the structure of ``path``.

    Raises:
        IntegrityError: naming what is wrong with it.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise IntegrityError(f"{path}: not a tokenizer file: {size / 2**20:.0f} MB, more than {MOST_BYTES // 2**20}")
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not a tokenizer file: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise IntegrityError(f"{path}: not a tokenizer file: it has no model")
    try:
        problem = next(_problems(state), None)
    except RecursionError:
        problem = "its parts are nested too deep"
    if problem is not None:
        raise IntegrityError(f"{path}: {problem}")


def _problems(state: dict[str, Any]) -> Iterator[str]:
    model = state["model"]
    vocabulary = model.get("vocab")
    ids: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = state.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    wrong = next((number for number in ids if type(number) is not int or not 0 <= number <= WIDEST_ID), None)
    if ids and (wrong is not None or None in ids):
        yield f"the token id {str(wrong)[:40]} is not a whole number of 0 to {WIDEST_ID}"
    longest = model.get("max_input_chars_per_word", 0)
    if type(longest) is int and longest > MOST_WORD_CHARACTERS:
        yield f"model: max_input_chars_per_word: {str(longest)[:40]}; words of up to {MOST_WORD_CHARACTERS} characters are searched"
    growth = 1
    for part in _parts(state.get("normalizer"), "normalizers"):
        content = part.get("content")
        if part.get("type") == "Replace" and isinstance(content, str):
            growth *= max(1, len(content))
        if growth > MOST_GROWTH:
            yield f"normalizer: its replacements make more than {MOST_GROWTH} characters of one"
            break
    for part in _parts(state.get("post_processor"), "processors"):
        for key in ("single", "pair"):
            pieces = part.get(key)
            if isinstance(pieces, list) and len(pieces) > MOST_TEMPLATE_PIECES:
                yield f"post_processor: {key}: {len(pieces)} pieces; at most {MOST_TEMPLATE_PIECES} are taken"
        special = part.get("special_tokens")
        for token in special.values() if isinstance(special, dict) else ():
            numbers = token.get("ids") if isinstance(token, dict) else None
            few = isinstance(numbers, list) and len(numbers) <= MOST_TEMPLATE_PIECES
            if not few or any(type(number) is not int or not 0 <= number <= WIDEST_ID for number in numbers):
                yield f"post_processor: special_tokens: ids {str(numbers)[:40]} are not a few whole numbers of 0 to {WIDEST_ID}"


def _parts(part: Any, key: str) -> Iterator[dict[str, Any]]:
    """A normalizer or processor, and those that a sequence is made of."""
    if isinstance(part, dict):
        yield part
        for one in part.get(key) if isinstance(part.get(key), list) else ():
            yield from _parts(one, key)
