"""The head of a model as data: what reads the last feature map, and what it gives."""

from __future__ import annotations

from typing import Any

HEAD_TOKENS = ("first", "all", "mean")


def head_shape(
    name: str, outputs: list[str], tokens: str, size: int | None, pooler: bool = False, normalized: bool = False
) -> dict[str, Any]:
    """One head, as it stands in a model's config.

    Args:
        name: of its module.
        outputs: names of what it gives, those of the hub. Where there are several, each is one row of the matrix.
        tokens: which it reads: the ``first``, ``all`` of them one by one, or their ``mean``.
        size: rows of its matrix; None for no matrix, so that the feature map itself is given.
        pooler: whether the encoder's dense layer comes before it.
        normalized: whether the result is divided by its length.
    """
    return {"name": name, "outputs": list(outputs), "tokens": tokens, "size": size, "pooler": pooler, "normalized": normalized}
