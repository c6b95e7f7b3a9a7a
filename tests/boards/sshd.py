"""Debian's OpenSSH server as a board on 127.0.0.1, and what can go wrong with one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from device_bench import debian
from tests.boards.board import Board, children, wait_until

CONFIGURATION = """
Port {port}
ListenAddress 127.0.0.1
HostKey /board/host_key
AuthorizedKeysFile /board/authorized_keys
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
"""
CLIENT_CONFIGURATION = """
Host board 127.0.0.1
  HostName 127.0.0.1
  Port {port}
  User root
  IdentityFile {folder}/client_key
  IdentitiesOnly yes
  StrictHostKeyChecking yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
"""


class Sshd:
    """A running server; ``ssh -F {config} board`` logs in as root, whose home /root is empty and in memory.

    Attributes:
        config: OpenSSH client configuration with a host ``board`` (and 127.0.0.1, for user@address:port).
        port: on 127.0.0.1.
        board: its root and processes; ``board.path("/root/x")`` is a file there.

    Args:
        folder: an empty folder for keys and logs.
        packages: root folder with openssh-server, as a :class:`device_bench.debian.PackageSet` gives it.
        memory: path on the board -> bytes of a file system in memory; ``/small`` has 4 MB for tests of a full disk.
        session_environment: variables that every session has, such as a PATH without python3.
    """

    def __init__(
        self, folder: Path, packages: Path, memory: Mapping[str, int] | None = None, session_environment: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.packages = packages
        self.config = folder / "ssh_config"
        self.port = free_port()
        self._memory = {"/root": 1 << 30, "/tmp": 1 << 30, "/run": 1 << 24, "/small": 4 << 20, **(memory or {})}
        self._starts = 0
        (folder / "keys").mkdir()
        self.config.write_text(CLIENT_CONFIGURATION.format(port=self.port, folder=folder))
        self._make_key(folder / "client_key")
        shutil.copy(folder / "client_key.pub", folder / "keys" / "authorized_keys")
        self._make_key(folder / "keys" / "host_key")
        self.trust_host_key()
        self._start(session_environment or {})

    def _start(self, session_environment: Mapping[str, str]) -> None:
        variables = "".join(f"SetEnv {name}={value}\n" for name, value in session_environment.items())
        (self.folder / "keys" / "sshd_config").write_text(CONFIGURATION.format(port=self.port) + variables)
        self._starts += 1
        folder = self.folder / f"start{self._starts}"
        folder.mkdir()
        libraries = debian.host_libraries(self.packages).name
        self.board = Board(
            folder,
            ["/bin/sh", "-c", "mkdir -p /run/sshd && exec /debian/usr/sbin/sshd -D -e -f /board/sshd_config"],
            shared={"/board": self.folder / "keys", "/debian": self.packages},
            memory=self._memory,
            network=False,
            passwd="root:x:0:0:root:/root:/bin/bash\nsshd:x:110:65534::/run/sshd:/usr/sbin/nologin\n",
            environment={"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": f"/debian/usr/lib/{libraries}"},
        )
        wait_until(lambda: accepts(self.port), f"sshd listens on {self.port}: {self.board.log.read_text()}")

    def restart(self, session_environment: Mapping[str, str] | None = None) -> None:
        """The board after a power failure: everything in memory is gone, too."""
        self.stop()
        self._start(session_environment or {})

    def stop(self) -> None:
        self.board.stop()

    def ssh(self, command: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(["ssh", "-F", str(self.config), "-o", "BatchMode=yes", "board", command], capture_output=True, **options)

    def trust_host_key(self) -> None:
        kind, key = (self.folder / "keys" / "host_key.pub").read_text().split()[:2]
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def forget_host_key(self) -> None:
        """The client has never seen this board."""
        (self.folder / "known_hosts").write_text("")

    def change_host_key(self) -> None:
        """As if another machine answered under the board's name."""
        self._make_key(self.folder / "keys" / "host_key")
        self.restart()

    def use_wrong_key(self) -> None:
        """The client shows a key that the board does not know."""
        self._make_key(self.folder / "client_key")

    def sessions(self) -> list[int]:
        """Process ids of the servers of the connections that are open."""
        (daemon,) = [pid for pid in children(self.board.pid) if b"sshd_config" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return children(daemon)

    def cut(self) -> int:
        """Kill the servers of all open connections, as a cable that is pulled ends them; returns how many. Commands run on."""
        sessions = self.sessions()
        for pid in sessions:
            for each in (*[c for c in children(pid) if _is_sshd(c)], pid):
                os.kill(each, signal.SIGKILL)
        return len(sessions)

    @staticmethod
    def _make_key(path: Path) -> None:
        for old in (path, path.with_name(path.name + ".pub")):
            old.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "board", "-f", str(path)], check=True)


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "sshd"
    except FileNotFoundError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
