"""One connection of the system's OpenSSH client to a board, with a folder there that is gone whenever the connection is.

The first session of the connection is the *lease*: a small shell there makes the folder, says where it is, and waits for the
end of its standard input. That end comes when we close it, when this process dies, and when the connection breaks; then the
shell kills what still runs in the folder and removes it. Every other command is a session of the same connection, started
in ``work`` of that folder.

The user's configuration, keys, agents, jump hosts and host-key checks apply. ``POCKETBERT_SSH`` replaces the command, as in
``POCKETBERT_SSH="ssh -F lab_config"``; options given there come first, and ssh takes the first of two.

What this does not do: ask for a password or accept a host key (nobody may be there to answer); reconnect; run on Windows,
whose ssh shares no connections.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from device_bench.targets.base import Finished, quoted
from runtimes.errors import BadInput, PocketbertError, TargetUnreachable

COMMAND_VARIABLE = "POCKETBERT_SSH"
CONNECT_TIMEOUT_S = 20.0
LEASE_TIMEOUT_S = 90.0
"""Jump hosts, key agents and a slow board's first shell come on top of the connection."""
STOP_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 30.0
# A socket's address holds about 100 characters, and ssh adds 17 of its own while it makes one.
SOCKET_PARENT = "/tmp" if os.path.isdir("/tmp") else None
FAILED = 255
"""Exit code of ssh itself; a command's own is passed on."""
NO_FOLDER = 73

# A user's configuration of this host may ask for a terminal, a command or forwardings, which are not for us.
SHARED = ("-T", "-a", "-x", "-o", "BatchMode=yes", "-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes")
MASTER = (
    "-o", "ControlMaster=yes", "-o", "ControlPersist=no", "-o", "LogLevel=INFO", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S:.0f}",
    "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3",
)  # fmt: skip
# Without the master's socket, ssh would quietly open a connection of its own: it gets a way that leads nowhere.
SESSION = ("-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-o", "LogLevel=ERROR")

# POSIX, as small boards have it (busybox, dash). ``/proc/N/cwd -ef`` finds whoever works in a folder, whatever its parents were.
# The pulse makes a kernel there notice a peer that vanished without a word: unanswered data ends a connection in a quarter
# of an hour, silence after two hours. A folder belongs to a living session while the shell in its name works in it; of
# others, only what a lease makes is deleted, and ``pulse`` goes last, because it tells such a folder from a user's own.
LEASE = """
umask 077
LC_ALL=C; export LC_ALL
cache=${XDG_CACHE_HOME:-$HOME/.cache}/pocketbert/board
end() {
  for round in 1 2 3 4 5; do
    found=
    for process in /proc/[0-9]*; do
      if [ "$process/cwd" -ef "$1" ] && kill -9 "${process#/proc/}"; then found=yes; fi
    done
    [ "$found" ] || break
  done 2>/dev/null
}
remove() {
  mv "$1/work" "$1/ended"
  for part in work ended pulse; do end "$1/$part"; done
  for round in 1 2 3; do rm -rf "$1/work" "$1/ended" "$cache/.new-${1##*/}" && rm -rf "$1" && break; done
} 2>/dev/null
clear() {
  shell=${1##*/pocketbert-lease-}; shell=${shell%%-*}
  if [ -d "$1/pulse" ]; then [ "/proc/$shell/cwd" -ef "$1" ] || remove "$1"; else [ -d "/proc/$shell" ] || rmdir "$1"; fi
} 2>/dev/null
cd -- "$1" > /dev/null && parent=$(pwd -P) || exit 73
for old in "$parent"/pocketbert-lease-[0-9]*-*; do
  if [ -d "$old" ] && [ -O "$old" ]; then clear "$old"; fi
done
folder=$(mktemp -d "$parent/pocketbert-lease-$$-XXXXXX") && cd "$folder" || exit 73
trap 'cd /; remove "$folder"' EXIT
trap 'exit 1' HUP INT TERM PIPE
mkdir work pulse || exit 73
(cd pulse && while sleep 60; do echo; done) &
printf 'pocketbert-lease\\n%s\\npocketbert-ready\\n' "$folder"
while read -r order; do
  end "$folder/work"
  echo pocketbert-ended
done
"""
# The command is not the shell's last one, or the shell would become it, and ssh does not tell which signal ended a command.
# Runtimes leave files behind: onnxruntime 1.31 a database for its telemetry, as soon as it is imported.
IN_FOLDER = 'cd "$1" || exit 73; TMPDIR=$1 ORT_DISABLE_TELEMETRY=1; export TMPDIR ORT_DISABLE_TELEMETRY; shift; "$@"; exit $?'


