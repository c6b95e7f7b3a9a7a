"""The boards of the tests are what they claim to be."""

from __future__ import annotations

import hashlib
import os
import subprocess

from tests.boards.adbd import PHONE_PORT
from tests.boards.board import wait_until
from tests.boards.sshd import accepts


def test_ssh_commands_keep_exit_code_and_streams_apart(sshd):
    done = sshd.ssh("echo out; echo err >&2; exit 7", text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_ssh_file_round_trip(sshd, tmp_path):
    content = os.urandom(20 << 20)
    (tmp_path / "a b").write_bytes(content)
    subprocess.run(["scp", "-q", "-F", str(sshd.config), str(tmp_path / "a b"), "board:/root/a b"], check=True)
    assert sshd.ssh("sha256sum '/root/a b'", text=True).stdout.split()[0] == hashlib.sha256(content).hexdigest()
    assert sshd.board.path("/root/a b").read_bytes() == content
    subprocess.run(["scp", "-q", "-F", str(sshd.config), "board:/root/a b", str(tmp_path / "back")], check=True)
    assert (tmp_path / "back").read_bytes() == content


def test_ssh_board_has_nothing_of_this_machine_but_programs(sshd, tmp_path):
    done = sshd.ssh(f"ls -A /root /tmp; test -e {tmp_path} || echo unseen; touch /usr/bin/x || echo sealed; cat /etc/passwd", text=True)
    assert done.stdout.split("\n")[:6] == ["/root:", "", "/tmp:", "unseen", "sealed", "root:x:0:0:root:/root:/bin/bash"]


def test_ssh_changed_unknown_and_wrong_keys(sshd):
    sshd.change_host_key()
    assert b"REMOTE HOST IDENTIFICATION HAS CHANGED" in sshd.ssh("true").stderr
    sshd.forget_host_key()
    unknown = sshd.ssh("true")
    assert unknown.returncode == 255
    assert b"Host key verification failed" in unknown.stderr
    sshd.trust_host_key()
    assert sshd.ssh("true").returncode == 0
    sshd.use_wrong_key()
    wrong = sshd.ssh("true")
    assert wrong.returncode == 255
    assert b"Permission denied" in wrong.stderr


def test_ssh_connection_is_cut_and_the_command_runs_on(sshd):
    client = subprocess.Popen(["ssh", "-F", str(sshd.config), "board", "exec sleep 1000"], stderr=subprocess.PIPE)
    wait_until(lambda: any(command == "sleep 1000" for command in sshd.board.processes().values()), "the command runs")
    assert sshd.cut() == 1
    stderr = client.communicate(timeout=60)[1]
    assert client.returncode == 255, stderr
    assert "sleep 1000" in sshd.board.processes().values()
    sshd.stop()
    assert sshd.board.processes() == {}


def test_ssh_small_file_system_is_full_after_4_mb(sshd):
    done = sshd.ssh("head -c 10000000 /dev/zero > /small/file", text=True)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert sshd.board.path("/small/file").stat().st_size <= 4 << 20


def test_ssh_board_without_python(make_sshd):
    board = make_sshd(session_environment={"PATH": "/nowhere"})
    assert board.ssh("python3 --version").returncode == 127
    assert board.ssh("test -x /usr/bin/sha256sum").returncode == 0


def test_a_board_that_ends_leaves_no_process(make_sshd):
    board = make_sshd()
    board.ssh("setsid sleep 1000 >/dev/null 2>&1 </dev/null & exit 0")
    wait_until(lambda: "sleep 1000" in board.board.processes().values(), "the command runs")
    (pid,) = [pid for pid, command in board.board.processes().items() if command == "sleep 1000"]
    board.stop()
    assert not os.path.exists(f"/proc/{pid}")


def test_adb_commands_keep_exit_code_and_streams_apart(phone):
    done = phone.run_adb("shell", "echo out; echo err >&2; exit 7", text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_adb_file_round_trip(phone, tmp_path):
    content = os.urandom(20 << 20)
    (tmp_path / "a b").write_bytes(content)
    assert phone.run_adb("push", str(tmp_path / "a b"), "/data/local/tmp/a b").returncode == 0
    assert phone.board.path("/data/local/tmp/a b").read_bytes() == content
    assert phone.run_adb("pull", "/data/local/tmp/a b", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == content


def test_phone_answers_like_a_pixel_and_has_no_python(phone):
    done = phone.run_adb(
        "shell", "getprop ro.product.model; getprop ro.none; getprop | wc -l; dumpsys meminfo $$; which python3 || echo none", text=True
    )
    lines = done.stdout.splitlines()
    assert lines[:3] == ["Pixel 8", "", "9"]
    (total,) = [line.split() for line in lines if "TOTAL PSS:" in line]
    assert int(total[2]) > 0
    assert lines[-1] == "none"


def test_adbd_is_reachable_inside_its_network_only(make_phone):
    phone = make_phone()
    assert not accepts(PHONE_PORT)
    with phone.inside():
        assert accepts(PHONE_PORT)
        assert phone.run_adb("shell", "uname -m").returncode == 0
    assert not accepts(PHONE_PORT)
    assert "ADBUTILS_ADB_PATH" not in os.environ


def test_phone_that_is_unplugged_is_gone(phone):
    phone.unplug()
    assert phone.run_adb("shell", "true").returncode != 0
    assert phone.board.processes() == {}


def test_virtual_machine_is_an_arm_board_that_tells_little_of_itself(vm):
    done = vm.ssh(
        "uname -m; ls /sys/devices/system/cpu/cpu0/cpufreq /sys/class/thermal; python3 -c 'import numpy'; grep -c ^processor /proc/cpuinfo", text=True
    )
    assert done.stdout.splitlines() == ["aarch64", "/sys/class/thermal:", "2"]
    assert "cpufreq': No such file or directory" in done.stderr
    assert "No module named 'numpy'" in done.stderr


def test_virtual_machine_keeps_exit_codes_and_files_over_ssh_and_adb(vm, tmp_path):
    content = os.urandom(5 << 20)
    (tmp_path / "a b").write_bytes(content)
    assert vm.ssh("exit 7").returncode == 7
    subprocess.run(["scp", "-q", "-F", str(vm.config), str(tmp_path / "a b"), "board:/tmp/over ssh"], check=True)
    vm.connect_adb()
    assert vm.adb.run("-s", vm.serial, "shell", "exit 7").returncode == 7
    assert vm.adb.run("-s", vm.serial, "push", str(tmp_path / "a b"), "/data/local/tmp/over adb").returncode == 0
    digest = hashlib.sha256(content).hexdigest()
    sums = vm.adb.run("-s", vm.serial, "shell", "sha256sum '/tmp/over ssh' '/data/local/tmp/over adb'", text=True).stdout
    assert [line.split()[0] for line in sums.splitlines()] == [digest, digest]
    assert vm.adb.run("-s", vm.serial, "pull", "/data/local/tmp/over adb", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == content


def test_virtual_machine_reaches_nobody(vm):
    """Not even this machine, which a board without restrictions finds at 10.0.2.2."""
    probe = f"import socket; socket.create_connection(('10.0.2.2', {vm.port}), timeout=5)"
    assert vm.ssh(f'python3 -c "{probe}"').returncode != 0
