"""The emulated target without an emulator: what it refuses and why. What it gives is in tests/boards."""

from __future__ import annotations

import os

import pytest

from device_bench import emulator
from device_bench.targets.qemu import QemuTarget
from runtimes.errors import BadInput


@pytest.fixture(autouse=True)
def nothing_set_up(tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETBERT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("mode", ["latency", "sustained"])
def test_emulated_time_is_refused(make_job, onnx_file, mode):
    with pytest.raises(BadInput, match=r"qemu:cortex-a76: emulated time is no device's"):
        QemuTarget("cortex-a76").run(make_job(onnx_file, mode=mode))


def test_emulated_memory_is_refused(make_job, onnx_file):
    with pytest.raises(BadInput, match=r"qemu:cortex-a72: the memory of an emulated process holds the emulator's own"):
        QemuTarget("cortex-a72").run(make_job(onnx_file, mode="memory"))


def test_cores_are_refused(make_job, onnx_file):
    with pytest.raises(BadInput, match=r"qemu:max: cores \[0\]: an emulated process has none of its own; leave cores out"):
        QemuTarget("max").run(make_job(onnx_file, mode="outputs", cores=[0]))


def test_counts_of_several_threads_are_refused(make_job, onnx_file):
    with pytest.raises(BadInput, match=r"qemu:max: instructions are counted exactly with one thread only, not with 2"):
        QemuTarget("max").run(make_job(onnx_file, mode="count", threads=2))


def test_unknown_cpus_and_modes_are_named():
    with pytest.raises(BadInput, match=r"qemu:cortex-x9: no such CPU; there are cortex-a53, cortex-a72, cortex-a76, max, cortex-a7$"):
        QemuTarget("cortex-x9").info()
    with pytest.raises(BadInput, match=r"qemu:max: mode 'race' is none of info, outputs, count"):
        QemuTarget("max").run({"mode": "race"})
    with pytest.raises(BadInput, match=r"sparc: no such architecture; there are aarch64, armv7"):
        emulator.setup("sparc", print)


def test_what_is_not_set_up_is_said_with_the_command_that_does_it(tmp_path):
    with pytest.raises(BadInput, match=r"qemu: no aarch64 emulator with onnxruntime .* is set up; say: pocketbert devices setup qemu"):
        QemuTarget("cortex-a76").info()
    with pytest.raises(BadInput, match=r"qemu: no armv7 emulator with tflite-runtime 2\.14\.0 is set up"):
        QemuTarget("cortex-a7").info()
    assert not os.path.exists(tmp_path / "cache")
