"""The SSH target as far as no server is needed: addresses, quoting, what ssh's words mean, and the lease under this machine's shell.

The texts of ssh were collected from OpenSSH 9.2 with a real server; ``tests/boards/test_ssh.py`` meets that server.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from device_bench.targets import ssh_wire
from device_bench.targets.ssh import SshTarget
from device_bench.targets.ssh_wire import COMMAND_VARIABLE, IN_FOLDER, LEASE, Address, explain, login_line, ssh_command
from runtimes.errors import BadInput, TargetUnreachable

AWKWARD = [
    "a b", "it's", "$HOME", "`id`", "$(id)", "two\nlines", "-n", "--", "äöü 日本", "\\n", "\\\\", "!!", '"', "", "*", "~", "%s", "{a,b}", "#", ">x",
    "end\n",
]  # fmt: skip
SHELLS = [path for path in ("/bin/sh", "/bin/bash", "/bin/dash") if os.path.exists(path)]
needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's client: install openssh-client")
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="the lease finds processes in Linux's /proc")


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("rpi5", ["rpi5"]), ("pi@rpi5", ["pi@rpi5"]), ("pi@rpi5:2222", ["-p", "2222", "pi@rpi5"]), ("pi@192.168.0.7", ["pi@192.168.0.7"]),
        ("pi@[fe80::1%eth0]:22", ["-p", "22", "pi@fe80::1%eth0"]), ("[::1]", ["::1"]), ("ann@corp@board", ["ann@corp@board"]),
        ("my_board.lan", ["my_board.lan"]),
    ],
)  # fmt: skip
def test_addresses(text, arguments):
    assert Address.parse(text).arguments == arguments


@pytest.mark.parametrize("text", ["", "@rpi5", "pi@", "-oProxyCommand=id", "pi@rpi5:", "pi@rpi5:ssh", "pi@a b", "::1", "pi@rpi5:22:23", "a b@rpi5"])
def test_what_is_no_address(text):
    with pytest.raises(BadInput, match="no address; write ssh:USER@HOST"):
        SshTarget(text)


@pytest.mark.parametrize("shell", SHELLS)
def test_arguments_reach_a_command_as_they_are(shell):
    line = login_line(["printf", "%s\\0", *AWKWARD])
    done = subprocess.run([shell, "-c", line], capture_output=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(argument) for argument in AWKWARD], done.stderr


def test_login_shells_see_nothing_to_expand():
    """What is left is one single-quoted word without a quote, a newline, or csh's ``!``, and no backslash before a quote or another."""
    start, line, end = "exec /bin/sh -c '", login_line(AWKWARD), "'"
    assert line.startswith(start)
    assert line.endswith(end)
    word = line[len(start) : -len(end)]
    assert word.isascii()
    assert not set("'!\n") & set(word)
    assert "\\\\" not in word


def test_exit_codes_and_signals_of_a_command_in_the_folder(tmp_path):
    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["/bin/sh", "-c", IN_FOLDER, "pocketbert", str(tmp_path / "a b"), *command], capture_output=True, text=True)

    assert run("true").returncode == 73  # no such folder
    (tmp_path / "a b").mkdir()
    assert run("pwd").stdout == f"{tmp_path}/a b\n"
    assert run("sh", "-c", "exit 7").returncode == 7
    assert run("sh", "-c", "kill -9 $$").returncode == 128 + 9
    assert run("sh", "-c", "echo $TMPDIR").stdout == f"{tmp_path}/a b\n"


CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Offending ED25519 key in /home/ann/.ssh/known_hosts:1
  remove with:
  ssh-keygen -f "/home/ann/.ssh/known_hosts" -R "[rpi5]:2222"