@dataclass(frozen=True)
class Address:
    """``user@host:port`` as the options and the destination of ssh."""

    destination: str
    port: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Of "host", "user@host", "user@host:2222", "user@[::1]:2222"; a host may be a name of the user's configuration.

        Raises:
            BadInput: it is nothing of that kind.
        """
        user, at, place = text.rpartition("@")
        match = re.fullmatch(r"(?:\[([^][\s]+)\]|([^][:\s]+))(?::([0-9]{1,5}))?", place)
        # A leading dash would be an option of ssh.
        if match is None or text.startswith("-") or re.search(r"\s", user) or (at and not user):
            raise BadInput(f"ssh:{text}: no address; write ssh:USER@HOST or ssh:USER@HOST:PORT, an IPv6 address as [::1]")
        return cls(user + at + (match[1] or match[2]), match[3])

    @property
    def arguments(self) -> list[str]:
        return [*([] if self.port is None else ["-p", self.port]), self.destination]


class Connection:
    """See the module's text; :meth:`open` it, and :meth:`close` it whatever happens.

    Args:
        name: of the board, in messages.
        parent: folder there in which the lease makes its own; a relative one starts at the user's home.
    """

    def __init__(self, name: str, address: Address, parent: str) -> None:
        self._name = name
        self._address = address
        self._parent = parent
        self._ssh: list[str] = []
        self._sockets = ""
        self._master: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._heard = b""
        self._closing = threading.Lock()
        self.folder = ""
        """That of the lease; "" until :meth:`open` returned."""

    def open(self) -> str:
        """Connect and take the lease; the work folder there.

        Raises:
            BadInput: this machine has no ssh, or its configuration cannot be read.
            TargetUnreachable: why, and what to do.
        """
        self._ssh = ssh_command()
        self._sockets = _socket_folder()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close(); no pipe, which would have to be read all the time
        self._heard, self.folder = b"", ""
        lease = login_line(["/bin/sh", "-c", LEASE, "pocketbert-lease", self._parent])
        self._master = subprocess.Popen(
            [*self._ssh, "-S", f"{self._sockets}/s", *MASTER, *SHARED, *self._address.arguments, lease],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0, start_new_session=True,
        )  # fmt: skip
        said = self._hear(self._master, b"pocketbert-ready\n", LEASE_TIMEOUT_S)
        if said is None:
            raise self._refusal()
        chatter, _, folder = said.rpartition(b"pocketbert-lease\n")
        if chatter:
            start = chatter.decode(errors="replace").strip()[:80]
            message = f"{self._name}: its login shell prints {start!r} before every command, which spoils all answers; "
            raise TargetUnreachable(f"{message}make it silent where no terminal is (~/.bashrc, ~/.profile, /etc/profile.d)")
        self.folder = os.fsdecode(folder[:-1])
        return self.folder + "/work"

    def _refusal(self) -> PocketbertError:
        """Why there is no lease; the master has ended, or is silent."""
        code = self._master.poll()
        if code is None:
            return TargetUnreachable(f"{self._name}: connected, but no shell within {LEASE_TIMEOUT_S:g} s; is the board overloaded?")
        said = self._said()
        if code == FAILED:
            return explain(self._name, said, self._ssh, self._address)
        if code == NO_FOLDER:
            return TargetUnreachable(f"{self._name}: no work folder can be made in {self._parent}: {last_line(said)}; name another: work_folder")
        heard = last_line(said) or last_line(self._heard.decode(errors="replace"))
        return TargetUnreachable(f"{self._name}: the login gives no shell that runs commands: exit code {code}, {heard!r}")

    def run(
        self, arguments: list[str], timeout_s: float, doing: str, stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.PIPE,
    ) -> Finished:  # fmt: skip
        """Run a command in the work folder, each argument as it is.

        Args:
            doing: what this is for, in messages: "sending model.onnx".

        Raises:
            TargetUnreachable: the connection is closed or lost, or no end within ``timeout_s``; what was started is killed.
        """
        if self._master is None:
            raise TargetUnreachable(f"{self._name}: {doing}: the connection is closed")
        line = login_line(["/bin/sh", "-c", IN_FOLDER, "pocketbert", self.folder + "/work", *arguments])
        command = [*self._ssh, "-S", f"{self._sockets}/s", *SESSION, *SHARED, *self._address.arguments, line]
        with subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, start_new_session=True) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                ended = self.end_commands()
                process.kill()
                after = "it was killed there" if ended else "the connection was given up, and with it what runs there"
                raise TargetUnreachable(f"{self._name}: {doing}: no end within {timeout_s:g} s; {after}") from error
            except BaseException:  # Ctrl-C does not reach the child's session by itself; the lease ends what it started
                process.kill()
                raise
        stderr = err.decode(errors="replace")
        if process.returncode == FAILED:
            if self._is_lost():
                raise TargetUnreachable(f"{self._name}: the connection was lost while {doing} ({self._why_lost()}); the board cleans up; try again")
            if "Session open refused" in stderr:
                message = f"{self._name}: it allows only one session per connection; set MaxSessions 4 in its sshd_config"
                raise TargetUnreachable(message)
        return Finished(_signed(process.returncode), (out or b"").decode(errors="replace"), stderr)

    def end_commands(self) -> bool:
        """Kill all that runs in the work folder there; whether the lease has said that it is done. If not, close."""
        master = self._master
        with contextlib.suppress(OSError, ValueError):  # a broken pipe, or closed meanwhile
            if master is not None:
                master.stdin.write(b"end\n")
                if self._hear(master, b"pocketbert-ended\n", STOP_TIMEOUT_S) is not None:
                    return True
        self.close()
        return False

    def close(self) -> None:
        """Give the lease back and wait until the folder is gone; harmless when repeated, and from another thread."""
        with self._closing:
            master, self._master = self._master, None
        if master is None:
            return
        master.stdin.close()
        if not self.folder:
            master.kill()
        try:
            master.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # a dead link; the lease there ends by itself
            master.kill()
            master.wait()
        master.stdout.close()
        self._log.close()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _is_lost(self) -> bool:
        master = self._master
        try:
            return master is None or master.wait(2.0) is not None
        except subprocess.TimeoutExpired:
            return False

    def _why_lost(self) -> str:
        with self._closing:
            return "it was closed here" if self._master is None else last_line(self._said()) or "closed there"

    def _said(self) -> str:
        """What ssh wrote on its standard error so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _hear(self, master: subprocess.Popen[bytes], line: bytes, timeout_s: float) -> bytes | None:
        """What the lease wrote before ``line``; None if it ended or was silent too long."""
        output, deadline = master.stdout, time.monotonic() + timeout_s
        while line not in self._heard:
            ready = select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]
            new = os.read(output.fileno(), 65536) if ready else b""
            if not new:
                if ready:  # its end: the exit code follows
                    self._is_lost()
                return None
            self._heard += new
        before, _, self._heard = self._heard.partition(line)
        return before


