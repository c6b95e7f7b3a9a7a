"""The SSH target against a real sshd: jobs, and everything that can go wrong on the way to a board and on it."""

# ruff: noqa: F811 (fixtures of another folder)

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from device_bench.agent.agent import read_inputs
from device_bench.board_python import ask_python
from device_bench.debian import PackageSet
from device_bench.provision import provision, unprovision
from device_bench.targets import ssh_wire
from device_bench.targets.base import AGENT
from device_bench.targets.ssh import SshTarget
from device_bench.wheels import Machine, fetch_wheel
from runtimes.errors import BadInput, IntegrityError, TargetUnreachable
from tests.boards import sshd as sshd_module
from tests.boards.board import children, wait_until
from tests.boards.conftest import unpacked
from tests.boards.sshd import Sshd
from tests.device_bench.conftest import OUTPUTS, assert_outputs, make_job, onnx_file, reference_outputs, weights, write_onnx  # noqa: F401

ROOT = Path(__file__).parents[2]
SYSTEM_PYTHON = "/usr/bin/python3"
CACHE = "/root/.cache/pocketbert/board"
IDLE_AGENT = "import time\ntime.sleep(1000)\n"
CHATTY_AGENT = "import os\nos.system('exec sleep 1000 &')\nprint('Welcome to board 7 {}')\n"
AGENT_RUNS = "-X utf8 "
TOOLS = ("cat", "df", "mkdir", "mktemp", "mv", "rm", "sha256sum", "sh", "sleep")


@pytest.fixture(autouse=True)
def system_python():
    if not os.path.exists(SYSTEM_PYTHON):
        pytest.skip(f"needs {SYSTEM_PYTHON}, which the board sees as its own: install python3")


@pytest.fixture
def target_on(monkeypatch):
    """A target for a board of the fixtures, named "board"; not connected. Options as of :class:`SshTarget`."""

    def make(server: Sshd, options: str = "", **keywords) -> SshTarget:
        monkeypatch.setenv("POCKETBERT_SSH", f"ssh -F '{server.config}' {options}")
        return SshTarget("board", name="board", **keywords)

    return make


@pytest.fixture
def agent_of(tmp_path):
    """Path of an agent with this source."""

    def write(source: str) -> Path:
        path = tmp_path / "agent.py"
        path.write_text(source)
        return path

    return write


@pytest.fixture(scope="module")
def provisioned(openssh_server, tmp_path_factory):
    """A board that has been given its runtimes, for tests that leave it as it is."""
    if not os.path.exists(SYSTEM_PYTHON):
        pytest.skip(f"needs {SYSTEM_PYTHON}: install python3")
    folder = tmp_path_factory.mktemp("provisioned")
    server = Sshd(folder, openssh_server)
    before, os.environ["POCKETBERT_SSH"] = os.environ.get("POCKETBERT_SSH"), f"ssh -F '{server.config}'"
    try:
        with SshTarget("board", provision=True, say=print):
            pass
        yield server
    except TargetUnreachable as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(f"no package index: {error}")
    finally:
        os.environ.pop("POCKETBERT_SSH")
        if before is not None:
            os.environ["POCKETBERT_SSH"] = before
        server.stop()


def files_below(folder: Path) -> list[Path]:
    """The files in a folder that a board is clearing meanwhile; ``os.walk`` passes over folders that are gone, ``rglob`` fails on them."""
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def arrived_bytes(files: list[Path]) -> int:
    """Size of the largest; a file that is gone or renamed meanwhile has none."""
    sizes = [0]
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            sizes.append(file.stat().st_size)
    return max(sizes)


def remains(server: Sshd, where: tuple[str, ...] = ("/tmp", "/root")) -> list[str]:
    """What is on the board that was not there before: files, and processes that are no listening sshd."""
    files = [str(path) for folder in where for path in files_below(server.board.path(folder)) if CACHE not in str(path)]
    files += [str(path) for path in server.board.path(CACHE).glob(".new-*")]
    return files + [command for command in server.board.processes().values() if "[listener]" not in command]


def soon_clean(server: Sshd) -> None:
    """A board needs a moment to notice that a connection is gone."""
    wait_until(lambda: not remains(server), f"the board is clean again: {remains(server)}")