Host key for [rpi5]:2222 has changed and you have requested strict checking.
Host key verification failed.
"""


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (CHANGED, r'host key has changed.*ssh-keygen -f "/home/ann/.ssh/known_hosts" -R "\[rpi5\]:2222".*ssh -F lab -p 2222 pi@rpi5$'),
        (
            "No ED25519 host key is known for [rpi5]:2222 and you have requested strict checking.\nHost key verification failed.\n",
            r"host key is unknown here.*connect once by hand and accept it: ssh -F lab -p 2222 pi@rpi5$",
        ),
        ("Host key verification failed.\n", "host key is unknown here"),
        ("pi@rpi5: Permission denied (publickey).\n", r"none of your keys.*pi@rpi5: Permission denied \(publickey\)\..*ssh-copy-id"),
        ("ssh: Could not resolve hostname rpi5: Name or service not known\n", "no machine of this name"),
        ("ssh: connect to host rpi5 port 2222: Connection refused\n", "nothing listens there.*check that sshd runs"),
        ("ssh: connect to host rpi5 port 2222: No route to host\n", "no way leads there"),
        ("ssh: connect to host rpi5 port 2222: Connection timed out\n", "no answer in time.*check that it is on"),
        ("Connection timed out during banner exchange\nConnection to 10.0.0.1 port 22 timed out\n", "no answer in time"),
        (
            "kex_exchange_identification: Connection closed by remote host\nConnection closed by 10.0.0.1 port 22\n",
            "closed the connection before the login",
        ),
        ("kex_exchange_identification: read: Connection reset by peer\n", "closed the connection before the login"),
        (  # through a jump host that is off: the cause, not what follows from it
            "ssh: connect to host jump port 22: Connection refused\nkex_exchange_identification: Connection closed by remote host\n"
            "Connection closed by UNKNOWN port 65535\n",
            "nothing listens there.*host jump port 22",
        ),
        ("something new\n", "ssh cannot connect: something new; try by hand: ssh -F lab"),
        ("", "it does not say why"),
    ],
)  # fmt: skip
def test_what_the_words_of_ssh_mean(stderr, expected):
    error = explain("rpi", stderr, ["ssh", "-F", "lab"], Address.parse("pi@rpi5:2222"))
    assert isinstance(error, TargetUnreachable)
    with pytest.raises(TargetUnreachable, match=f"^rpi: .*{expected}"):
        raise error


@pytest.mark.parametrize(
    "stderr", ["Can't open user config file /nonexistent: No such file or directory\n", "command-line: line 0: Bad configuration option: nonsense\n"]
)
def test_a_bad_configuration_is_the_users(stderr):
    error = explain("rpi", stderr, ["ssh"], Address.parse("rpi5"))
    assert isinstance(error, BadInput)
    assert stderr.strip() in str(error)


def test_command_from_the_environment(monkeypatch):
    monkeypatch.setenv(COMMAND_VARIABLE, f"{sys.executable} -F 'my config'")
    assert ssh_command() == [sys.executable, "-F", "my config"]


@pytest.mark.parametrize(("command", "expected"), [("no-such-ssh", "no-such-ssh: no such program; install OpenSSH"), ("ssh 'x", "no command")])
def test_no_ssh_here(command, expected, monkeypatch):
    monkeypatch.setenv(COMMAND_VARIABLE, command)
    with pytest.raises(BadInput, match=expected), SshTarget("rpi5"):
        pass


def test_ssh_is_missing(monkeypatch):
    monkeypatch.delenv(COMMAND_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match="ssh: no such program here; install"), SshTarget("rpi5"):
        pass


@pytest.fixture
def refusal(monkeypatch, tmp_path):
    """(address) -> why the real ssh, without this user's configuration, cannot connect to it."""
    monkeypatch.setenv(COMMAND_VARIABLE, "ssh -F none -o ConnectTimeout=3")
    monkeypatch.setattr(ssh_wire, "SOCKET_PARENT", str(tmp_path))

    def connect(address: str) -> str:
        with pytest.raises(TargetUnreachable) as caught, SshTarget(address, name="rpi"):
            pass
        assert list(tmp_path.iterdir()) == [], "the socket's folder stays behind"
        return str(caught.value)

    return connect


