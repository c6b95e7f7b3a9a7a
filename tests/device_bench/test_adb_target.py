"""Which ADB server and which phone: what a real daemon on this machine cannot be brought to say is said by a server of the tests.

Everything that a real adbd can show is in ``tests/boards/test_adb.py``.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from device_bench.targets import adb_wire
from device_bench.targets.adb import AdbTarget, _complete, _neighbours
from device_bench.targets.adb_wire import connect_server, server_address
from runtimes.errors import BadInput, TargetUnreachable

VARIABLES = (
    "ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_ADDRESS", "ANDROID_ADB_SERVER_HOST", "ANDROID_ADB_SERVER_PORT", "ANDROID_SERIAL", "ADBUTILS_ADB_PATH",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_adb_of_this_machine(monkeypatch, tmp_path):
    """No server answers, and the program that starts one is not there."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
    monkeypatch.setenv("ADBUTILS_ADB_PATH", str(tmp_path / "no-adb"))
    monkeypatch.setattr(adb_wire, "_SETTLE_S", 0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve(monkeypatch):
    """An ADB server that answers each service with a string (OKAY), an exception (FAIL), or bytes as they are."""
    listeners = []

    def start(answer: Callable[[str], str | bytes | Exception]) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(listener.getsockname()[1]))
        threading.Thread(target=_serve, args=(listener, answer), daemon=True).start()

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _serve(listener: socket.socket, answer: Callable[[str], str | bytes | Exception]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(connection, answer), daemon=True).start()


def _answer(connection: socket.socket, answer: Callable[[str], str | bytes | Exception]) -> None:
    """One service, then the connection is closed."""
    with connection:
        size = connection.recv(4)
        if not size:
            return
        said = answer(connection.recv(int(size, 16)).decode())
        if isinstance(said, Exception):
            connection.sendall(b"FAIL" + _block(str(said)))
        else:
            connection.sendall(said if isinstance(said, bytes) else b"OKAY" + _block(said))


def _block(text: str) -> bytes:
    return f"{len(text):04x}{text}".encode()


def phones(devices: str, **others: str | bytes | Exception) -> Callable[[str], str | bytes | Exception]:
    answers = {"host:version": "0029", "host:devices": devices, **others}
    return lambda service: answers.get(service, RuntimeError(f"unknown host service {service}"))


def connect(serial: str = "") -> None:
    with AdbTarget(serial):
        pass


# --- the server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, ("127.0.0.1", 5037)),
        ({"ANDROID_ADB_SERVER_PORT": "5137"}, ("127.0.0.1", 5137)),
        ({"ANDROID_ADB_SERVER_ADDRESS": "lab", "ANDROID_ADB_SERVER_PORT": "5137"}, ("lab", 5137)),
        ({"ANDROID_ADB_SERVER_HOST": "lab"}, ("lab", 5037)),
        ({"ADB_SERVER_SOCKET": "tcp:lab:5138", "ANDROID_ADB_SERVER_PORT": "5137"}, ("lab", 5138)),
        ({"ADB_SERVER_SOCKET": "tcp:5138"}, ("127.0.0.1", 5138)),
        ({"ADB_SERVER_SOCKET": "tcp:[::1]:5138"}, ("::1", 5138)),
    ],
)
def test_server_address(monkeypatch, variables, address):
    monkeypatch.delenv("ANDROID_ADB_SERVER_PORT")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert server_address() == address


@pytest.mark.parametrize(
    ("name", "value"), [("ANDROID_ADB_SERVER_PORT", "usb"), ("ANDROID_ADB_SERVER_PORT", "70000"), ("ADB_SERVER_SOCKET", "localabstract:adb")]
)
def test_address_that_is_none(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=f"{name}.*{value}"):
        connect()


