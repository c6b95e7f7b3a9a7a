"""Debian packages of any architecture, unpacked into the cache: no root, and nothing of the host's apt is touched.

apt-get resolves and downloads with a configuration, lists and a package database of its own (an empty one, so a package
comes with everything it depends on); tar unpacks. Signatures are checked with the host's Debian keyring.

What this does not do: run maintainer scripts, so alternatives, users and caches that those would make are not there;
choose newer packages once a set was unpacked; work without a Debian mirror. It connects to that mirror, so only commands
that set something up may call it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from device_bench import board_cache
from runtimes.errors import BadInput, TargetUnreachable

HOSTS = {"x86_64": "amd64", "aarch64": "arm64"}
MIRROR_VARIABLE = "POCKETBERT_DEBIAN_MIRROR"
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "tar": "tar"}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
LISTS_MAX_AGE_S = 3600.0
# Bookworm's files lie in /lib or in /usr/lib as their maintainers chose; in a real system the one is a link to the other.
MERGED_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64")
_APT_TIMEOUT_S = 1800.0
_QUOTED_CHARACTERS = 600


@dataclass(frozen=True)
class PackageSet:
    """The root of a file system with some packages and all they depend on (no recommendations).

    Args:
        names: their versions come from the last of ``suites``, what they depend on from the first if that will do.
        architecture: Debian's name of it: amd64, arm64, armhf.
        without: packages to leave out although something depends on them.
    """

    names: tuple[str, ...]
    architecture: str
    suites: tuple[str, ...] = ("bookworm",)
    without: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The root, unpacked or not."""
        recipe = {"names": self.names, "architecture": self.architecture, "suites": self.suites, "without": self.without, "version": 2}
        return board_cache.place(f"debian-{self.architecture}", recipe)

    def unpack(self, say: Callable[[str], None]) -> Path:
        """Make the root if it is not there: /bin, /lib and /sbin are links into /usr, and ``.packages`` has a line per package.

        Args:
            say: is told what is downloaded.

        Raises:
            BadInput: apt-get, dpkg-deb or a mirror's address is missing, or a suite has no such package.
            TargetUnreachable: the mirror does not answer.
        """
        return board_cache.build_once(self.folder, lambda root: self._build(root, say))

    def _build(self, root: Path, say: Callable[[str], None]) -> None:
        _check_tools()
        configuration = _private_apt(self.architecture, self.suites, say)
        with tempfile.TemporaryDirectory(prefix=".archives-", dir=board_cache.boards_folder()) as archives:
            say(f"downloading {', '.join(self.names)} ({self.architecture}, {self.suites[-1]})")
            packages = _download(self.names, self.suites[-1], configuration, Path(archives))
            _unpack_all([path for path in packages if path.name.split("_")[0] not in self.without], root)


def host_architecture() -> str:
    """Debian's name for the architecture of this machine.

    Raises:
        BadInput: it is none that this works on.
    """
    if sys.platform != "linux" or platform.machine() not in HOSTS:
        raise BadInput(f"emulators and boards of packages need Linux on {' or '.join(HOSTS)}; this is {sys.platform} on {platform.machine()}")
    return HOSTS[platform.machine()]


def host_libraries(root: Path) -> Path:
    """Folder of the libraries that programs of an unpacked ``root`` for this machine load; a root may hold those of other architectures too."""
    return root / "usr/lib" / f"{platform.machine()}-linux-gnu"


def find_mirror(etc_apt: Path = Path("/etc/apt")) -> str:
    """Address of the Debian mirror: of the environment variable, or the first one in the host's own sources.

    Raises:
        BadInput: there is none.
    """
    if explicit := os.environ.get(MIRROR_VARIABLE):
        return explicit
    for path in sorted([*etc_apt.glob("sources.list"), *etc_apt.glob("sources.list.d/*.list"), *etc_apt.glob("sources.list.d/*.sources")]):
        pattern = r"^\s*URIs:(.*)$" if path.suffix == ".sources" else r"^\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)"
        for addresses in re.findall(pattern, path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE):
            for address in addresses.split():
                if {"debian", "debian.list"} & set(urlsplit(address).path.split("/")):
                    return address
    raise BadInput(f"{etc_apt}: no Debian mirror among the sources; set {MIRROR_VARIABLE} to the address of one (http://HOST/debian)")


