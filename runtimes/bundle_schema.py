"""The schema of ``bundle.json`` as far as it describes: what runs nothing here, but what clients read.

What a bundle needs to run is read, and thereby checked, in :mod:`runtimes.bundle`. The keys here may be left out, as older bundles do; where
they are there they have their type. Unknown keys are ignored. Written by hand, because a board has no library for it.
"""

from __future__ import annotations

from typing import Any

from runtimes.errors import IntegrityError
from runtimes.manifest import Table, is_finite
from runtimes.text import MOST_TOKENS, SPECIAL_TOKENS
from runtimes.tokenizer_structure import WIDEST_ID

HEX_SHA256 = 64
MOST_DEPTH = 8


def check_description(manifest: Table) -> None:
    """Check what describes the bundle as a whole.

    Raises:
        IntegrityError: naming the place of a value of another type.
    """
    for key in ("name", "checksums"):
        manifest.text(key, "")
    for key in ("generator", "provenance"):
        if key in manifest.raw:
            _check_texts(manifest.table(key))
    manifest.table("golden").whole("count", default=0)
    tokenizer = manifest.table("tokenizer")
    for key in ("type", "vocab_file"):
        tokenizer.text(key, "")
    for key in ("continuing_prefix",):
        tokenizer.text_or_null(key, None)
    for key in ("pad_id", "cls_id", "sep_id", "unk_id", "mask_id"):
        tokenizer.whole_or_null(key, WIDEST_ID, None)
    for key in ("max_word_characters", "separators_between_pair"):
        tokenizer.whole_or_null(key, MOST_TOKENS, None)
    for key in ("lowercase", "strip_accents", "split_cjk", "clean_text", "truncation_keeps_special_tokens"):
        tokenizer.flag(key, False)
    tokenizer.one_of("special_tokens_in_text", SPECIAL_TOKENS, SPECIAL_TOKENS[0])
    if "special_tokens" in tokenizer.raw:
        named = tokenizer.table("special_tokens")
        for token in named.raw:
            named.whole(token, most=WIDEST_ID)


def check_entry(entry: Table, labels: dict[str, tuple[str, ...]]) -> None:
    """Check what describes one model file.

    Args:
        labels: names of classes by output; a file with another number of classes does not fit them.

    Raises:
        IntegrityError: naming the place of a value of another type, or the output.
    """
    digest = entry.text("sha256", None)
    if digest is not None and not (len(digest) == HEX_SHA256 and set(digest) <= set("0123456789abcdef")):
        raise IntegrityError(f"{entry.place}: sha256: {digest[:70]!r} is not {HEX_SHA256} hexadecimal digits")
    for key in ("size_bytes", "unique_params"):
        entry.whole(key, default=0)
    for side in ("inputs", "outputs"):
        for tensor in entry.tables(side) if side in entry.raw else ():
            name, shape = tensor.text("name"), tensor.any("shape")
            tensor.text("dtype")
            if not isinstance(shape, list) or any(type(size) not in (int, str) or (type(size) is int and size < 0) for size in shape):
                raise IntegrityError(f"{tensor.place}: shape: {str(shape)[:60]} is not a list of whole numbers and names")
            if side == "outputs" and name in labels and shape and type(shape[-1]) is int and shape[-1] != len(labels[name]):
                raise IntegrityError(f"{tensor.place}: {name} has {shape[-1]} classes, and its file of labels names {len(labels[name])}")
    _check_values(entry.table("metrics").raw, f"{entry.place}: metrics")
    if "quantization" in entry.raw:
        _check_values(entry.table("quantization").raw, f"{entry.place}: quantization", texts=True)


def _check_texts(table: Table) -> None:
    """Texts, and tables of texts."""
    for key, value in table.raw.items():
        if isinstance(value, dict):
            _check_texts(table.table(key))
        else:
            table.text_or_null(key)


def _check_values(value: Any, place: str, texts: bool = False, depth: int = 0) -> None:
    """Tables, lists and finite numbers; also texts and true and false if ``texts``."""
    if depth > MOST_DEPTH:
        raise IntegrityError(f"{place}: nested more than {MOST_DEPTH} deep")
    if isinstance(value, dict):
        for key, one in value.items():
            _check_values(one, f"{place}: {key}", texts, depth + 1)
    elif isinstance(value, list) and texts:
        for number, one in enumerate(value, start=1):
            _check_values(one, f"{place}[{number}]", texts, depth + 1)
    elif not (value is None or is_finite(value) or (texts and type(value) in (str, bool))):
        raise IntegrityError(f"{place}: {str(value)[:60]} is not a finite number")

