"""The wire to an Android phone: the ADB server, which phone, commands with their streams apart, files.

Through ``adbutils`` for the server's protocol; the two protocols inside it that a measurement leans on (shell v2, sync) are
spoken here, because a command's standard input must stay open while it runs, and a full disk must be told in the phone's words.

What this does not do: know of jobs, folders or runners (``adb.py`` does); authorise; answer without a server (it starts one).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from device_bench.targets.base import Finished
from runtimes.errors import BadInput, TargetUnreachable

DEFAULT_PORT = 5037
_ANSWER_TIMEOUT_S = 15.0
_STALL_TIMEOUT_S = 60.0
"""A file transfer in which nothing moved for so long is given up."""
_SETTLE_S = 5.0
_CHUNK_BYTES = 64 * 1024  # the most that a sync packet may hold
_STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = 1, 2, 3, 4
_PASSING_STATES = ("offline", "authorizing", "connecting")
_STATES = {
    "unauthorized": "unlock the phone, confirm there that this computer may debug it, and run again",
    "authorizing": "unlock the phone, confirm there that this computer may debug it, and run again",
    "connecting": "wait a moment and run again",
    "offline": "unplug it and plug it in again (or `adb reconnect offline`), and run again",
    "no permissions": "this user may not open its USB device: install your system's udev rules for Android (Debian: "
    "android-sdk-platform-tools-common), join its group (plugdev), `adb kill-server`, and plug the phone in again",
}


# --- the server and its phones ------------------------------------------------------------------------------------


def server_address() -> tuple[str, int]:
    """Host and port of the ADB server, by the variables that adb itself and adbutils read.

    Raises:
        BadInput: one of them is no address.
    """
    address = os.environ.get("ADB_SERVER_SOCKET", "")
    host = os.environ.get("ANDROID_ADB_SERVER_ADDRESS") or os.environ.get("ANDROID_ADB_SERVER_HOST") or "127.0.0.1"
    port = os.environ.get("ANDROID_ADB_SERVER_PORT") or str(DEFAULT_PORT)
    if address:
        kind, _, rest = address.partition(":")
        host, _, port = rest.rpartition(":") if ":" in rest else ("127.0.0.1", "", rest)
        if kind != "tcp":
            raise BadInput(f"ADB_SERVER_SOCKET={address}: only tcp:HOST:PORT works here")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadInput(f"{'ADB_SERVER_SOCKET' if address else 'ANDROID_ADB_SERVER_PORT'}: {port!r} is no port")
    return host.strip("[]"), int(port)


def connect_server() -> Any:
    """An ``adbutils.AdbClient`` whose server answers; on this machine one is started where none runs.

    Raises:
        BadInput: adbutils is missing.
        TargetUnreachable: no server answers and none can be started.
    """
    host, port = server_address()  # first, because adbutils reads the same variables while it is imported, and trusts them
    try:
        import adbutils
    except ImportError as error:
        raise BadInput("adb: Android phones need the package adbutils: pip install 'pocketbert[boards]'") from error
    if not _answers(host, port):
        _start_server(host, port)
    client = adbutils.AdbClient(host=host, port=port, socket_timeout=_ANSWER_TIMEOUT_S)
    with _reported(f"the ADB server at {host}:{port} does not answer as one"):
        client.server_version()
    return client


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _start_server(host: str, port: int) -> None:
    import adbutils

    nobody = f"adb: no ADB server answers at {host}:{port}"
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise TargetUnreachable(f"{nobody}; start it there (adb -a nodaemon server) or check ADB's environment variables")
    advice = "install Android's platform-tools (Debian: adb), or set ADBUTILS_ADB_PATH to the program adb"
    with tempfile.TemporaryFile() as said:  # no pipe: the server that stays behind may keep it open
        try:
            adb = adbutils.adb_path()
            # Its own port only: the rest of the environment is what adb reads anyway.
            done = subprocess.run([adb, "-P", str(port), "start-server"], stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=60)
        except (OSError, subprocess.SubprocessError, adbutils.AdbError) as error:
            raise TargetUnreachable(f"{nobody}, and none could be started: {error}; {advice}") from error
        said.seek(0)
        words = " ".join(said.read().decode("utf-8", errors="replace").split())[-300:]
    if done.returncode != 0 or not _answers(host, port):
        raise TargetUnreachable(f"{nobody}, and {adb} could not start one: {words or f'exit code {done.returncode}'}; {advice}")


def list_phones(client: Any) -> dict[str, str]:
    """Serial -> state ("device" is the good one), as the server sees them now."""
    lines = ask(client, "host:devices").splitlines()
    return {serial: state for serial, _, state in (line.partition("\t") for line in lines) if state}


def choose_phone(client: Any, serial: str) -> tuple[str, bool]:
    """(serial of the phone that is meant, whether it was connected for this over the network).

    Args:
        serial: "" for ``ANDROID_SERIAL``, or the only one there is. HOST:PORT that the server does not know yet is connected.

    Raises:
        BadInput: "" although there are several.
        TargetUnreachable: there is no such phone, or it does not let itself be used; what to do about it.
    """
    serial = serial or os.environ.get("ANDROID_SERIAL", "")
    phones = list_phones(client)
    connected = False
    if serial and serial not in phones and serial.rpartition(":")[2].isdecimal() and ":" in serial:
        words = ask(client, f"host:connect:{serial}")
        phones = list_phones(client)
        connected = serial in phones
        if not connected:
            raise TargetUnreachable(f"adb:{serial}: {words}; is the phone's wireless debugging on, and has this computer been paired?")
    there = ", ".join(f"{name} ({state})" for name, state in phones.items()) or "none"
    if not serial:
        usable = [name for name, state in phones.items() if state == "device"]
        if len(usable) > 1:
            raise BadInput(f"adb: there are {len(usable)} phones; name one: {', '.join(f'adb:{name}' for name in usable)}")
        if not phones:
            raise TargetUnreachable("adb: no phone is connected; plug one in, switch USB debugging on (Developer options), and see `adb devices`")
        serial = (usable or list(phones))[0]
    if serial not in phones:
        raise TargetUnreachable(f"adb:{serial}: no such phone is connected; there are: {there}")
    try:
        _wait_until_usable(client, serial)
    except BaseException:
        if connected:
            ask(client, f"host:disconnect:{serial}")
        raise
    return serial, connected


def _wait_until_usable(client: Any, serial: str) -> None:
    """A phone that was just connected is offline for a moment."""
    until = time.monotonic() + _SETTLE_S
    while (state := list_phones(client).get(serial, "offline")) in _PASSING_STATES and time.monotonic() < until:
        time.sleep(0.1)
    if state != "device":
        raise TargetUnreachable(f"adb:{serial}: {explain_state(state)}")


def explain_state(state: str) -> str:
    """A state that is not "device", in words, with what to do."""
    kind = next((known for known in _STATES if state.startswith(known)), None)
    return f"the phone is {state}; {_STATES[kind]}" if kind else f"the phone is in state {state}; start Android on it and run again"


def ask(client: Any, service: str) -> str:
    """What the server answers to a host service, such as ``host:devices``. A refusal is an answer too."""
    with _reported(f"the ADB server did not answer to {service}"):
        _check_server(client)
        with client.make_connection(timeout=_ANSWER_TIMEOUT_S) as connection:
            return _answer(connection, service)


def _answer(connection: Any, service: str) -> str:
    import adbutils

    connection.send_command(service)
    try:
        connection.check_okay()
    except adbutils.AdbTimeout:
        raise
    except adbutils.AdbError as error:
        return str(error)
    return connection.read_string_block()


def _check_server(client: Any) -> None:
    """adbutils would start a server that has gone meanwhile, unasked and with its output on ours."""
    if not _answers(client.host, client.port):
        raise ConnectionRefusedError(f"no ADB server answers at {client.host}:{client.port} any more")


def broken() -> tuple[type[Exception], ...]:
    """What adbutils and sockets raise when a server or a phone has gone, or answers nonsense."""
    import adbutils

    return (adbutils.AdbError, OSError, EOFError, ValueError, subprocess.SubprocessError)


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except broken() as error:
        raise TargetUnreachable(f"adb: {what}: {error}") from error


# --- one phone ----------------------------------------------------------------------------------------------------


class Late(Exception):
    """A command that did not end in time. It runs on until its shell is closed."""


class Refused(Exception):
    """The phone's own words against a file."""


