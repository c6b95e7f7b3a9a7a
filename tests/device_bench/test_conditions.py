"""Reading the machine's signals, from a made-up ``/``: what cannot be read is null, never 0."""

from __future__ import annotations

import pytest

from device_bench.agent.agent import AgentError, choose_cores, read_conditions, read_memory_bytes, read_state
from tests.device_bench.trees import phone, raspberry_pi_4, raspberry_pi_5, write

STATE = {"loadavg", "temperatures_c", "frequencies_khz", "throttled", "cooling", "battery", "pressure"}


def test_nothing_readable_is_null(tmp_path):
    assert read_state(tmp_path) == dict.fromkeys(STATE)
    conditions = read_conditions(tmp_path, None)
    from_files = ("cpu_model", "board", "isa", "cores", "capacities", "governors", "max_frequencies_khz", "clusters", "memory_total_bytes", "runtime")
    assert [conditions[key] for key in from_files] == [None] * len(from_files)
    assert read_memory_bytes(tmp_path, "VmRSS") is None


def test_single_signals_are_null_where_the_driver_does_not_know(tmp_path):
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "48312\n")
    write(tmp_path, "sys/class/thermal/thermal_zone1/temp", "0\n")
    (tmp_path / "sys/class/thermal/thermal_zone2").mkdir()
    write(tmp_path, "sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq", "<unknown>\n")
    for name, value in (("governor", "ondemand"), ("cur_freq", "1500000"), ("max_freq", "2400000")):
        write(tmp_path, f"sys/devices/system/cpu/cpu2/cpufreq/scaling_{name}", f"{value}\n")
    write(tmp_path, "sys/devices/system/cpu/cpufreq/boost", "1")
    write(tmp_path, "proc/loadavg", "0.00 0.50 1.25 1/200 4242\n")
    state = read_state(tmp_path)
    assert state["temperatures_c"] == {"thermal_zone0": 48.312, "thermal_zone1": None, "thermal_zone2": None}
    assert state["frequencies_khz"] == [1500000, None]
    assert state["loadavg"] == [0.0, 0.5, 1.25]
    conditions = read_conditions(tmp_path, None)
    assert conditions["cores"] == [2, 10]
    assert conditions["governors"] == ["ondemand", None]
    assert conditions["max_frequencies_khz"] == [2400000, None]
    assert conditions["clusters"] is None


def test_x86(tmp_path):
    write(tmp_path, "proc/cpuinfo", "model name\t: AMD EPYC\nflags\t\t: sse2 avx2 avx512_vnni\n\nmodel name\t: AMD EPYC\n")
    conditions = read_conditions(tmp_path, "onnxruntime 1.31.1")
    assert conditions["cpu_model"] == "AMD EPYC"
    assert conditions["isa"] == ["avx2", "avx512_vnni"]
    assert conditions["runtime"] == "onnxruntime 1.31.1"


def test_raspberry_pi_4(tmp_path):
    raspberry_pi_4(tmp_path)
    conditions, state = read_conditions(tmp_path, None), read_state(tmp_path)
    assert conditions["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert conditions["cpu_model"] == "implementer 0x41 part 0xd08"
    assert conditions["isa"] == ["asimd"]
    assert conditions["governors"] == ["ondemand"] * 4
    assert conditions["memory_total_bytes"] == 3884360 * 1024
    assert conditions["capacities"] is None
    assert conditions["clusters"] == [{"cores": [0, 1, 2, 3], "capacity": None, "max_frequency_khz": 1800000}]
    assert state["throttled"] == 0x50002
    assert state["temperatures_c"] == {"cpu-thermal": 71.576}
    assert state["frequencies_khz"] == [1500000] * 4
    assert state["battery"] is state["cooling"] is state["pressure"] is None


def test_raspberry_pi_5(tmp_path):
    raspberry_pi_5(tmp_path)
    conditions, state = read_conditions(tmp_path, None), read_state(tmp_path)
    assert conditions["isa"] == ["asimd", "asimdhp", "asimddp"]
    assert conditions["clusters"] == [{"cores": [0, 1, 2, 3], "capacity": 1024, "max_frequency_khz": 2400000}]
    assert state["throttled"] == 0
    assert state["cooling"] == {"pwm-fan": 2}
    assert state["pressure"] == {"cpu": 1.53, "memory": 0.0}


def test_phone(tmp_path):
    phone(tmp_path)
    conditions, state = read_conditions(tmp_path, None), read_state(tmp_path)
    assert conditions["cpu_model"] == " + ".join(f"implementer 0x41 part {part}" for part in ("0xd46", "0xd4d", "0xd4e"))
    assert [cluster["cores"] for cluster in conditions["clusters"]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [cluster["capacity"] for cluster in conditions["clusters"]] == [250, 700, 1024]
    assert conditions["isa"] == ["asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"]
    assert state["frequencies_khz"] == [324000] * 4 + [402000] * 4 + [None]
    assert state["temperatures_c"] == {
        "BIG": 45.0, "LITTLE": 41.0, "skin": 33.5, "skin thermal_zone3": 32.5, "modem": None, "thermal_zone10": None,
    }  # fmt: skip
    assert state["cooling"] == {"thermal-cpufreq-0": 0, "thermal-cpufreq-1": 3}
    assert state["battery"] == {"capacity_percent": 83, "status": "Discharging", "current_ua": -412000, "voltage_uv": 4151000}
    assert state["throttled"] is None


def test_big_and_little_cores(tmp_path):
    phone(tmp_path)
    assert choose_cores("big", tmp_path) == [8]
    assert choose_cores("little", tmp_path) == [0, 1, 2, 3]
    assert choose_cores([5, 2], tmp_path) == [5, 2]


def test_big_cores_by_their_clock_where_the_kernel_gives_no_capacity(tmp_path):
    phone(tmp_path)
    for path in tmp_path.glob("sys/devices/system/cpu/cpu*/cpu_capacity"):
        path.unlink()
    assert choose_cores("big", tmp_path) == [8]


def test_cores_that_are_all_alike_or_unknown_are_neither_big_nor_little(tmp_path):
    with pytest.raises(AgentError, match="the machine does not say"):
        choose_cores("little", tmp_path)
    raspberry_pi_5(tmp_path)
    with pytest.raises(AgentError, match="all cores are alike"):
        choose_cores("big", tmp_path)


def test_memory_is_in_bytes(tmp_path):
    raspberry_pi_4(tmp_path)
    assert read_memory_bytes(tmp_path, "VmHWM") == 2 * 1024**2
    assert read_memory_bytes(tmp_path, "VmRSS") == 1024**2
