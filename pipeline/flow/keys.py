"""The keys of a table of the recipe, read from the source of its class, so that a misspelt one is told before torch is imported.

Only names are looked at, those of nested tables included; values are checked by the classes themselves once they are imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache

from pipeline.flow.code import parsed

Keys = dict[str, "Keys | None"]
"""Name of a key -> the keys of the table that it takes, None for a plain value."""


@lru_cache
def keys_of(module: str, name: str) -> Keys | None:
    """Keys of the pydantic class ``name``, in the order of its fields; None for anything else."""
    found = _find(module, name)
    if found is None:
        return {} if (module, name) == ("pydantic", "BaseModel") else None
    module, node = found
    keys: Keys = {}
    is_table = False
    for base in node.bases:
        inherited = keys_of(*_origin(module, base.id)) if isinstance(base, ast.Name) else None
        if inherited is not None:
            is_table = True
            keys |= inherited
    if not is_table:
        return None
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and not _is_class_variable(statement.annotation):
            nested = [keys_of(*_origin(module, part)) for part in _alternatives(statement.annotation)]
            keys[statement.target.id] = next((one for one in nested if one is not None), None)
    return keys


def first_unknown(table: dict[str, object], keys: Keys) -> tuple[tuple[str, ...], list[str]] | None:
    """Path of the first key that ``keys`` does not have, and the names that it could have; None where all are known."""
    for name, value in table.items():
        if name not in keys:
            return (name,), list(keys)
        nested = keys[name]
        if nested is not None and isinstance(value, dict) and (unknown := first_unknown(value, nested)) is not None:
            return (name, *unknown[0]), unknown[1]
    return None


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    body = parsed(module).body
    return next(((module, node) for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _origin(module: str, name: str) -> tuple[str, str]:
    """Where ``name`` of ``module`` is defined."""
    for node in parsed(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return node.module, alias.name
    return module, name


def _alternatives(annotation: ast.expr) -> Iterator[str]:
    """Names that stand alone in an annotation, such as both of ``Healing | None``."""
    if isinstance(annotation, ast.Name):
        yield annotation.id
    elif isinstance(annotation, ast.BinOp):
        yield from _alternatives(annotation.left)
        yield from _alternatives(annotation.right)


def _is_class_variable(annotation: ast.expr) -> bool:
    base = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return isinstance(base, ast.Name) and base.id == "ClassVar"