class Wire:
    """One phone behind a server. Every call opens a connection of its own, and raises :func:`broken` if that breaks."""

    def __init__(self, client: Any, serial: str) -> None:
        self.client = client
        self.serial = serial
        self._device = client.device(serial)

    def features(self) -> set[str]:
        return set(ask(self.client, f"host-serial:{self.serial}:features").split(","))

    def state(self) -> str | None:
        """As the server sees it now; None if it does not know the phone."""
        return list_phones(self.client).get(self.serial)

    def shell(self, line: str) -> Shell:
        """Start a line of shell there."""
        return Shell(self._open(f"shell,v2,raw:{line}"))

    def send(self, file: BinaryIO, remote: str) -> None:
        """Copy an open file to ``remote``, executable, with the folders that it needs. Raises Refused."""
        with contextlib.closing(self._open("sync:")) as connection:
            wire = _Bytes(connection.conn, _STALL_TIMEOUT_S)
            wire.write(_sync(b"SEND", f"{remote},{0o100755}".encode()))
            while chunk := file.read(_CHUNK_BYTES):
                wire.write(_sync(b"DATA", chunk))
                if wire.has_input():  # it says nothing before the end, unless it has given up
                    break
            else:
                wire.write(b"DONE" + struct.pack("<I", int(time.time())))
            answer, size = struct.unpack("<4sI", wire.read(8))
            if answer != b"OKAY":
                raise Refused(wire.read(size).decode("utf-8", errors="replace"))

    def fetch(self, remote: str) -> Iterator[bytes]:
        """The content of a file there, in pieces. Raises Refused."""
        with contextlib.closing(self._open("sync:")) as connection:
            wire = _Bytes(connection.conn, _STALL_TIMEOUT_S)
            wire.write(_sync(b"RECV", remote.encode()))
            while True:
                answer, size = struct.unpack("<4sI", wire.read(8))
                if answer == b"DONE":
                    return
                content = wire.read(size)
                if answer != b"DATA":
                    raise Refused(content.decode("utf-8", errors="replace"))
                yield content

    def _open(self, service: str) -> Any:
        _check_server(self.client)
        connection = self._device.open_transport(timeout=_ANSWER_TIMEOUT_S)
        try:
            connection.send_command(service)
            connection.check_okay()
        except BaseException:
            connection.close()
            raise
        return connection