def ssh_command() -> list[str]:
    """The ssh of this machine, or what the environment names instead.

    Raises:
        BadInput: there is none.
    """
    text = os.environ.get(COMMAND_VARIABLE) or "ssh"
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{COMMAND_VARIABLE}={text}: no command: {error}") from error
    if not command or shutil.which(command[0]) is None:
        what = f"{COMMAND_VARIABLE}={text}: no such program" if COMMAND_VARIABLE in os.environ else "ssh: no such program here"
        raise BadInput(f"{what}; install OpenSSH's client (openssh-client)")
    return command


def _socket_folder() -> str:
    """A private folder; those that killed processes left are removed, now that nothing is in them."""
    prefix = "pocketbert-ssh-"
    for left in Path(SOCKET_PARENT or tempfile.gettempdir()).glob(prefix + "*"):
        with contextlib.suppress(OSError):  # in use, or somebody else's
            if time.time() - left.stat().st_mtime > 3600:
                left.rmdir()
    return tempfile.mkdtemp(prefix=prefix, dir=SOCKET_PARENT)


def login_line(arguments: list[str]) -> str:
    """A line that any login shell, be it bash, fish or csh, runs as exactly these arguments.

    Only /bin/sh sees their quotes; the login shell sees one quoted word of letters, digits and octal numbers.
    """
    plain = set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 _./:=,+-")
    escaped = "".join(chr(byte) if byte in plain else f"\\0{byte:03o}" for byte in os.fsencode(quoted(arguments)))
    return f'exec /bin/sh -c \'eval "exec $(printf %b "{escaped}")"\''


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