def test_server_that_cannot_be_started(tmp_path):
    with pytest.raises(TargetUnreachable, match=r"no ADB server answers at 127\.0\.0\.1:\d+, and none could be started: .*no-adb.*platform-tools"):
        connect()
    program = tmp_path / "no-adb"
    program.write_text("#!/bin/sh\necho 'cannot bind: in use' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(TargetUnreachable, match=r"no-adb could not start one: cannot bind: in use; install"):
        connect()


def test_no_server_is_started_on_another_machine(monkeypatch):
    monkeypatch.setattr(adb_wire, "_ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setenv("ANDROID_ADB_SERVER_ADDRESS", "lab.invalid")
    with pytest.raises(TargetUnreachable, match=r"no ADB server answers at lab\.invalid:\d+; start it there"):
        connect()


def test_something_else_on_the_port(serve):
    serve(lambda service: b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(TargetUnreachable, match="does not answer as one"):
        connect()


def test_server_that_never_answers(serve, monkeypatch):
    monkeypatch.setattr(adb_wire, "_ANSWER_TIMEOUT_S", 0.3)
    release = threading.Event()
    answered = phones("")
    serve(lambda service: answered(service) if service == "host:version" else (release.wait(30), "")[1])
    with pytest.raises(TargetUnreachable, match=r"did not answer to host:devices: .*timeout"):
        connect()
    release.set()


# --- the phone ------------------------------------------------------------------------------------------------------


def test_no_phone(serve):
    serve(phones(""))
    with pytest.raises(TargetUnreachable, match=r"no phone is connected; .*USB debugging"):
        connect()
    with pytest.raises(TargetUnreachable, match="adb:R5: no such phone is connected; there are: none"):
        connect("R5")


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        ("unauthorized", "the phone is unauthorized; unlock the phone, confirm there"),
        ("offline", "the phone is offline; unplug it"),
        ("authorizing", "the phone is authorizing; unlock the phone"),
        ("no permissions (user in plugdev group; are your udev rules wrong?); see [an address]", r"no permissions \(user .* udev rules"),
        ("recovery", "in state recovery; start Android on it"),
        ("sideload", "in state sideload; start Android on it"),
    ],
)
def test_phone_that_does_not_let_itself_be_used(serve, state, advice):
    serve(phones(f"R5CT\t{state}\n"))
    for serial in ("R5CT", ""):
        with pytest.raises(TargetUnreachable, match=f"adb:R5CT: .*{advice}"):
            connect(serial)


def test_several_phones(serve, monkeypatch):
    serve(phones("R5CT\tunauthorized\nPIXEL\tdevice\nOTHER\tdevice\n"))
    with pytest.raises(BadInput, match="there are 2 phones; name one: adb:PIXEL, adb:OTHER"):
        connect()
    monkeypatch.setenv("ANDROID_SERIAL", "R5CT")
    with pytest.raises(TargetUnreachable, match="adb:R5CT: the phone is unauthorized"):
        connect()


def test_phone_that_settles(serve):
    """Offline for a moment, as wireless ones are after they were connected; then it is taken, and found too old."""
    asked = []

    def answer(service: str) -> str | Exception:
        asked.append(service)
        states = {"host:version": "0029", "host-serial:R5:features": "cmd"}
        return states.get(service, "R5\tdevice\n" if asked.count("host:devices") > 2 else "R5\toffline\n")

    serve(answer)
    with pytest.raises(TargetUnreachable, match="adb:R5: its ADB cannot keep a command's streams apart; Android 7"):
        connect()


def test_wireless_phone_that_was_connected_is_disconnected(serve):
    asked = []

    def answer(service: str) -> str:
        asked.append(service)
        connected = "host:connect:10.0.0.9:5555" in asked
        there = "10.0.0.9:5555\tunauthorized\n" if connected else ""
        return {"host:version": "0029", "host:devices": there}.get(service, "connected to 10.0.0.9:5555")

    serve(answer)
    with pytest.raises(TargetUnreachable, match="unauthorized"):
        connect("10.0.0.9:5555")
    assert asked[-1] == "host:disconnect:10.0.0.9:5555"


def test_connection_that_breaks_in_the_middle(serve):
    """The server lets go of the phone while its shell is opened."""
    serve(phones("R5\tdevice\n", **{"host-serial:R5:features": "shell_v2,cmd", "host:tport:serial:R5": b"OKAY" + struct.pack("<Q", 1)}))
    with pytest.raises(TargetUnreachable, match=r"adb:R5: the connection broke while making a work folder: .*; run again"):
        connect()


def test_adbutils_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "adbutils", None)
    with pytest.raises(BadInput, match=r"pip install 'pocketbert\[boards\]'"):
        connect_server()


def test_session_that_is_not_open():
    with pytest.raises(TargetUnreachable, match="adb:R5: not connected; use it in a with statement"):
        AdbTarget("R5").send(Path(__file__), "/data/local/tmp/x")


# --- what goes along, and what is told ------------------------------------------------------------------------------


def test_neighbours_that_a_library_needs(tmp_path):
    """A runtime of an AAR with its C++ library beside it, which needs a third one."""
    libraries = {"libthird.so": [], "libc++_shared.so": ["libthird.so"], "libother.so": [], "libruntime.so": ["libc++_shared.so"]}
    for name, needed in libraries.items():
        source = ["-x", "c", "/dev/null", "-x", "none"]
        command = ["cc", "-shared", "-o", name, *source, "-Wl,--no-as-needed", *needed, f"-Wl,-soname,{name}", "-Wl,-rpath-link,."]
        subprocess.run(command, cwd=tmp_path, check=True)
    assert [path.name for path in _neighbours(tmp_path / "libruntime.so")] == ["libc++_shared.so", "libthird.so"]


def test_what_the_runner_read_itself_stays():
    battery = {"capacity_percent": 50, "status": None, "current_ua": -120000, "voltage_uv": None}
    state = {"temperatures_c": {"cpu": 40.0}, "battery": battery}
    told = {"capacity_percent": 51, "status": "Full", "charging": False}
    _complete(state, {"thermal_status": "light", "temperatures_c": {"SKIN": 33.0}, "battery": told})
    assert state["temperatures_c"] == {"cpu": 40.0}
    assert state["thermal_status"] == "light"
    assert state["battery"] == {"capacity_percent": 50, "status": "Full", "charging": False, "current_ua": -120000}


@pytest.mark.parametrize("zones", [None, {}, {"cpu": None}])
def test_what_the_runner_may_not_read_is_taken_from_android(zones):
    state = {"temperatures_c": zones, "battery": None}
    _complete(state, {"thermal_status": None, "temperatures_c": {"SKIN": 33.0}, "battery": None})
    assert state == {"temperatures_c": {"SKIN": 33.0}, "battery": None, "thermal_status": None}
