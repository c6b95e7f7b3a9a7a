"""Names of targets and lab files: what they mean, and what is refused with the place and the key."""

from __future__ import annotations

import pytest

from device_bench.lab import Place, open_target, parse_places, read_lab
from device_bench.targets import LocalTarget
from runtimes.errors import BadInput


def test_names_with_commas():
    places = parse_places("local, ssh:pi@rpi5:2222,adb:R5CT,adb,qemu:cortex-a76")
    assert [place.kind for place in places] == ["local", "ssh", "adb", "adb", "qemu"]
    assert [place.address for place in places] == ["", "pi@rpi5:2222", "R5CT", "", "cortex-a76"]
    assert [place.label for place in places] == ["local", "ssh:pi@rpi5:2222", "adb:R5CT", "adb", "qemu:cortex-a76"]


def test_options_of_the_command_line_go_where_they_mean_something():
    board, here = parse_places("ssh:pi@rpi5,local", provision=True, memory_cap_mb=512.0, cores="big")
    assert (board.provision, board.memory_cap_mb, board.cores) == (True, None, "big")
    assert (here.provision, here.memory_cap_mb, here.cores) == (False, 512.0, "big")


def test_lab_file(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(
        '[[target]]\non = "ssh:pi@rpi5"\nname = "Pi 5"\nprovision = true\nthreads = [1, 4]\n'
        '[[target]]\non = "adb:R5CT"\ncores = "big"\nlibraries = ["a.aar", "b"]\n',
        encoding="utf-8",
    )
    assert parse_places(f"local,@{path}") == [
        Place("local"),
        Place("ssh:pi@rpi5", name="Pi 5", provision=True, threads=(1, 4)),
        Place("adb:R5CT", cores="big", libraries=("a.aar", "b")),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[target]]\non = "shh:pi@rpi5"', r"target\[1\]: on = 'shh:pi@rpi5' is no target; did you mean ssh"),
        ('[[target]]\non = "ssh:"', r"target\[1\]: ssh needs an address: ssh:USER@HOST"),
        ('[[target]]\non = "local"\n[[target]]\nname = "x"', r"target\[2\]: on = None is no target"),
        ('[[target]]\non = "local"\ncorse = "big"', r"unknown key 'corse'; did you mean 'cores'"),
        ('[[target]]\non = "local"\ncores = "fast"', "cores = 'fast' is nothing"),
        ('[[target]]\non = "local"\ncores = []', r"cores = \[\] is nothing"),
        ('[[target]]\non = "local"\nthreads = [1, "2"]', "threads = .* is nothing"),
        ('[[target]]\non = "local"\nmemory_cap_mb = -1', "memory_cap_mb = -1 is nothing"),
        ('[[target]]\non = "local"\nprovision = true', "provision means nothing for a target of kind local"),
        ('[[target]]\non = "ssh:a@b"\nprovision = "yes"', "provision = 'yes' is nothing"),
        ('[target]\non = "local"', r"has \[\[target\]\] tables and nothing else"),
        ("speed = 1", "nothing else; found 'speed'"),
        ("[[target", "cannot be read as a lab file"),
    ],
)
def test_lab_files_that_say_nothing_sensible(text, says, tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=says) as refused:
        read_lab(path)
    assert str(path) in str(refused.value)


def test_names_that_are_no_target(tmp_path):
    with pytest.raises(BadInput, match="on = 'rpi5' is no target"):
        parse_places("rpi5")
    with pytest.raises(BadInput, match="no target named"):
        parse_places(" , ")
    with pytest.raises(BadInput, match="local is named twice"):
        parse_places("local,local")
    with pytest.raises(BadInput, match="local has no address"):
        parse_places("local:0")
    with pytest.raises(BadInput, match=r"gone\.toml: cannot be read"):
        parse_places(f"@{tmp_path}/gone.toml")


def test_local_place_becomes_a_capped_target():
    target = open_target(Place("local", name="small", memory_cap_mb=64, deadline_s=5.0, python="/usr/bin/python3"))
    assert target == LocalTarget("small", deadline_s=5.0, python="/usr/bin/python3", memory_cap_bytes=64_000_000)
