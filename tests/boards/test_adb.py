"""The Android target against a real adbd: real jobs on this machine's processor, and what can go wrong with a phone."""

# ruff: noqa: F811 (fixtures of another folder)

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from device_bench import debian
from device_bench.agent.agent import read_inputs
from device_bench.benchmark_model import measure_signatures
from device_bench.elf import MACHINE_ABIS
from device_bench.runner_build import build_runner, runtime_library
from device_bench.targets import LocalTarget
from device_bench.targets.adb import AdbTarget
from runtimes.errors import BadInput, IntegrityError, TargetUnreachable
from tests.boards.board import wait_until
from tests.boards.conftest import OF_THE_HOST, unpacked
from tests.device_bench.conftest import OUTPUTS, assert_outputs, make_job, onnx_file  # noqa: F401

MACHINE = platform.machine()
OURS = {"ro.product.cpu.abi": MACHINE_ABIS.get(MACHINE), "ro.product.cpu.abilist": MACHINE_ABIS.get(MACHINE)}
WORK = "/data/local/tmp"


@pytest.fixture(scope="session")
def tflite_file(tmp_path_factory) -> Path:
    """Made in a process of its own: the converter brings jax, which warns of every fork from then on."""
    path = tmp_path_factory.mktemp("tflite") / "tiny.tflite"
    source = "import sys, pathlib, tests.device_bench.conftest as c; c.write_tflite(pathlib.Path(sys.argv[1]), *c.weights(), (8, 16))"
    subprocess.run([sys.executable, "-c", source, str(path)], check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def runner() -> Path:
    try:
        return build_runner(MACHINE)
    except BadInput as error:
        pytest.skip(str(error))


@pytest.fixture
def phone(make_phone):
    """A phone with this machine's processor; the whole test runs inside its network."""
    made = make_phone(properties=OURS)
    with made.inside():
        yield made


@pytest.fixture
def make_target(phone, runner):
    def make(serial: str = phone.serial, **options) -> AdbTarget:
        return AdbTarget(serial, **{"runner": runner, "libraries": [runtime_library("onnx"), runtime_library("tflite")], **options})

    return make


@pytest.fixture(scope="session")
def android_shell() -> Path:
    """Root folder with the shell and the commands that Android has, mksh and toybox."""
    return unpacked(debian.PackageSet(("mksh", "toybox"), debian.host_architecture(), without=OF_THE_HOST))


@pytest.fixture(params=["coreutils", "toybox"])
def shell(android_shell, phone, request) -> str:
    """What the phone's commands come from."""
    if request.param == "toybox":
        there = phone.board.path("/system/bin")
        for name in ("mksh", "toybox"):
            shutil.copy(android_shell / "bin" / name, there / name)
        names = subprocess.run([there / "toybox"], capture_output=True, text=True, check=True).stdout.split()
        for path in [path for path in there.iterdir() if path.is_symlink() and path.name in [*names, "sh"]]:
            path.unlink()
            path.symlink_to("mksh" if path.name == "sh" else "toybox")
        assert (there / "ls").readlink() == Path("toybox")
    return request.param


@pytest.fixture
def compile_program(tmp_path):
    """A program in C as the runner of a phone."""

    def build(body: str, *options: str) -> Path:
        source, program = tmp_path / "other.c", tmp_path / "other-runner"
        headers = "".join(f"#include <{name}.h>\n" for name in ("sched", "signal", "stdio", "string", "unistd"))
        source.write_text(f"#define _GNU_SOURCE\n{headers}int main(int count, char **arguments) {{ (void)count; (void)arguments; {body} }}\n")
        subprocess.run(["cc", str(source), "-o", str(program), *options], check=True)
        return program

    return build


def files_on(phone, folder: str = WORK) -> list[str]:
    return sorted(path.name for path in phone.board.path(folder).iterdir())


def working_on(phone) -> list[str]:
    """What runs there beside the daemon."""
    return [command for command in phone.board.processes().values() if "/adbd " not in command]


def assert_clean(phone, folder: str = WORK) -> None:
    wait_until(lambda: not files_on(phone, folder), f"nothing in {folder}; there is {files_on(phone, folder)}")
    wait_until(lambda: not working_on(phone), f"nothing runs; there is {working_on(phone)}")


def in_phone(phone, *command: str) -> None:
    """Run as root in the phone's mounts, with this machine's programs."""
    subprocess.run(["nsenter", "--target", str(phone.board.pid), "--mount", *command], check=True)


def endless(job: dict) -> dict:
    return {**job, "min_seconds": 1000.0, "deadline_s": 120.0}


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_info(make_target):
    with make_target() as target:
        info = target.info()
    assert set(info["formats"]) == {"onnx", "tflite"}
    assert info["formats"]["onnx"].startswith("onnxruntime ")
    conditions = info["conditions"]
    assert conditions["agent"].startswith("c runner")
    assert conditions["board"] == "Google Pixel 8"
    assert conditions["phone"] == {
        "manufacturer": "Google", "model": "Pixel 8", "soc": {"manufacturer": "Google", "model": "Tensor G3", "platform": "zuma"},
        "android": "14", "sdk": 34, "abis": [MACHINE_ABIS[MACHINE]], "work_folder": WORK, "fixed_performance": False,
    }  # fmt: skip
    assert conditions["before"]["thermal_status"] == "none"
    assert conditions["before"]["battery"]["charging"] is True
    assert conditions["before"]["battery"]["temperature_c"] == 29.1


@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_outputs_are_those_of_this_machine_bit_for_bit(make_target, make_job, request, tmp_path, format):
    job = make_job(request.getfixturevalue(f"{format}_file"), mode="outputs")
    LocalTarget().run({**job, "output": str(tmp_path / "here")})
    with make_target() as target:
        answer = target.run({**job, "output": str(tmp_path / "there")})
    assert answer["outputs"] == OUTPUTS
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


def test_latency_and_memory(shell, make_target, make_job, onnx_file):
    with make_target() as target:
        latency = target.run(make_job(onnx_file, cores=[0]))
        memory = target.run(make_job(onnx_file, mode="memory"))["memory"]
    (case,) = latency["cases"]
    assert case["count"] == len(case["samples_ns"]) >= 12
    assert latency["conditions"]["affinity"] == [0]
    assert latency["conditions"]["after"]["temperatures_c"]
    assert memory["peak_bytes"] >= memory["baseline_bytes"] > 0
    assert memory["dumpsys_pss_bytes"] > 0


def test_arm_machine_agrees_with_this_one(vm, aarch64, make_job, onnx_file, tmp_path):
    """Its time is emulated and says nothing; that the runner, the library and the model work there does."""
    vm.connect_adb()
    job = make_job(onnx_file, mode="outputs")
    LocalTarget().run({**job, "output": str(tmp_path / "here")})
    runner = build_runner("aarch64", str(aarch64.compiler))
    with vm.adb.found_by_default(), AdbTarget(vm.serial, runner=runner, libraries=[aarch64.library("onnx")]) as target:
        answer = target.run({**job, "output": str(tmp_path / "there")})
        memory = target.run({**job, "mode": "memory"})["memory"]
    assert answer["conditions"]["architecture"] == "aarch64"
    assert "asimddp" in answer["conditions"]["isa"]
    assert memory["peak_bytes"] > memory["baseline_bytes"] > 0
    here, there = (read_inputs(str(tmp_path / name))[1] for name in ("here", "there"))
    assert_outputs(there, here, atol=1e-6)


def test_big_cores_where_all_are_alike(make_target, make_job, onnx_file):
    with make_target() as target, pytest.raises(BadInput, match=r"big.*leave cores out"):
        target.run(make_job(onnx_file, cores="big"))


def test_wrong_model_is_refused_and_the_session_goes_on(make_target, make_job, onnx_file, tflite_file):
    with make_target() as target:
        with pytest.raises(IntegrityError, match="golden"):
            target.run(make_job(onnx_file, tolerance=0.0))
        assert target.run(make_job(tflite_file))["cases"]


def test_file_name_with_spaces_and_quotes(make_target, make_job, onnx_file, tmp_path):
    odd = tmp_path / "it's a $HOME of `models`.onnx"
    shutil.copy(onnx_file, odd)
    with make_target() as target:
        assert target.run(make_job(odd))["cases"]


def test_files_go_over_once_into_a_private_folder(phone, make_target, make_job, onnx_file):
    with make_target() as target:
        target.run(make_job(onnx_file))
        folder = phone.board.path(target.folder)
        sent = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "job" not in path.name}
        target.run(make_job(onnx_file, mode="memory"))
        assert {path: path.stat().st_mtime_ns for path in sent} == sent
        assert folder.stat().st_mode & 0o077 == 0
        assert files_on(phone) == [Path(target.folder).name]
    assert_clean(phone)


