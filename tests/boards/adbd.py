"""Android's own adbd as a phone, in a network of its own: it listens on every address and asks nobody for a password."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from socket import AF_INET, SOCK_DGRAM, socket

from device_bench import debian
from tests.boards.board import Board, die_with_the_tests, wait_until
from tests.boards.sshd import accepts

PHONE_PORT, SERVER_PORT = 5655, 5037
PIXEL_8 = {
    "ro.product.manufacturer": "Google", "ro.product.model": "Pixel 8", "ro.soc.manufacturer": "Google", "ro.soc.model": "Tensor G3",
    "ro.board.platform": "zuma", "ro.product.cpu.abi": "arm64-v8a", "ro.product.cpu.abilist": "arm64-v8a", "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
}  # fmt: skip
# What a shell finds on a phone (toybox and mksh); no Python, no bash, no GNU long options to rely on.
PHONE_COMMANDS = (
    "awk base64 basename cat chmod chown cksum cmp comm cp cut date dd df diff dirname dmesg du echo env expr false find flock free getconf "
    "grep groups gunzip gzip head hostname id ionice kill killall ln ls lsof md5sum mkdir mkfifo mktemp more mount mv nice nl nohup nproc od "
    "paste pgrep pidof pkill printenv printf ps pwd readlink realpath renice rm rmdir sed seq setsid sh sha1sum sha256sum sleep sort split stat "
    "strings sync tail tar taskset tee test time timeout touch tr true truncate uname uniq unlink uptime vmstat wc which whoami xargs"
).split()
GETPROP = """#!/bin/sh
if [ $# -eq 0 ]; then sed 's/^\\([^=]*\\)=\\(.*\\)$/[\\1]: [\\2]/' /board/properties; else sed -n "s/^$1=//p" /board/properties | grep . || echo; fi
"""
# In the layout of Android 14; the totals are those of the process as its kernel gives them.
DUMPSYS = """#!/bin/sh
case "$1" in
meminfo)
  test -r "/proc/$2/smaps_rollup" || { echo "No process found for: $2"; exit 0; }
  pss=$(sed -n 's/^Pss: *\\([0-9]*\\) kB/\\1/p' "/proc/$2/smaps_rollup"); rss=$(sed -n 's/^Rss: *\\([0-9]*\\) kB/\\1/p' "/proc/$2/smaps_rollup")
  echo "Applications Memory Usage (in Kilobytes):"
  echo "Uptime: 86400000 Realtime: 86400000"
  echo "** MEMINFO in pid $2 [native] **"
  echo "                   Pss  Private  Private  SwapPss      Rss     Heap     Heap     Heap"
  echo "                 Total    Dirty    Clean    Dirty    Total     Size    Alloc     Free"
  echo "                ------   ------   ------   ------   ------   ------   ------   ------"
  echo "  Native Heap     4096     4000        0        0     4400     6144     5100     1043"
  echo " App Summary"
  echo "                       Pss(KB)                        Rss(KB)"
  printf '           TOTAL PSS: %8s            TOTAL RSS: %8s      TOTAL SWAP PSS:        0\\n' "$pss" "$rss" ;;
battery)
  printf 'Current Battery Service state:\\n  AC powered: false\\n  USB powered: true\\n  status: 2\\n  level: 87\\n  scale: 100\\n'
  printf '  voltage: 4213\\n  temperature: 291\\n  technology: Li-ion\\n' ;;
thermalservice)
  printf 'IsStatusOverride: false\\nThermalEventListeners:\\nThermal Status: 0\\nCurrent temperatures from HAL:\\n'
  printf '\\tTemperature{mValue=31.4, mType=3, mName=VIRTUAL-SKIN, mStatus=0}\\n' ;;
