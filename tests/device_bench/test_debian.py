"""Debian packages without a mirror: where one is found, and what is said when something is missing. The rest is in tests/boards."""

from __future__ import annotations

import os
import shutil

import pytest

from device_bench import debian
from runtimes.errors import BadInput, TargetUnreachable

PACKAGES = debian.PackageSet(("hostname",), "arm64")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(debian.MIRROR_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("name", "content", "mirror"),
    [
        ("sources.list", "# deb http://old/debian x main\ndeb http://mirror.example/debian bookworm main\n", "http://mirror.example/debian"),
        ("sources.list.d/a.list", "deb [arch=amd64 signed-by=/k] https://m.example/x/debian/ trixie main\n", "https://m.example/x/debian/"),
        ("sources.list.d/debian.sources", "Types: deb\n# URIs: no\nURIs: http://m.example/debian\nSuites: bookworm\n", "http://m.example/debian"),
        ("sources.list.d/cloud.sources", "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/debian.list\n", "mirror+file:///etc/apt/mirrors/debian.list"),
        ("sources.list.d/two.sources", "URIs: http://other.example/tools http://m.example/debian\n", "http://m.example/debian"),
        ("sources.list.d/dated.sources", "URIs: http://s.example/archive/debian/20250520T000000Z\n", "http://s.example/archive/debian/20250520T000000Z"),
    ],
)  # fmt: skip
def test_mirror_is_the_hosts_own(tmp_path, name, content, mirror):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "vendor.list").write_text("deb https://vendor.example/debian-security/ stable main\n", encoding="utf-8")
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert debian.find_mirror(tmp_path) == mirror


def test_mirror_can_be_named(monkeypatch, tmp_path):
    with pytest.raises(BadInput, match=r"no Debian mirror among the sources; set POCKETBERT_DEBIAN_MIRROR"):
        debian.find_mirror(tmp_path)
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://mirror.example/debian")
    assert debian.find_mirror(tmp_path) == "http://mirror.example/debian"


def test_missing_tools_are_named_with_their_packages(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match=r"apt-get, dpkg-deb, tar not found: .*install apt dpkg tar"):
        PACKAGES.unpack(print)
    assert not PACKAGES.folder.exists()


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get, which speaks to the mirror")
def test_mirror_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setenv(debian.MIRROR_VARIABLE, "http://127.0.0.1:9/debian")
    said = []
    with pytest.raises(TargetUnreachable, match=r"http://127\.0\.0\.1:9/debian: the lists of bookworm cannot be read: .*127\.0\.0\.1"):
        PACKAGES.unpack(said.append)
    assert said == ["reading the lists of packages (arm64, bookworm)"]
    assert not PACKAGES.folder.exists()
    assert not [name for name in os.listdir(tmp_path / "cache" / "boards") if name.startswith(".")]


def test_each_set_lies_in_a_place_of_its_own():
    others = [
        debian.PackageSet(("hostname",), "armhf"), debian.PackageSet(("dash",), "arm64"), debian.PackageSet(("hostname",), "arm64", ("trixie",)),
        debian.PackageSet(("hostname",), "arm64", without=("libc6",)),
    ]  # fmt: skip
    assert len({packages.folder for packages in (PACKAGES, *others)}) == 5


def test_the_libraries_are_those_of_this_machine_whatever_else_a_root_holds(tmp_path):
    for triplet in ("aarch64-linux-gnu", "arm-linux-gnueabihf", "x86_64-linux-gnu"):  # of a cross compiler, beside the host's own
        (tmp_path / "usr/lib" / triplet).mkdir(parents=True)
    found = debian.host_libraries(tmp_path)
    assert found.is_dir() and debian.HOSTS[found.name.removesuffix("-linux-gnu")] == debian.host_architecture()