# --- which phone ----------------------------------------------------------------------------------------------------


def test_only_phone_needs_no_serial(make_target, phone):
    with make_target("") as target:
        assert target.name == f"adb:{phone.serial}"


def test_two_phones_and_no_serial(make_target, phone):
    assert b"connected to" in phone.run_adb("connect", "localhost:5655").stdout
    with pytest.raises(BadInput, match=r"2 phones; name one: adb:\S+:5655, adb:\S+:5655$"), make_target(""):
        pass


def test_unknown_serial_names_those_that_are_there(make_target, phone):
    said = rf"adb:R5CT12: no such phone is connected; there are: {phone.serial} \(device\)"
    with pytest.raises(TargetUnreachable, match=said), make_target("R5CT12"):
        pass


def test_wireless_phone_is_connected_for_the_session(make_target, phone):
    phone.run_adb("disconnect", check=True)
    with make_target() as target:
        assert target.info()["conditions"]["phone"]["model"] == "Pixel 8"
    assert phone.serial.encode() not in phone.run_adb("devices").stdout


def test_wireless_phone_that_is_not_there(make_target):
    with pytest.raises(TargetUnreachable, match=r"adb:127\.0\.0\.1:5999: .*refused.*wireless debugging"), make_target("127.0.0.1:5999"):
        pass


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_runner_for_another_processor_is_refused_before_it_is_sent(make_phone, make_job, runner, onnx_file):
    other = make_phone(properties={"ro.product.cpu.abilist": "armeabi-v7a,armeabi"})
    with other.inside(), AdbTarget(other.serial, runner=runner, libraries=[runtime_library("onnx")]) as target:
        with pytest.raises(BadInput, match=r"runner .* is for .*, the phone runs armeabi-v7a, armeabi; build one .*build-runner armv7l"):
            target.run(make_job(onnx_file))
        assert list(other.board.path(target.folder).iterdir()) == []