def meanwhile(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def running(server: Sshd, part: str) -> list[int]:
    return [pid for pid, command in server.board.processes().items() if part in command]


@pytest.fixture(scope="session")
def tflite_file(tmp_path_factory) -> Path:
    """Made in a process of its own: the converter brings jax, which warns of every fork from then on."""
    path = tmp_path_factory.mktemp("tflite") / "tiny.tflite"
    source = "import sys, pathlib, tests.device_bench.conftest as c; c.write_tflite(pathlib.Path(sys.argv[1]), *c.weights(), (8, 16))"
    subprocess.run([sys.executable, "-c", source, str(path)], check=True, capture_output=True, cwd=ROOT)
    return path


# --- work that succeeds --------------------------------------------------------------------------------------------


def test_all_modes_on_a_board_that_was_provisioned(provisioned, target_on, onnx_file, make_job, tmp_path):
    with target_on(provisioned, provision=True) as target:
        info = target.info()
        assert set(info["formats"]) == {"onnx", "tflite"}
        assert info["conditions"]["python"].startswith("3.")
        latency = target.run(make_job(onnx_file))
        assert latency["cases"][0]["count"] == 12
        assert latency["runtime"] == info["formats"]["onnx"]
        memory = target.run(make_job(onnx_file, mode="memory"))["memory"]
        assert memory["peak_bytes"] >= memory["baseline_bytes"] > 0
        answer = target.run(make_job(onnx_file, mode="outputs", output=str(tmp_path / "outputs")))
        assert answer["outputs"] == OUTPUTS
    assert_outputs(read_inputs(str(tmp_path / "outputs"))[1], reference_outputs())
    assert remains(provisioned) == []


def test_tflite_on_a_board_that_was_provisioned(provisioned, target_on, tflite_file, make_job):
    with target_on(provisioned, provision=True) as target:
        assert target.run(make_job(tflite_file))["cases"][0]["count"] == 12


def test_a_second_provisioning_sends_nothing(provisioned, target_on):
    said = []
    with target_on(provisioned, provision=True, say=said.append) as target:
        assert target.info()["formats"]
    assert said == []
    assert len([path for path in provisioned.board.path(CACHE).iterdir() if path.name.startswith("env-")]) == 1


def test_one_runtime_shares_wheels_with_the_environment_of_all(provisioned, target_on):
    said = []
    with target_on(provisioned) as target:
        python = provision(target, ["onnx"], say=said.append)
        done = target.execute([python, "-c", "import onnxruntime, importlib.util as u; print(u.find_spec('ai_edge_litert'))"], 60)
    assert (done.stdout, said) == ("None\n", []), done.stderr


def test_wrong_outputs_are_refused_there(provisioned, target_on, make_job, tmp_path):
    embeddings, head = weights()
    wrong = write_onnx(tmp_path / "wrong.onnx", embeddings, head + 1)
    with target_on(provisioned, provision=True) as target, pytest.raises(IntegrityError, match=r"board: .*golden case 1 differs"):
        target.run(make_job(wrong))


AWKWARD = ["-n", 'it\'s a "model".onnx', "$HOME", "two\nlines", "äöü 日本.onnx", "back\\slash", "*", ";", "&& exit 1", "!"]


def test_names_of_any_kind(sshd, target_on, tmp_path):
    with target_on(sshd) as target:
        assert target.execute(["printf", "%s|", *AWKWARD], 60).stdout == "|".join(AWKWARD) + "|"
        for number, name in enumerate(AWKWARD):
            (tmp_path / "there").mkdir(exist_ok=True)
            path = tmp_path / "there" / name
            path.write_bytes(name.encode() + os.urandom(number * 1000))
            remote = target.push(path)
            assert sshd.board.path(remote).read_bytes() == path.read_bytes()
            target.fetch(remote, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == path.read_bytes()
    soon_clean(sshd)


def test_work_folder_with_a_space_and_one_below_home(sshd, target_on):
    for folder in ("/tmp/my work", "/root/~", "/root/in home"):
        sshd.board.path(folder).mkdir()
    with target_on(sshd, work_folder="/tmp/my work") as target:
        assert target.execute(["pwd"], 60).stdout.startswith("/tmp/my work/pocketbert-")
    with target_on(sshd, work_folder="~/in home") as target:
        assert target.execute(["pwd"], 60).stdout.startswith("/root/in home/pocketbert-")


def test_exit_codes_signals_and_streams(sshd, target_on):
    with target_on(sshd) as target:
        done = target.execute(["sh", "-c", "echo out; echo err >&2; exit 7"], 60)
        assert (done.exit_code, done.stdout, done.stderr) == (7, "out\n", "err\n")
        assert target.execute(["sh", "-c", "kill -SEGV $$"], 60).exit_code == -signal.SIGSEGV
        assert target.execute(["sh", "-c", "exit 255"], 60).exit_code == 255
        assert target.execute(["cat"], 60).stdout == ""  # standard input is empty


def test_one_connection_serves_everything(sshd, target_on):
    with target_on(sshd) as target:
        for _ in range(5):
            target.execute(["true"], 60)
        assert len(sshd.sessions()) == 1
        shown = sshd.board.log.read_text().count("Accepted publickey")
    assert shown == 1


def test_two_targets_on_one_board_leave_each_other_alone(sshd, target_on):
    with target_on(sshd) as one, target_on(sshd) as other:
        assert one.folder != other.folder
        other.execute(["touch", "mine"], 60)
        one.disconnect()
        assert other.execute(["ls"], 60).stdout == "mine\n"
    soon_clean(sshd)


def test_a_target_can_be_entered_again(sshd, target_on, tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    target = target_on(sshd)
    for _ in range(2):
        with target:
            assert sshd.board.path(target.push(tmp_path / "file")).read_bytes() == b"1"


# --- the way there -------------------------------------------------------------------------------------------------


def refusal(target: SshTarget) -> str:
    with pytest.raises(TargetUnreachable) as caught, target:
        pass
    return str(caught.value)


def test_host_key_changed_and_unknown(sshd, target_on):
    sshd.change_host_key()
    message = refusal(target_on(sshd))
    assert message.startswith("board: its host key has changed")
    assert f'ssh-keygen -f "{sshd.folder}/known_hosts" -R' in message
    sshd.forget_host_key()
    message = refusal(target_on(sshd))
    assert message.startswith("board: its host key is unknown here")
    assert f"connect once by hand and accept it: ssh -F {sshd.config} board" in message
    sshd.trust_host_key()
    with target_on(sshd):
        pass


def test_wrong_key(sshd, target_on):
    sshd.use_wrong_key()
    assert "board: it lets none of your keys in (root@127.0.0.1: Permission denied (publickey).)" in refusal(target_on(sshd))


def test_board_is_off(sshd, target_on):
    sshd.stop()
    assert "board: nothing listens there (connect to host 127.0.0.1" in refusal(target_on(sshd))


def test_login_that_gives_no_shell(make_sshd, target_on):
    server = make_sshd()
    (server.folder / "keys" / "authorized_keys").write_text(f'command="echo go away; exit 3" {(server.folder / "client_key.pub").read_text()}')
    assert "board: the login gives no shell that runs commands: exit code 3, 'go away'" in refusal(target_on(server))


def test_login_shell_that_talks(sshd, target_on):
    sshd.board.path("/root/.bashrc").write_text("echo Welcome to board 7\n")
    assert "board: its login shell prints 'Welcome to board 7' before every command" in refusal(target_on(sshd))


def test_no_such_work_folder(sshd, target_on):
    message = refusal(target_on(sshd, work_folder="/nowhere"))
    assert message.startswith("board: no work folder can be made in /nowhere: ")
    assert "/nowhere" in message.split("/nowhere: ")[1]


def test_server_with_one_session_per_connection(make_sshd, target_on, monkeypatch):
    monkeypatch.setattr(sshd_module, "CONFIGURATION", sshd_module.CONFIGURATION + "MaxSessions 1\n")
    assert "board: it allows only one session per connection; set MaxSessions" in refusal(target_on(make_sshd()))


def test_options_of_the_users_configuration_do_not_get_in_the_way(sshd, target_on):
    odd = ("RemoteCommand false", "RequestTTY force", "ControlPersist yes", "LogLevel QUIET", "ForwardX11 yes", "LocalForward 127.0.0.1:1 x:1")
    with sshd.config.open("a") as file:
        file.writelines(f"  {line}\n" for line in odd)
    with target_on(sshd) as target:
        assert target.execute(["echo", "works"], 60).stdout == "works\n"
    sshd.stop()
    assert "nothing listens there" in refusal(target_on(sshd))


# --- the connection breaks -----------------------------------------------------------------------------------------


def test_cut_while_pushing(sshd, target_on, tmp_path):
    with (tmp_path / "big.onnx").open("wb") as file:
        file.truncate(800 << 20)

    def cut_when_it_arrives() -> None:
        wait_until(lambda: arrived_bytes(files_below(sshd.board.path("/tmp"))) > 1 << 20, "the file arrives")
        sshd.cut()

    with target_on(sshd) as target:
        thread = meanwhile(cut_when_it_arrives)
        with pytest.raises(TargetUnreachable, match=r"board: the connection was lost while sending big\.onnx \(.+\); the board cleans up; try again"):
            target.push(tmp_path / "big.onnx")
        thread.join()
        with pytest.raises(TargetUnreachable, match="the connection was lost"):
            target.info()
    soon_clean(sshd)


def test_cut_while_timing(provisioned, target_on, onnx_file, make_job):
    def cut_when_it_runs() -> None:
        wait_until(lambda: len(running(provisioned, AGENT_RUNS)) > 2, "agent and worker run")
        time.sleep(1)
        provisioned.cut()

    with target_on(provisioned, provision=True) as target:
        thread = meanwhile(cut_when_it_runs)
        with pytest.raises(TargetUnreachable, match="board: the connection was lost while the agent ran"):
            target.run(make_job(onnx_file, min_seconds=300.0))
        thread.join()
    soon_clean(provisioned)
    with target_on(provisioned, provision=True) as target:
        assert target.run(make_job(onnx_file))["cases"][0]["count"] == 12


def test_board_goes_off_while_timing(sshd, target_on, agent_of):
    with target_on(sshd, agent=agent_of(IDLE_AGENT)) as target:

        def switch_off() -> None:
            wait_until(lambda: running(sshd, AGENT_RUNS), "the agent runs")
            sshd.stop()

        thread = meanwhile(switch_off)
        with pytest.raises(TargetUnreachable, match="the connection was lost while the agent ran"):
            target.run({"mode": "memory"})
        thread.join()


def test_link_that_goes_dead(sshd, target_on, agent_of):
    """Nothing is closed, nothing answers: as when a cable is pulled."""
    with target_on(sshd, "-o ServerAliveInterval=1", agent=agent_of(IDLE_AGENT)) as target:
        stopped = []

        def freeze() -> None:
            wait_until(lambda: running(sshd, AGENT_RUNS), "the agent runs")
            for session in sshd.sessions():
                stopped.extend([session, *children(session)])
            stopped[:] = [pid for pid in stopped if Path(f"/proc/{pid}/comm").read_text().strip() == "sshd"]
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)

        thread = meanwhile(freeze)
        with pytest.raises(TargetUnreachable, match=r"lost while the agent ran \(Timeout, server 127\.0\.0\.1 not responding"):
            target.run({"mode": "memory"})
        thread.join()
    assert running(sshd, AGENT_RUNS)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    soon_clean(sshd)


HOST = """
import sys
from device_bench.targets import ssh_wire
from device_bench.targets.ssh import SshTarget
from pathlib import Path
ssh_wire.SOCKET_PARENT = sys.argv[2]
with SshTarget("board", agent=Path(sys.argv[1])) as target:
    target.run({"mode": "memory"})
"""


def test_host_is_killed_while_timing(sshd, target_on, agent_of, tmp_path):
    target_on(sshd)  # for the environment
    host = subprocess.Popen([sys.executable, "-c", HOST, str(agent_of(IDLE_AGENT)), str(tmp_path)], cwd=ROOT)
    wait_until(lambda: running(sshd, AGENT_RUNS), "the agent runs")
    host.kill()
    host.wait()
    soon_clean(sshd)


def test_interrupted_by_the_user(sshd, target_on, agent_of, tmp_path):
    target_on(sshd)
    host = subprocess.Popen([sys.executable, "-c", HOST, str(agent_of(IDLE_AGENT)), str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: running(sshd, AGENT_RUNS), "the agent runs")
    host.send_signal(signal.SIGINT)
    assert host.communicate(timeout=60)[1].rstrip().endswith("KeyboardInterrupt")
    soon_clean(sshd)


def test_stop_from_another_thread(sshd, target_on, agent_of):
    with target_on(sshd, agent=agent_of(IDLE_AGENT)) as target:

        def stop() -> None:
            wait_until(lambda: running(sshd, AGENT_RUNS), "the agent runs")
            target.stop()

        thread = meanwhile(stop)
        with pytest.raises(TargetUnreachable):
            target.run({"mode": "memory"})
        thread.join()
        assert remains(sshd) == []


def number_there(pid: int) -> int:
    """The process id that the board itself sees."""
    return int(Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1])


def test_what_a_dead_session_left_goes_with_the_next(sshd, target_on, agent_of, monkeypatch):
    monkeypatch.setattr(ssh_wire, "CLOSE_TIMEOUT_S", 2.0)  # the dead shell's pulse keeps the session open
    target = target_on(sshd, agent=agent_of(IDLE_AGENT))
    with target:
        (lease,) = {int(name.split("-")[2]) for name in os.listdir(sshd.board.path("/tmp"))}
        (pid,) = [pid for pid in running(sshd, "pocketbert-lease") if number_there(pid) == lease]
        os.kill(pid, signal.SIGKILL)
    assert list(sshd.board.path("/tmp").iterdir())
    with target_on(sshd) as new:
        assert [path.name for path in sshd.board.path("/tmp").iterdir()] == [Path(new.folder).parent.name]
    soon_clean(sshd)


# --- the board -----------------------------------------------------------------------------------------------------


def test_disk_full(sshd, target_on, tmp_path):
    (tmp_path / "big.onnx").write_bytes(os.urandom(9_000_000))
    (tmp_path / "small.onnx").write_bytes(os.urandom(100_000))
    expected = r"board: disk full: big\.onnx \(9\.0 MB\) does not fit into /small/pocketbert-.*, 4\.\d MB are free; .*No space left on device"
    with target_on(sshd, work_folder="/small") as target:
        with pytest.raises(TargetUnreachable, match=expected):
            target.push(tmp_path / "big.onnx")
        target.push(tmp_path / "small.onnx")
    assert remains(sshd, ("/small",)) == []


def path_with(server: Sshd, scripts: dict[str, str], leave_out: tuple[str, ...] = ()) -> None:
    """Restart the board with a PATH of its own: the few tools that are needed, some of them replaced by scripts."""
    folder = server.folder / "keys" / "bin"
    folder.mkdir()
    for name in TOOLS:
        if name not in leave_out:
            (folder / name).symlink_to(shutil.which(name))
    for name, script in scripts.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    server.restart({"PATH": "/board/bin"})


def test_no_python(sshd, target_on):
    path_with(sshd, {})
    assert "board: no python3 there, which the agent runs on; install Python 3.9 or newer" in refusal(target_on(sshd))
    soon_clean(sshd)


def test_old_python(sshd, target_on):
    source = "import sys; sys.version_info = (3, 7, 3); exec(sys.argv[1])"
    path_with(sshd, {"python3": f'#!/bin/sh\nexec {SYSTEM_PYTHON} -c "{source}" "$2"\n'})
    assert "board: python3 there is Python 3.7.3, and the agent needs 3.9 or newer" in refusal(target_on(sshd))


def test_board_without_sha256sum(sshd, target_on, tmp_path):
    path_with(sshd, {"python3": f'#!/bin/sh\nexec {SYSTEM_PYTHON} "$@"\n'}, leave_out=("sha256sum",))
    (tmp_path / "a 'file'").write_bytes(b"1")
    with target_on(sshd) as target:
        assert sshd.board.path(target.push(tmp_path / "a 'file'")).read_bytes() == b"1"


def test_file_that_does_not_arrive_whole(sshd, target_on, tmp_path):
    path_with(sshd, {"cat": '#!/bin/sh\nexec /usr/bin/head -c 100 "$@"\n', "python3": f'#!/bin/sh\nexec {SYSTEM_PYTHON} "$@"\n'})
    (tmp_path / "model.onnx").write_bytes(os.urandom(1000))
    with target_on(sshd) as target:
        with pytest.raises(IntegrityError, match=r"board: model\.onnx did not arrive whole: sha256 \w{12}… there, \w{12}… here"):
            target.push(tmp_path / "model.onnx")
        target.execute(["sh", "-c", 'head() { /usr/bin/head "$@"; }; head -c 1000 /dev/zero > back'], 60)
        with pytest.raises(IntegrityError, match="board: back did not arrive whole from there"):
            target.fetch(f"{target.folder}/back", tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_no_runtime(sshd, target_on, onnx_file, make_job):
    with target_on(sshd) as target:
        assert target.info()["formats"] == {}
        with pytest.raises(BadInput, match=r"board: no runtime for onnx files in /usr/bin/python3.*; --provision brings it there"):
            target.run(make_job(onnx_file))


def test_agent_that_hangs_is_killed_there(sshd, target_on, agent_of):
    target = target_on(sshd, agent=agent_of(IDLE_AGENT), deadline_s=3)
    target.grace_s = 1.0
    with target:
        with pytest.raises(TargetUnreachable, match="board: the agent ran: no end within 4 s; it was killed there"):
            target.run({"mode": "memory"})
        wait_until(lambda: not running(sshd, AGENT_RUNS), "the agent is gone")
        assert target.execute(["echo", "works"], 60).stdout == "works\n"


def test_job_that_is_too_long_is_ended_by_the_agent(provisioned, target_on, onnx_file, make_job):
    with target_on(provisioned, provision=True) as target:
        with pytest.raises(TargetUnreachable, match=r"board: .*no end within 3 s"):
            target.run(make_job(onnx_file, min_seconds=300.0, deadline_s=3))
        assert running(provisioned, AGENT_RUNS) == []


def test_output_that_is_not_json(sshd, target_on, agent_of):
    source = "print('Welcome to board 7 {}')"
    expected = "board: the agent ended with exit code 0; its output is not JSON and starts with 'Welcome to board"
    with target_on(sshd, agent=agent_of(source)) as target, pytest.raises(TargetUnreachable, match=expected):
        target.info()


def test_agent_that_is_killed(sshd, target_on, agent_of):
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    with target_on(sshd, agent=agent_of(source)) as target, pytest.raises(TargetUnreachable, match="board: the agent ended with signal SIGKILL"):
        target.info()


LIBRARY = "int needed(void); int runs(void) { return needed(); }\n"
PACKAGE = """
import ctypes, os
try:
    ctypes.CDLL(os.path.dirname(__file__) + '/runtime.so')
except OSError as error:
    raise ImportError(str(error))
"""
NEWER_LIBC = "int needed(void) { return 0; }\n"


def test_runtime_for_a_newer_glibc_is_named_with_both_versions(sshd, target_on, onnx_file, make_job, tmp_path):
    """A library that needs a symbol of glibc 2.99, as one that was made on a newer system."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to make such a library")
    site = sshd.folder / "keys" / "site"
    (tmp_path / "libc.c").write_text(NEWER_LIBC)
    (tmp_path / "map").write_text("GLIBC_2.99 { needed; };\n")
    (tmp_path / "library.c").write_text(LIBRARY)
    (site / "onnxruntime").mkdir(parents=True)
    compiler, libc = ["gcc", "-shared", "-fPIC", "-nostdlib"], f"{tmp_path}/libc.so.6"
    subprocess.run([*compiler, "-Wl,-soname,libc.so.6", f"-Wl,--version-script={tmp_path}/map", "-o", libc, f"{tmp_path}/libc.c"], check=True)
    subprocess.run([*compiler, "-o", f"{site}/onnxruntime/runtime.so", f"{tmp_path}/library.c", libc], check=True)
    (site / "onnxruntime" / "__init__.py").write_text(PACKAGE)
    (site / "numpy.py").write_text("")
    sshd.restart({"PYTHONPATH": "/board/site"})
    with target_on(sshd) as target:
        own = target.board.glibc
        with pytest.raises(TargetUnreachable, match=rf"the runtime there needs glibc 2\.99, and the board has {own}; --provision"):
            target.run(make_job(onnx_file))


def wheel_or_skip(project: str, python, limits: str) -> Path:
    try:
        return fetch_wheel(project, Machine(python.release, python.platform_tags(), python.where), print, limits)
    except TargetUnreachable as error:
        pytest.skip(f"no old runtime to be had: {error}")


def test_runtime_that_is_too_old_for_the_file_is_named(sshd, target_on, onnx_file, make_job, tmp_path):
    import onnx

    model = onnx.load(onnx_file)
    model.ir_version = 11
    onnx.save(model, tmp_path / "new.onnx")
    with target_on(sshd) as target:
        wheels = [wheel_or_skip(project, target.board, limits) for project, limits in (("onnxruntime", "<1.20"), ("numpy", "<2.2"))]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(sshd.folder / "keys" / "site")
    sshd.restart({"PYTHONPATH": "/board/site"})
    expected = r"board: .*IR version.*; onnxruntime 1\.1\d\.\d there is too old for this file; --provision"
    with target_on(sshd) as target, pytest.raises(TargetUnreachable, match=expected):
        target.run(make_job(tmp_path / "new.onnx"))


# --- provisioning --------------------------------------------------------------------------------------------------


def test_no_room_for_the_runtimes(make_sshd, target_on):
    server = make_sshd(session_environment={"XDG_CACHE_HOME": "/small"})
    expected = r"no room for the runtimes in /small/pocketbert/board: \d+ MB are needed, 4 MB are free"
    with target_on(server) as target, pytest.raises(TargetUnreachable, match=expected):
        provision(target, ["onnx"])
    assert remains(server, ("/small",)) == []


def test_cut_while_provisioning(make_sshd, target_on):
    server = make_sshd()

    def cut_at_numpy(line: str) -> None:
        if "sending numpy" in line:
            server.cut()

    with target_on(server) as target, pytest.raises(TargetUnreachable, match="lost while sending numpy"):
        provision(target, ["onnx"], say=cut_at_numpy)
    soon_clean(server)
    said = []
    with target_on(server) as target:
        provision(target, ["onnx"], say=said.append)
        assert len([path for path in server.board.path(CACHE).iterdir() if path.name.startswith("env-")]) == 1
        assert not any("sending onnxruntime" in line for line in said)
        assert any("sending numpy" in line for line in said)
        unprovision(target)
    assert not server.board.path(CACHE).exists()


def test_runtime_that_does_not_load_there(sshd, target_on):
    """What was brought is tried, and an environment that fails does not appear."""
    (sshd.folder / "keys" / "site").mkdir()
    (sshd.folder / "keys" / "site" / "onnxruntime.py").write_text("raise ImportError('cannot map')\n")
    sshd.restart({"PYTHONPATH": "/board/site"})
    with target_on(sshd) as target:
        with pytest.raises(TargetUnreachable, match=r"does not load there \(Python 3.*\): onnxruntime: ImportError: cannot map"):
            provision(target, ["onnx"])
        assert not [path for path in sshd.board.path(CACHE).iterdir() if path.name.startswith("env-")]


def test_narrow_programs_on_a_wide_kernel(sshd, target_on):
    """Debian's Python for i386 is to x86_64 what a 32-bit Raspberry Pi OS is to its 64-bit kernel."""
    if os.uname().machine != "x86_64":
        pytest.skip("needs an x86_64 kernel, which runs i386 programs")
    root = unpacked(PackageSet(("python3.11-minimal", "libpython3.11-stdlib"), "i386"))
    shutil.copytree(root, sshd.folder / "keys" / "i386", symlinks=True)
    loader = "/board/i386/lib/ld-linux.so.2 --library-path /board/i386/usr/lib/i386-linux-gnu"
    (sshd.folder / "keys" / "python32").write_text(f'#!/bin/sh\nPYTHONHOME=/board/i386/usr exec {loader} /board/i386/usr/bin/python3.11 "$@"\n')
    (sshd.folder / "keys" / "python32").chmod(0o755)
    with target_on(sshd, python="/board/python32") as target:
        assert target.board.architecture == "i686"
        message = r"nothing that runs onnx files fits: no wheel of onnxruntime.* fits \(Python 3\.11, i686 programs on a x86_64 kernel, glibc 2\.36\)"
        with pytest.raises(TargetUnreachable, match=message):
            provision(target, ["onnx"])


def test_python_of_another_name(sshd, target_on):
    with target_on(sshd) as target:
        with pytest.raises(TargetUnreachable, match=r"no python3\.99 there"):
            ask_python(target, "python3.99")
        assert json.loads(target.execute([SYSTEM_PYTHON, "-c", "print(1)"], 60).stdout) == 1
    assert AGENT.is_file()
