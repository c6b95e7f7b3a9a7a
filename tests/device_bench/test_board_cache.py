"""The cache of boards: built once, whole or not at all, by one process at a time."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from device_bench import board_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("POCKETBERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "boards"


def write(content: str):
    def build(folder: Path) -> None:
        (folder / "file").write_text(content, encoding="utf-8")

    return build


def test_other_recipes_lie_elsewhere(cache):
    one, other = board_cache.place("thing", {"a": 1}), board_cache.place("thing", {"a": 2})
    assert one != other
    assert one == board_cache.place("thing", {"a": 1})
    assert one.parent == other.parent == cache
    assert one.name.startswith("thing-")


def test_built_at_the_first_call_only():
    folder = board_cache.place("thing", 1)
    assert board_cache.build_once(folder, write("first")) == folder
    assert board_cache.build_once(folder, write("second")) == folder
    assert (folder / "file").read_text(encoding="utf-8") == "first"
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_build_that_fails_leaves_nothing(cache):
    folder = board_cache.place("thing", 1)

    def build(staging: Path) -> None:
        (staging / "half").touch()
        assert not folder.exists()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        board_cache.build_once(folder, build)
    assert [path.name for path in cache.iterdir()] == ["locks"]
    board_cache.build_once(folder, write("whole"))
    assert (folder / "file").exists()


def test_what_a_killed_build_left_is_removed(cache):
    folder = board_cache.place("thing", 1)
    left, of_another = cache / f".building-{folder.name}-x1", cache / ".building-other-0123-x1"
    for path in (left, of_another):
        path.mkdir(parents=True)
    board_cache.build_once(folder, write("whole"))
    assert not left.exists()
    assert of_another.exists()


def build_slowly(number: int, folder: Path) -> None:
    def build(staging: Path) -> None:
        time.sleep(0.3)
        (staging / "file").write_text(str(number), encoding="utf-8")
        with (folder.parent / "builds").open("a", encoding="utf-8") as log:
            log.write(f"{number}\n")

    board_cache.build_once(folder, build)


def test_two_processes_build_once(cache):
    cache.mkdir(parents=True)
    folder = board_cache.place("thing", 1)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=build_slowly, args=(number, folder)) for number in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (cache / "builds").read_text(encoding="utf-8").splitlines() == [(folder / "file").read_text(encoding="utf-8")]


def test_clear_tells_what_it_freed(cache):
    assert board_cache.clear() == 0
    folder = board_cache.build_once(board_cache.place("thing", 1), write("12345"))
    (folder / "link").symlink_to("/usr")
    assert board_cache.clear() >= 5
    assert not cache.exists()
    assert Path("/usr").exists()
