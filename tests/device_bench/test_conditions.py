"""Reading the machine's signals, from a made-up ``/``: what cannot be read is null, never 0."""

from __future__ import annotations

from device_bench.agent.agent import read_conditions, read_memory_bytes, read_state


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")


def test_nothing_readable_is_null(tmp_path):
    assert read_state(tmp_path) == {"loadavg": None, "temperatures_c": None, "frequencies_khz": None}
    conditions = read_conditions(tmp_path, None)
    from_files = ("cpu_model", "board", "isa", "cores", "governors", "max_frequencies_khz", "runtime")
    assert [conditions[key] for key in from_files] == [None] * 7
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


def test_x86(tmp_path):
    write(tmp_path, "proc/cpuinfo", "model name\t: AMD EPYC\nflags\t\t: sse2 avx2 avx512_vnni\n\nmodel name\t: AMD EPYC\n")
    conditions = read_conditions(tmp_path, "onnxruntime 1.31.1")
    assert conditions["cpu_model"] == "AMD EPYC"
    assert conditions["isa"] == ["avx2", "avx512_vnni"]
    assert conditions["runtime"] == "onnxruntime 1.31.1"


def test_arm_board_with_two_kinds_of_cores(tmp_path):
    core = "processor\t: {}\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: {}\n\n"
    write(tmp_path, "proc/cpuinfo", core.format(0, "0xd05") + core.format(1, "0xd0b") + core.format(2, "0xd0b"))
    write(tmp_path, "sys/firmware/devicetree/base/model", "Raspberry Pi 5 Model B\0")
    conditions = read_conditions(tmp_path, None)
    assert conditions["cpu_model"] == "implementer 0x41 part 0xd05 + implementer 0x41 part 0xd0b"
    assert conditions["board"] == "Raspberry Pi 5 Model B"
    assert conditions["isa"] == ["asimd", "asimddp"]


def test_memory_is_in_bytes(tmp_path):
    write(tmp_path, "proc/self/status", "Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n")
    assert read_memory_bytes(tmp_path, "VmHWM") == 2 * 1024**2
    assert read_memory_bytes(tmp_path, "VmRSS") == 1024**2