@pytest.fixture
def listener():
    """A port of 127.0.0.1 where somebody listens who is no sshd."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@needs_ssh
def test_closed_port(refusal, listener):
    port = listener.getsockname()[1]
    listener.close()
    assert "rpi: nothing listens there" in refusal(f"127.0.0.1:{port}")


@needs_ssh
def test_unknown_name(refusal):
    assert "rpi: no machine of this name is known" in refusal("no-such-board.invalid")


@needs_ssh
def test_port_that_never_speaks(refusal, listener):
    assert "rpi: no answer in time" in refusal(f"127.0.0.1:{listener.getsockname()[1]}")


@needs_ssh
def test_port_that_hangs_up(refusal, listener):
    def hang_up() -> None:
        listener.accept()[0].close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    message = refusal(f"127.0.0.1:{listener.getsockname()[1]}")
    thread.join()
    assert "rpi: it closed the connection before the login was through" in message


@needs_ssh
def test_option_that_ssh_does_not_know(monkeypatch):
    monkeypatch.setenv(COMMAND_VARIABLE, "ssh -F none -o Nonsense=1")
    with pytest.raises(BadInput, match=r"ssh cannot be used as it is configured here: .*nonsense"), SshTarget("127.0.0.1"):
        pass


def test_a_target_that_is_not_connected_says_so():
    with pytest.raises(TargetUnreachable, match="the connection is closed"):
        SshTarget("rpi5").execute(["true"], 1)
    SshTarget("rpi5").disconnect()


@needs_ssh
def test_empty_socket_folders_of_killed_processes_are_removed(refusal, tmp_path):
    (tmp_path / "pocketbert-ssh-left").mkdir()
    os.utime(tmp_path / "pocketbert-ssh-left", (0, 0))
    refusal("no-such-board.invalid")  # which checks that nothing is there


# --- the lease, run by this machine's shells as a board's would ----------------------------------------------------


class Lease:
    """The lease's shell with a pipe instead of a connection."""

    def __init__(self, shell: str, parent: Path, home: Path) -> None:
        environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
        self.process = subprocess.Popen(
            [shell, "-c", LEASE, "pocketbert-lease", str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout.readline() == "pocketbert-lease\n"
        self.folder = Path(self.process.stdout.readline().rstrip("\n"))
        assert self.process.stdout.readline() == "pocketbert-ready\n"

    def start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(["/bin/sh", "-c", IN_FOLDER, "pocketbert", str(self.folder / "work"), *command], start_new_session=True)

    def order_end(self) -> None:
        self.process.stdin.write("end\n")
        self.process.stdin.flush()
        while self.process.stdout.readline() != "pocketbert-ended\n":
            assert self.process.poll() is None

    def close(self) -> None:
        """The connection ends."""
        self.process.communicate(timeout=60)

    def die(self) -> None:
        """As with the board's power."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(params=SHELLS)
def make_lease(request, tmp_path):
    started = []

    def make(parent: Path | None = None) -> Lease:
        (tmp_path / "a parent").mkdir(exist_ok=True)
        started.append(Lease(request.param, parent or tmp_path / "a parent", tmp_path / "home"))
        return started[-1]

    yield make
    for lease in started:
        if lease.process.returncode is None:
            lease.close()


def ends(process: subprocess.Popen) -> bool:
    try:
        return process.wait(30) != 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


def in_folder(folder: Path) -> list[str]:
    """Processes that work in ``folder`` or below."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").startswith(str(folder)):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


@needs_proc
def test_the_lease_ends_with_its_connection_and_takes_everything_along(make_lease):
    lease = make_lease()
    assert lease.folder.stat().st_mode & 0o777 == 0o700
    (lease.folder / "work" / "-model 'x'.onnx").write_bytes(b"1")
    worker = lease.start("sh", "-c", "sleep 1000 & exec sleep 1000")
    while len(in_folder(lease.folder / "work")) < 3:
        time.sleep(0.05)
    lease.close()
    assert ends(worker)
    assert not lease.folder.exists()
    assert in_folder(lease.folder.parent) == []


@needs_proc
def test_an_order_ends_what_runs_but_not_the_lease(make_lease):
    lease = make_lease()
    (lease.folder / "work" / "kept").write_bytes(b"1")
    for _ in range(2):
        worker = lease.start("sleep", "1000")
        while not any("sleep\0" + "1000" in command for command in in_folder(lease.folder / "work")):
            time.sleep(0.05)
        lease.order_end()
        assert ends(worker)
    assert (lease.folder / "work" / "kept").exists()


@needs_proc
def test_a_new_session_clears_up_after_dead_ones_only(make_lease, tmp_path):
    dead, alive = make_lease(), make_lease()
    worker = dead.start("sleep", "1000")
    staging = tmp_path / "home" / ".cache/pocketbert/board" / f".new-{dead.folder.name}"
    staging.mkdir(parents=True)
    dead.die()
    stranger = dead.folder.parent / f"pocketbert-lease-{dead.process.pid}-notes"
    (stranger / "work").mkdir(parents=True)
    new = make_lease()
    assert not dead.folder.exists()
    assert not staging.exists()
    assert ends(worker)
    assert alive.folder.exists()
    assert (stranger / "work").exists()
    assert new.folder.exists()


@needs_proc
def test_a_folder_is_dead_when_another_process_has_its_number(make_lease):
    """After a restart of the board, numbers begin anew."""
    lease = make_lease()
    left = lease.folder.parent / f"pocketbert-lease-{os.getpid()}-abcdef"
    for part in ("work", "pulse"):
        (left / part).mkdir(parents=True)
    make_lease()
    assert not left.exists()


@needs_proc
def test_no_lease_in_a_folder_that_is_not_there(tmp_path):
    command = ["/bin/sh", "-c", LEASE, "pocketbert-lease", str(tmp_path / "gone")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 73
    assert "gone" in done.stderr
    assert done.stdout == ""