*) echo "Can't find service: $1" >&2; exit 1 ;;
esac
"""


class AdbServer:
    """An ADB server with keys of its own; programs that speak to ``port`` find no other's phones.

    Args:
        folder: for the program, its keys and its log.
        packages: root folder with adb, as a :class:`device_bench.debian.PackageSet` gives it.
    """

    def __init__(self, folder: Path, packages: Path, port: int) -> None:
        self.port = port
        self.program = folder / "adb"
        self._log = folder / "adb-server.log"
        (folder / "adb-home").mkdir()
        libraries = debian.host_libraries(packages)
        self.program.write_text(
            f"#!/bin/sh\nexport LD_LIBRARY_PATH={libraries}:{libraries}/android HOME={folder}/adb-home ADB_MDNS=0\n"
            f'exec {packages}/usr/lib/android-sdk/platform-tools/adb -P {port} "$@"\n'
        )
        self.program.chmod(0o755)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it if it does not run."""
        if self._process is not None and self._process.poll() is None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.program, "server", "nodaemon"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_the_tests
            )
        wait_until(lambda: accepts(self.port), "the ADB server listens")

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """``adb ARGUMENTS``."""
        return subprocess.run([self.program, *arguments], capture_output=True, **options)

    def connect(self, serial: str) -> bool:
        self.start()
        return "connected to" in self.run("connect", serial, text=True).stdout

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @contextmanager
    def found_by_default(self) -> Iterator[None]:
        """Programs that are not told which server to use meet this one."""
        variables = {"ADBUTILS_ADB_PATH": str(self.program), "ANDROID_ADB_SERVER_PORT": str(self.port), "ANDROID_SERIAL": None}
        before = {name: os.environ.get(name) for name in variables}
        _set_environment(variables)
        try:
            yield
        finally:
            _set_environment(before)


class Phone:
    """A running adbd and an ADB server, both reachable only :meth:`inside` the phone's network.

    A phone's shell: /system/bin alone in PATH, with ``getprop`` and ``dumpsys`` that answer like a Pixel 8; work goes to
    /data/local/tmp, which is in memory.

    Attributes:
        serial: 127.0.0.1:5655, connected to the server.
        board: its root and processes; ``board.path("/data/local/tmp/x")`` is a file there.
        adb: the server.

    Args:
        folder: an empty folder for keys and logs.
        packages: root folder with adbd and adb, as a :class:`device_bench.debian.PackageSet` gives it.
        properties: replace those of :data:`PIXEL_8`; None leaves one out.
        memory: path on the phone -> bytes of its file system in memory.
    """

    def __init__(
        self, folder: Path, packages: Path, properties: Mapping[str, str | None] | None = None, memory: Mapping[str, int] | None = None
    ) -> None:
        self.serial = f"127.0.0.1:{PHONE_PORT}"
        libraries = debian.host_libraries(packages).name
        (folder / "system").mkdir()
        (folder / "files").mkdir()
        values = {**PIXEL_8, **(properties or {})}
        (folder / "files" / "properties").write_text("".join(f"{k}={v}\n" for k, v in values.items() if v is not None))
        _write_commands(folder / "system")
        self.board = Board(
            folder,
            ["/debian/usr/lib/android-sdk/platform-tools/adbd", "--device_banner=device"],
            shared={"/debian": packages, "/system/bin": folder / "system", "/board": folder / "files"},
            memory={"/data/local/tmp": 1 << 30, "/tmp": 1 << 24, **(memory or {})},
            network=True,
            passwd="root:x:0:0:root:/:/system/bin/sh\nshell:x:2000:2000:shell:/:/system/bin/sh\n",
            environment={
                "PATH": os.environ["PATH"], "HOME": "/", "ADBD_PORT": str(PHONE_PORT),
                "LD_LIBRARY_PATH": f"/debian/usr/lib/{libraries}:/debian/usr/lib/{libraries}/android",
            },
            daemon_path="/system/bin",
        )  # fmt: skip
        self.adb = AdbServer(folder, packages, SERVER_PORT)
        with self.inside():
            _bring_up_loopback()
            wait_until(lambda: accepts(PHONE_PORT), f"adbd listens: {self.board.log.read_text()}")
            assert self.connect()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The thread, and what it starts meanwhile, sees the phone's network; ADB programs find the server and no other's keys."""
        with self.adb.found_by_default(), self.board.inside():
            yield

    def run_adb(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """``adb ARGUMENTS``; call it :meth:`inside`."""
        return self.adb.run(*arguments, **options)

    def connect(self) -> bool:
        """Make the server see the phone (again), and start the server if need be; call it :meth:`inside`."""
        return self.adb.connect(self.serial)

    def unplug(self) -> None:
        """The phone goes away: adbd and all it started end."""
        self.board.stop()

    def stop(self) -> None:
        self.adb.stop()
        self.board.stop()


def _write_commands(folder: Path) -> None:
    for name in PHONE_COMMANDS:
        found = next((path for path in (Path("/usr/bin") / name, Path("/usr/sbin") / name) if path.exists()), None)
        if found is not None:
            (folder / name).symlink_to(found)
    for name, script in {"getprop": GETPROP, "dumpsys": DUMPSYS}.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _bring_up_loopback() -> None:
    set_flags, up_and_loopback = 0x8914, 0x1 | 0x8
    with socket(AF_INET, SOCK_DGRAM) as any_socket:
        ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", up_and_loopback))