def _check_tools() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(dict.fromkeys(TOOLS[tool] for tool in missing))
        message = f"{', '.join(missing)} not found: guest systems are made of Debian packages; install {packages}, or set up on Debian or Ubuntu"
        raise BadInput(message)


def _private_apt(architecture: str, suites: Sequence[str], say: Callable[[str], None]) -> Path:
    """A configuration file for apt-get, with fresh lists of packages; one folder per mirror, architecture and suites."""
    mirror = find_mirror()
    folder = board_cache.place(f"apt-{architecture}", {"mirror": mirror, "suites": list(suites), "version": 1})
    configuration = folder / "apt.conf"
    with board_cache.lock(folder.name):
        if configuration.exists() and time.time() - configuration.stat().st_mtime < LISTS_MAX_AGE_S:
            return configuration
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("state/lists/partial", "cache"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        sources = "".join(f"deb {signed}{mirror} {suite} main\n" for suite in suites)
        (folder / "sources.list").write_text(sources, encoding="utf-8")
        unfinished = folder / "apt.conf.new"
        unfinished.write_text(_configuration(folder, architecture), encoding="utf-8")
        say(f"reading the lists of packages ({architecture}, {', '.join(suites)})")
        done = _apt(unfinished, "update")
        if done.returncode != 0:
            raise TargetUnreachable(f"{mirror}: the lists of {', '.join(suites)} cannot be read: {_said(done)}")
        os.replace(unfinished, configuration)
    return configuration


def _configuration(folder: Path, architecture: str) -> str:
    """Everything of the host's left out but proxies and how strict it is about dates; hooks of the host would clean *its* cache."""
    own = {
        "Dir::Etc::main": "/dev/null", "Dir::Etc::parts": "/dev/null", "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::sourcelist": f"{folder}/sources.list", "Dir::State": f"{folder}/state", "Dir::State::status": f"{folder}/status",
        "Dir::Cache": f"{folder}/cache", "APT::Architecture": architecture, "APT::Architectures": architecture,
        "APT::Install-Recommends": "0", "APT::Update::Error-Mode": "any", "APT::Sandbox::User": "root", "Acquire::Languages": "none",
        "Acquire::Retries": "3", "Acquire::GzipIndexes": "true", "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": "",
        "Debug::NoLocking": "1",
    }  # fmt: skip
    host = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    kept = re.findall(r'^Acquire::(?:https?|Check-[^ ]*|ForceIPv.)[^ ]* ".+";$', host, flags=re.MULTILINE | re.IGNORECASE)
    return "".join(f'{key} "{value}";\n' for key, value in own.items()) + "".join(f"{line}\n" for line in kept)


def _apt(configuration: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(["apt-get", "-qq", *arguments], env=environment, capture_output=True, text=True, timeout=_APT_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise TargetUnreachable(f"apt-get {arguments[0]}: no end within {_APT_TIMEOUT_S:g} s; try again") from error


def _download(names: Sequence[str], suite: str, configuration: Path, archives: Path) -> list[Path]:
    (archives / "partial").mkdir()
    arguments = ["install", "--yes", "--download-only", "-t", suite, "-o", f"Dir::Cache::archives={archives}", *names]
    done = _apt(configuration, *arguments)
    if done.returncode != 0:
        absent = re.search(r"Unable to locate package|has no installation candidate|unmet dependencies|held broken", done.stderr)
        kind = BadInput if absent else TargetUnreachable
        raise kind(f"{', '.join(names)}: cannot be downloaded from {suite}: {_said(done)}")
    return sorted(archives.glob("*.deb"))


def _unpack_all(packages: list[Path], root: Path) -> None:
    for name in MERGED_FOLDERS:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        command = ["tar", "-x", "-C", str(root), "--keep-directory-symlink", "--no-same-owner"]
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as content:
            done = subprocess.run(command, stdin=content.stdout, capture_output=True, text=True)
        if content.returncode != 0 or done.returncode != 0:
            raise BadInput(f"{package.name}: cannot be unpacked into {root}: {done.stderr.strip()[-_QUOTED_CHARACTERS:]}; is the disk full?")
    (root / ".packages").write_text("".join(f"{package.name}\n" for package in packages), encoding="utf-8")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stderr or done.stdout).split())[-_QUOTED_CHARACTERS:] or f"exit code {done.returncode}"