def test_library_for_another_processor(make_target, make_job, onnx_file, tmp_path):
    foreign = tmp_path / "libonnxruntime.so"
    foreign.write_bytes(b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x03\x00\x28\x00" + bytes(100))
    with make_target(libraries=[foreign]) as target, pytest.raises(BadInput, match=r"libonnxruntime.so: is for armeabi-v7a, not for"):
        target.run(make_job(onnx_file))


def test_runner_for_another_system(make_target, make_job, onnx_file, compile_program):
    android = compile_program("return 0;", "-Wl,--dynamic-linker=/system/bin/linker64")
    with make_target(runner=android) as target, pytest.raises(BadInput, match=r"needs /system/bin/linker64, .* not built for Linux with glibc"):
        target.run(make_job(onnx_file))


def test_no_runner_and_no_compiler_for_the_phone(phone, make_target, make_job, onnx_file, monkeypatch):
    monkeypatch.delenv("ANDROID_NDK_HOME", raising=False)
    phone.board.path("/board/properties").write_text("ro.product.cpu.abilist=arm64-v8a\n")
    phone.board.path("/system/bin/linker64").touch()
    with make_target(runner=None) as target, pytest.raises(BadInput, match=r"no compiler for arm64-v8a: .*NDK.*build-runner arm64-v8a"):
        target.run(make_job(onnx_file))


def test_no_library(phone, make_target, make_job, onnx_file, tflite_file):
    with make_target(libraries=[runtime_library("tflite")]) as target, pytest.raises(BadInput, match=r"no libonnxruntime.so .* the runtime's wheel"):
        target.run(make_job(onnx_file))
    phone.board.path("/system/bin/linker64").touch()
    with make_target(libraries=[]) as target, pytest.raises(BadInput, match=r"no libLiteRt.so .* AAR com.google.ai.edge.litert:litert"):
        target.run(make_job(tflite_file))


def test_library_that_cannot_be_opened(make_target, tmp_path):
    short = tmp_path / "libonnxruntime.so"
    short.write_bytes(runtime_library("onnx").read_bytes()[:1000000])
    with make_target(libraries=[short]) as target, pytest.raises(BadInput, match=r"libonnxruntime.so"):
        target.info()


def test_place_without_programs(phone, make_target, make_job, onnx_file):
    in_phone(phone, "mount", "-o", "remount,noexec", f"/proc/{phone.board.pid}/root{WORK}")
    with make_target() as target, pytest.raises(TargetUnreachable, match=r"does not let programs run .*name another work folder"):
        target.run(make_job(onnx_file))
    assert_clean(phone)


def test_no_work_folder(make_target):
    said = r"no work folder can be made: .*/nowhere.*name another work folder"
    with pytest.raises(TargetUnreachable, match=said), make_target(work_folder="/nowhere"):
        pass


# --- phones that answer little --------------------------------------------------------------------------------------


def test_linux_board_with_the_debug_daemon(make_phone, runner, make_job, onnx_file):
    phone = make_phone(properties=OURS, memory={"/tmp": 1 << 30})
    for command in ("getprop", "dumpsys", "sha256sum"):
        phone.board.path(f"/system/bin/{command}").unlink()
    in_phone(phone, "umount", f"/proc/{phone.board.pid}/root{WORK}")
    phone.board.path(WORK).rmdir()
    with phone.inside(), AdbTarget(phone.serial, runner=runner, libraries=[runtime_library("onnx")]) as target:
        conditions = target.run(make_job(onnx_file))["conditions"]
        assert target.folder.startswith("/tmp/pocketbert-")
    assert conditions["phone"]["work_folder"] == "/tmp"
    assert conditions["phone"]["model"] is None
    assert (conditions["before"]["thermal_status"], conditions["before"]["battery"]) == (None, None)
    assert_clean(phone, "/tmp")


def test_fixed_performance_ends_with_the_session(phone, make_target):
    log = phone.board.path("/board/performance")
    shim = phone.board.path("/system/bin/cmd")
    shim.write_text('#!/bin/sh\necho "$3" >> /board/performance\n')
    shim.chmod(0o755)
    with make_target(fixed_performance=True) as target:
        assert log.read_text() == "true\n"
        assert target.info()["conditions"]["phone"]["fixed_performance"] is True
    assert log.read_text() == "true\nfalse\n"


def test_phone_without_fixed_performance(phone, make_target):
    shim = phone.board.path("/system/bin/cmd")
    shim.write_text("#!/bin/sh\necho 'mode is not supported' >&2; exit 255\n")
    shim.chmod(0o755)
    with pytest.raises(TargetUnreachable, match="mode is not supported; leave fixed performance out"), make_target(fixed_performance=True):
        pass
    assert_clean(phone)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_full_storage(make_phone, make_job, runner, onnx_file):
    phone = make_phone(properties=OURS, memory={"/small": 4 << 20})
    target = AdbTarget(phone.serial, runner=runner, libraries=[runtime_library("onnx")], work_folder="/small")
    said = r"libonnxruntime.so.* MB\) cannot be written .*No space left on device; free some space"
    with phone.inside():
        with target, pytest.raises(TargetUnreachable, match=said):
            target.run(make_job(onnx_file))
        assert_clean(phone, "/small")


def test_file_that_does_not_arrive_whole(phone, make_target, make_job, onnx_file):
    lying = phone.board.path("/system/bin/sha256sum")
    lying.unlink()
    lying.write_text('#!/bin/sh\necho "0000000000000000  $1"\n')
    lying.chmod(0o755)
    with make_target() as target, pytest.raises(IntegrityError, match="did not arrive whole: sha256 000000000000… there"):
        target.run(make_job(onnx_file))


def test_unplugged_while_sending(phone, make_target, tmp_path):
    """A file that grows while it is sent, so that the cable is pulled in the middle of it for certain."""
    endless_file = tmp_path / "endless"
    os.mkfifo(endless_file)

    def feed() -> None:
        with endless_file.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    if phone.board.path(f"{target.folder}/part").exists():
                        phone.unplug()
                    time.sleep(0.01)
            except BrokenPipeError:
                return

    with make_target() as target:
        feeding = threading.Thread(target=feed)
        feeding.start()
        with pytest.raises(TargetUnreachable, match=r"the connection broke while sending endless: .*(plug it in|unplug it)"):
            target.send(endless_file, f"{target.folder}/part")
        feeding.join()


def test_unplugged_while_timing(phone, make_target, make_job, onnx_file):
    def pull() -> None:
        wait_until(lambda: any("--mode latency" in command for command in working_on(phone)), "the job runs")
        phone.unplug()

    with make_target() as target:
        pulling = threading.Thread(target=pull)
        pulling.start()
        with pytest.raises(TargetUnreachable, match=r"the connection broke while running .*(plug it in|unplug it)"):
            target.run(endless(make_job(onnx_file)))
        pulling.join()


def test_server_that_ends_while_timing(phone, make_target, make_job, onnx_file):
    def kill() -> None:
        wait_until(lambda: any("--mode latency" in command for command in working_on(phone)), "the job runs")
        phone.adb.stop()

    with make_target() as target:
        killing = threading.Thread(target=kill)
        killing.start()
        with pytest.raises(TargetUnreachable, match="the connection broke while running"):
            target.run(endless(make_job(onnx_file)))
        killing.join()
    assert_clean(phone)


def test_stopped_from_another_thread(phone, make_target, make_job, onnx_file):
    def stop() -> None:
        wait_until(lambda: any("--mode latency" in command for command in working_on(phone)), "the job runs")
        target.stop()

    with make_target() as target:
        stopping = threading.Thread(target=stop)
        stopping.start()
        with pytest.raises(TargetUnreachable):
            target.run(endless(make_job(onnx_file)))
        stopping.join()
        assert_clean(phone)
        with pytest.raises(TargetUnreachable, match="not connected"):
            target.info()


def test_killed_host_leaves_nothing(phone, make_target, make_job, runner, onnx_file, tmp_path):
    """Killed in the middle of a job, so that nothing of it can clean up."""
    (tmp_path / "job").write_text(json.dumps(endless(make_job(onnx_file))))
    source = (
        "import json, sys, pathlib\nfrom device_bench.targets.adb import AdbTarget\n"
        "serial, runner, library, job = sys.argv[1:]\n"
        "with AdbTarget(serial, runner=pathlib.Path(runner), libraries=[pathlib.Path(library)]) as target:\n"
        "    target.run(json.loads(pathlib.Path(job).read_text()))\n"
    )
    host = subprocess.Popen([sys.executable, "-c", source, phone.serial, str(runner), str(runtime_library("onnx")), str(tmp_path / "job")])
    try:
        wait_until(lambda: any("--mode latency" in command for command in working_on(phone)), "the job runs")
    finally:
        host.send_signal(signal.SIGKILL)
        host.wait()
    assert_clean(phone)


def test_job_that_hangs_is_killed_there(phone, shell, make_target, compile_program):
    """It ignores the end of its input and the signal of the closed connection, as a process in a driver's loop would."""
    stubborn = compile_program("signal(SIGHUP, SIG_IGN); signal(SIGPIPE, SIG_IGN); for (;;) pause();")
    with make_target(runner=stubborn) as target:
        target.deadline_s, target.grace_s = 1.0, 0.5
        with pytest.raises(TargetUnreachable, match=r"other-runner did not end within 1.5 s; it was killed there"):
            target.info()
        wait_until(lambda: not any("other-runner" in command for command in working_on(phone)), "the stubborn program has ended")
    assert_clean(phone)


def test_output_that_is_not_json(make_target, compile_program):
    said = "its output is not JSON and starts with 'Welcome to the shell"
    with make_target(runner=compile_program('puts("Welcome to the shell"); return 0;')) as target, pytest.raises(TargetUnreachable, match=said):
        target.info()


def test_job_that_crashes(make_target, compile_program):
    with make_target(runner=compile_program("raise(SIGSEGV); return 0;")) as target, pytest.raises(TargetUnreachable, match="signal SIGSEGV"):
        target.info()


def test_dead_folders_are_removed_and_living_ones_are_not(phone, shell, make_target):
    """The shell that keeps a folder is killed, as when the phone restarts or debugging is switched off."""
    phone.board.path(f"{WORK}/pocketbert-notes").mkdir()
    worker_folder = phone.board.path(f"{WORK}/pocketbert-99999-12345")
    worker_folder.mkdir()
    left_over = subprocess.Popen(
        [phone.adb.program, "-s", phone.serial, "shell", f"cd {WORK}/pocketbert-99999-12345 && exec sleep 1000"], stdin=subprocess.DEVNULL
    )
    try:
        with make_target() as living:
            with make_target() as killed:
                (lease,) = [pid for pid in phone.board.processes() if pid_there(pid) == Path(killed.folder).name.split("-")[1]]
                os.kill(lease, signal.SIGKILL)
            assert Path(killed.folder).name in files_on(phone)
            with make_target() as target:
                assert files_on(phone) == sorted(["pocketbert-notes", Path(living.folder).name, Path(target.folder).name])
            assert left_over.wait(60) != 0
            assert set(living.info()["formats"]) == {"onnx", "tflite"}
    finally:
        left_over.kill()
        left_over.wait()
    assert files_on(phone) == ["pocketbert-notes"]


def pid_there(pid: int) -> str:
    """What the phone calls a process."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid:")]
    return line.split()[-1]


# --- TFLite's benchmark_model ---------------------------------------------------------------------------------------

# A program with its options and its words, because the real one is nowhere to be had for these tests; it writes down how it was called.
BENCHMARK_MODEL = r"""
    const char *signature = "";
    int peak = 0;
    FILE *calls = fopen("calls", "a");
    for (int i = 1; i < count; i++) {
        fprintf(calls, "%s ", arguments[i]);
        if (strncmp(arguments[i], "--signature_to_run_for=", 23) == 0) signature = arguments[i] + 23;
        peak |= strcmp(arguments[i], "--report_peak_memory_footprint=true") == 0;
    }
    cpu_set_t cores;
    sched_getaffinity(0, sizeof cores, &cores);
    fprintf(calls, "on %d cores\n", CPU_COUNT(&cores));
    fclose(calls);
    fprintf(stderr, "INFO: STARTING!\nINFO: Signature to run: [%s]\nINFO: Initialized session in 1.5ms.\n", KNOWS ? signature : "");
    fprintf(stderr, "INFO: count=16 first=900 curr=500 min=500 max=900 avg=525 std=97\n\n");
    fprintf(stderr, "INFO: count=%d first=510 curr=500 min=490 max=600 avg=501.5 std=12 p5=491 median=500 p95=520\n\n", peak ? 1 : 1990);
    fprintf(stderr, "INFO: Inference timings in us: Init: 1500, First inference: 900, Warmup (avg): 525, Inference (avg): 501.5\n");
    fprintf(stderr, "INFO: Memory footprint delta from the start of the tool (MB): init=2 overall=3.5\n");
    if (peak) fprintf(stderr, "INFO: Overall peak memory footprint (MB) via periodic monitoring: 5\n");
    return 0;
"""


def test_benchmark_model_beside_the_runner(phone, make_target, make_job, compile_program, tflite_file):
    binary = compile_program(BENCHMARK_MODEL, "-DKNOWS=1")
    with make_target() as target:
        rows = measure_signatures(target, binary, make_job(tflite_file, cores=[1]), lengths=[3, 5, 12], xnnpack=True)
        (there,) = [path for path in phone.board.path(target.folder).glob("*tiny.tflite")]
        calls = [line.split() for line in phone.board.path(f"{target.folder}/calls").read_text().splitlines()]
    assert [(row["engine"], row["length"], row["golden"], row["inputs"]) for row in rows] == [
        ("benchmark_model", 8, "c runner", "in range"), ("benchmark_model", 16, "c runner", "in range"),
    ]  # fmt: skip
    row = rows[0]
    assert (row["count"], row["mean_ms"], row["p50_ms"], row["init_ms"], row["first_inference_ms"]) == (1990, 0.5015, 0.5, 1.5, 0.9)
    assert row["memory"] == {"init_bytes": 2 << 20, "overall_bytes": 7 << 19, "peak_bytes": 5 << 20}
    assert row["conditions"]["phone"]["model"] == "Pixel 8"
    timing, footprint = calls[:2]
    assert f"--graph={target.folder}/{there.name}" in timing
    assert {"--num_threads=1", "--use_xnnpack=true", "--signature_to_run_for=serving_8", "--warmup_runs=16", "--num_runs=128"} <= set(timing)
    (ranges,) = [argument.partition("=")[2].split(":") for argument in timing if argument.startswith("--input_layer_value_range")]
    assert sorted(part.partition(",")[2] for part in ranges) == ["0,0", "0,11", "1,1"]  # token types, ids of the texts, a full mask
    assert "--report_peak_memory_footprint=true" not in timing
    assert "--report_peak_memory_footprint=true" in footprint
    assert timing[-3:] == ["on", "1", "cores"]


def test_benchmark_model_times_no_wrong_model(phone, make_target, make_job, compile_program, tflite_file):
    with make_target() as target:
        with pytest.raises(IntegrityError, match="golden"):
            measure_signatures(target, compile_program(BENCHMARK_MODEL, "-DKNOWS=1"), make_job(tflite_file, tolerance=0.0))
        assert not phone.board.path(f"{target.folder}/calls").exists()


def test_benchmark_model_that_knows_no_signatures(make_target, make_job, compile_program, tflite_file):
    old = compile_program(BENCHMARK_MODEL, "-DKNOWS=0")
    with make_target() as target:
        assert [row["length"] for row in measure_signatures(target, old, make_job(tflite_file), lengths=[8])] == [8]
        with pytest.raises(BadInput, match=r"cannot run serving_16, only the file's first signature"):
            measure_signatures(target, old, make_job(tflite_file), lengths=[16])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (r'fprintf(stderr, "ERROR: Failed to load model m.tflite\n"); return 1;', "ended with 1: 'ERROR: Failed to load model"),
        ('puts("usage: other"); return 0;', "no finished run in the log that benchmark_model printed: 'usage: other'"),
    ],
)
def test_benchmark_model_that_fails(make_target, make_job, compile_program, tflite_file, body, said):
    with make_target() as target, pytest.raises(TargetUnreachable, match=said):
        measure_signatures(target, compile_program(body), make_job(tflite_file, golden=None))


def test_benchmark_model_asked_for_what_it_cannot_do(make_target, make_job, compile_program, tflite_file, tmp_path):
    binary = compile_program("return 0;")
    (tmp_path / "script").write_text("#!/bin/sh\n")
    with make_target() as target:
        with pytest.raises(BadInput, match=r"lengths: 17 tokens are more than tiny\.tflite takes"):
            measure_signatures(target, binary, make_job(tflite_file), lengths=[17])
        with pytest.raises(BadInput, match="cores 'big': all cores are alike here"):
            measure_signatures(target, binary, make_job(tflite_file, golden=None, cores="big"))
        with pytest.raises(BadInput, match="script: is no program"):
            measure_signatures(target, tmp_path / "script", make_job(tflite_file))
