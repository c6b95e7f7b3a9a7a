"""JSON that somebody else wrote: a value of the wrong type ends as an error with its place, whatever it is."""

from __future__ import annotations

import pytest

from runtimes.errors import IntegrityError
from runtimes.manifest import Table

VALUES = {
    "null": None, "true": True, "whole": 3, "negative": -3, "fraction": 0.5, "nan": float("nan"), "infinite": float("inf"), "text": "x", "empty": "",
    "list": [], "texts": ["a"], "wholes": [1, 2], "mixed": ["a", 1], "flags": [True], "table": {"a": 1}, "tables": [{}, {"b": 2}],
}  # fmt: skip
TAKEN = {
    "text": {"text", "empty"},
    "whole": {"whole"},
    "number": {"whole", "negative", "fraction"},
    "flag": {"true"},
    "texts": {"list", "texts"},
    "whole_numbers": {"list", "wholes"},
    "table": {"table"},
    "tables": {"list", "tables"},
    "any": set(VALUES),
}


@pytest.mark.parametrize("method", TAKEN)
@pytest.mark.parametrize("key", VALUES)
def test_every_method_takes_its_type_and_names_the_place_of_another(method, key):
    table = Table(VALUES, "file.json")
    if key in TAKEN[method]:
        getattr(table, method)(key)
    else:
        with pytest.raises(IntegrityError, match=rf"^file\.json: {key}(\[1\])?: .* is not a "if method != "number" and method != "flag" else key):
            getattr(table, method)(key)


@pytest.mark.parametrize("method", TAKEN)
def test_a_missing_key_is_named(method):
    with pytest.raises(IntegrityError, match=r"^file\.json: key is missing$"):
        getattr(Table({}, "file.json"), method)("key")


def test_defaults_stand_in_for_missing_keys_only():
    table = Table({"a": None}, "file.json")
    assert (table.text("b", "x"), table.whole("b", default=3), table.texts("b", ())) == ("x", 3, ())
    with pytest.raises(IntegrityError, match="a: None is not a text"):
        table.text("a", "x")


def test_choices_and_limits():
    table = Table({"a": "x", "n": 2}, "m")
    assert table.one_of("a", ("x", "y")) == "x" and table.whole("n", least=2) == 2
    with pytest.raises(IntegrityError, match="m: a: 'x' is not one of y, z"):
        table.one_of("a", ("y", "z"))
    with pytest.raises(IntegrityError, match="m: n: 2 is not a whole number of 3 or more"):
        table.whole("n", least=3)


def test_places_nest_and_long_values_are_shortened():
    table = Table({"task": {"x": "y" * 500}, "models": [{}, {"file": 1}]}, "bundle.json")
    with pytest.raises(IntegrityError, match=r"^bundle\.json: task: x: 'y{56}\.\.\. is not true or false$"):
        table.table("task").flag("x")
    with pytest.raises(IntegrityError, match=r"^bundle\.json: models\[2\]: file: 1 is not a text$"):
        table.tables("models")[1].text("file")
    with pytest.raises(IntegrityError, match=r"^bundle\.json: \[\] is not a table$"):
        Table([], "bundle.json")