class Shell:
    """A running command there, with its streams apart and its standard input open.

    When it is closed (or this process ends, or the phone goes away), the phone's daemon ends the command's standard input
    and sends it SIGHUP.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._wire = _Bytes(connection.conn, None)
        self._streams = {_STDOUT: bytearray(), _STDERR: bytearray()}
        self._exit_code: int | None = None

    def close_stdin(self) -> None:
        self._wire.write(struct.pack("<BI", _CLOSE_STDIN, 0))

    def read_line(self, timeout_s: float) -> str | None:
        """The first line of its standard output; None if it ended without one.

        Raises:
            Late: there is none yet after ``timeout_s``.
        """
        self._wire.deadline = time.monotonic() + timeout_s
        while b"\n" not in self._streams[_STDOUT] and self._exit_code is None:
            self._read_packet()
        line, newline, _ = self._streams[_STDOUT].partition(b"\n")
        return line.decode("utf-8", errors="replace").strip() if newline else None

    def wait(self, timeout_s: float) -> Finished:
        """All that it printed, once it has ended.

        Raises:
            Late: it has not ended after ``timeout_s``; close the shell then.
        """
        self._wire.deadline = time.monotonic() + timeout_s
        while self._exit_code is None:
            self._read_packet()
        stdout, stderr = (self._streams[stream].decode("utf-8", errors="replace") for stream in (_STDOUT, _STDERR))
        # A shell and the daemon alike say 128 + n for signal n.
        return Finished(128 - self._exit_code if 128 < self._exit_code <= 128 + 64 else self._exit_code, stdout, stderr)

    def close(self) -> None:
        self._connection.close()

    def _read_packet(self) -> None:
        kind, size = struct.unpack("<BI", self._wire.read(5))
        content = self._wire.read(size)
        if kind == _EXIT:
            self._exit_code = content[0]
        elif kind in self._streams:
            self._streams[kind] += content


class _Bytes:
    """Exact reads and whole writes on a socket, until a deadline or as long as something moves within ``stall_s``."""

    def __init__(self, connected: socket.socket, stall_s: float | None) -> None:
        self._socket = connected
        self._stall_s = stall_s
        self.deadline: float | None = None

    def write(self, content: bytes) -> None:
        self._socket.settimeout(self._stall_s or _ANSWER_TIMEOUT_S)
        self._socket.sendall(content)

    def read(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            self._socket.settimeout(self._stall_s if self.deadline is None else max(0.01, self.deadline - time.monotonic()))
            try:
                received = self._socket.recv(size - len(content))
            except TimeoutError as error:
                if self.deadline is None:
                    raise
                raise Late from error
            if not received:
                raise EOFError("the connection was closed")
            content += received
        return bytes(content)

    def has_input(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])


def _sync(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content
