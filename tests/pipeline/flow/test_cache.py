"""Shared work is verified and made again like stages; entries go one by one, by age and by size."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.flow.cache import Cache, digest
from runtimes.errors import BadInput

DAY_SECONDS = 86400


def fill(folder: Path) -> None:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights").write_bytes(bytes(1000))


@pytest.fixture
def made():
    """Counts how often the work was done."""
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    make.calls = calls
    return make


def test_shared_work_is_done_once(tmp_path, made):
    first, second = (Cache(tmp_path).shared("k", "work", made) for _ in range(2))
    assert first == second
    assert (first / "deep" / "weights").read_bytes() == bytes(1000)
    assert len(made.calls) == 1


def flip(folder: Path) -> None:
    (folder / "deep" / "weights").write_bytes(bytes(999) + b"\1")


DAMAGES = {
    "a flipped bit": flip,
    "a file gone": lambda folder: (folder / "deep" / "weights").unlink(),
    "a file more": lambda folder: (folder / "more").write_text("x"),
    "no record": lambda folder: (folder.parent / "record.json").unlink(),
    "half a record": lambda folder: (folder.parent / "record.json").write_text('{"stage": '),
    "a record that is a list": lambda folder: (folder.parent / "record.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_shared_work_is_done_again(tmp_path, made, damage):
    cache = Cache(tmp_path)
    damage(cache.shared("k", "work", made))
    again = cache.shared("k", "work", made)
    assert len(made.calls) == 2
    assert [p.relative_to(again).as_posix() for p in again.rglob("*") if p.is_file()] == ["deep/weights"]
    assert (again / "deep" / "weights").read_bytes() == bytes(1000)


def test_work_that_fails_leaves_nothing_that_is_believed(tmp_path, made):
    def half(folder: Path) -> None:
        fill(folder)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        Cache(tmp_path).shared("k", "work", half)
    Cache(tmp_path).shared("k", "work", made)
    assert len(made.calls) == 1


@pytest.fixture
def keys(tmp_path) -> list[str]:
    """Four entries of about 1 kB, last used 30, 20, 10 and 1 days ago."""
    cache, names = Cache(tmp_path), [digest(number) for number in range(4)]
    for key, days in zip(names, (30, 20, 10, 1), strict=True):
        record = cache.shared(key, "work", fill).parent / "record.json"
        os.utime(record, (time.time() - days * DAY_SECONDS,) * 2)
    return names


def remove(tmp_path, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["cache", "remove", *arguments, "--cache", str(tmp_path)])
    assert result.exit_code == code, result.output
    return result.output


def left(tmp_path) -> list[str]:
    listed = CliRunner().invoke(app, ["cache", "list", "--cache", str(tmp_path), "--json"])
    return [entry["key"] for entry in json.loads(listed.stdout)]


def test_entries_go_one_by_one_by_age_and_by_size(tmp_path, keys):
    assert left(tmp_path) == keys, "unused for longest first"
    assert "1 entries removed" in remove(tmp_path, keys[1][:12])
    assert left(tmp_path) == [keys[0], *keys[2:]]
    remove(tmp_path, "--older-than-days", "15")
    assert left(tmp_path) == keys[2:]
    remove(tmp_path, "--down-to-mb", "0.0015")
    assert left(tmp_path) == keys[3:]
    remove(tmp_path, "--down-to-mb", "0.0015")
    assert left(tmp_path) == keys[3:], "what fits stays"


def test_an_entry_that_is_used_is_young_again(tmp_path, keys, made):
    Cache(tmp_path).shared(keys[0], "work", made)
    assert not made.calls
    assert left(tmp_path) == [*keys[1:], keys[0]]


@pytest.mark.parametrize(("arguments", "said"), [((), "nothing is named"), (("zz",), "no key begins so"), (("",), "4 keys begin so")])
def test_what_cannot_be_removed_is_refused(tmp_path, keys, arguments, said):
    assert said in remove(tmp_path, *arguments, code=2)
    assert left(tmp_path) == keys


def test_a_damaged_record_is_listed_and_can_be_removed(tmp_path, keys):
    (tmp_path / "shared" / keys[0] / "record.json").write_text("{")
    assert keys[0] in left(tmp_path)
    remove(tmp_path, keys[0])
    assert keys[0] not in left(tmp_path)


def test_keys_are_no_paths(tmp_path, keys):
    with pytest.raises(BadInput, match="no key begins so"):
        Cache(tmp_path).find("../stages")
