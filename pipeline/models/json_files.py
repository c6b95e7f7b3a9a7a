"""Read the JSON files of a model folder that somebody else wrote: a damaged one is named, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtimes.errors import BadInput

CURE = "fetch the model again, or write it again with save_pretrained"


def read_text(path: Path) -> str:
    """The whole file as text.

    Raises:
        BadInput: not UTF-8, begun with a byte order mark, or unreadable.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"model {path}: not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; {CURE}") from error
    except OSError as error:
        raise BadInput(f"model {path}: cannot be read: {error.strerror}") from error
    if text.startswith("\ufeff"):
        raise BadInput(f"model {path}: begins with a byte order mark; save it as UTF-8 without one")
    return text


def read_table(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        BadInput: as :func:`read_text`, or no JSON, or JSON of another kind than an object.
    """
    text = read_text(path)
    if not text.strip():
        raise BadInput(f"model {path}: empty; {CURE}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"model {path}: not JSON: {error}; {CURE}") from error
    if not isinstance(content, dict):
        kinds = {list: "a list", str: "a text", type(None): "null"}
        raise BadInput(f"model {path}: holds {kinds.get(type(content), repr(content)[:40])} where an object {{...}} is needed; {CURE}")
    return content