# What ssh says, what that means, and what to do; the first that is found counts.
_MISCONFIGURED = re.compile("Bad configuration option|Can't open user config|Bad owner or permissions|[Uu]nsupported option|bad configuration option")
_CAUSES = (
    ("HOST IDENTIFICATION HAS CHANGED", "its host key has changed: another machine, a new system on it, or somebody in between",
     "if you know why, forget the old key ({forget}) and connect once by hand: {by_hand}"),
    ("Host key verification failed|No .* host key is known", "its host key is unknown here", "connect once by hand and accept it: {by_hand}"),
    ("Permission denied|Too many authentication failures|No supported authentication", "it lets none of your keys in",
     "try by hand: {by_hand}; a password cannot be asked for here, so give it a key (ssh-copy-id) or unlock yours (ssh-add)"),
    ("Could not resolve hostname", "no machine of this name is known", "check the name and this machine's network"),
    ("Connection refused", "nothing listens there", "check that sshd runs there, and the port"),
    ("No route to host|Network is unreachable", "no way leads there", "check that it is on, and this machine's network"),
    ("[Tt]imed out|not responding", "no answer in time", "check that it is on, and that a firewall lets you through"),
    ("Connection (closed|reset)|Broken pipe", "it closed the connection before the login was through",
     "look at the log of its sshd, or try by hand: {by_hand}"),
)  # fmt: skip


def explain(name: str, stderr: str, ssh: list[str], address: Address) -> PocketbertError:
    """What it means that ssh could not connect, out of its own words."""
    lines = [line.strip("@ \t") for line in stderr.splitlines()]
    if wrong := next(filter(_MISCONFIGURED.search, lines), None):
        return BadInput(f"{name}: ssh cannot be used as it is configured here: {wrong}")
    by_hand = shlex.join([*ssh, *address.arguments])
    forget = next((line for line in lines if line.startswith("ssh-keygen -f")), "ssh-keygen -R HOST")
    for pattern, what, advice in _CAUSES:
        if line := next(filter(re.compile(pattern).search, lines), None):
            return TargetUnreachable(f"{name}: {what} ({line.removeprefix('ssh: ')}); {advice.format(by_hand=by_hand, forget=forget)}")
    return TargetUnreachable(f"{name}: ssh cannot connect: {last_line(stderr) or 'it does not say why'}; try by hand: {by_hand}")


def _signed(exit_code: int) -> int:
    """A shell's exit code, negative where it means a signal."""
    return 128 - exit_code if exit_code - 128 in signal.valid_signals() else exit_code
