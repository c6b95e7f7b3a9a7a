"""Trees of /proc and /sys as three devices show them: what the parsers of both agents must read.

Written down from the kernels' documentation of these files (cpufreq, thermal, power supply, arm64 cpuinfo) and the published
part numbers of the cores; not recorded on the devices.
"""

from __future__ import annotations

from pathlib import Path

CORTEX_A72, CORTEX_A76, CORTEX_A510, CORTEX_A715, CORTEX_X3 = "0xd08", "0xd0b", "0xd46", "0xd4d", "0xd4e"
OLD = "fp asimd evtstrm crc32 cpuid"
DOT = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
NEW = DOT + " sve sve2 i8mm bf16"


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")


def cores(root: Path, parts: list[str], features: str, max_khz: list[int], now_khz: list[int], capacities: list[int] | None, governor: str) -> None:
    blocks = []
    for index, part in enumerate(parts):
        facts = {"processor": index, "BogoMIPS": "108.00", "Features": features, "CPU implementer": "0x41", "CPU part": part, "CPU revision": 1}
        blocks.append("".join(f"{key}\t: {value}\n" for key, value in facts.items()))
        folder = f"sys/devices/system/cpu/cpu{index}"
        write(root, f"{folder}/cpufreq/scaling_governor", f"{governor}\n")
        for name, value in (("cpuinfo_max", max_khz), ("scaling_max", max_khz), ("scaling_cur", now_khz)):
            write(root, f"{folder}/cpufreq/{name}_freq", f"{value[index]}\n")
        if capacities is not None:
            write(root, f"{folder}/cpu_capacity", f"{capacities[index]}\n")
    write(root, "proc/cpuinfo", "\n".join(blocks))


def common(root: Path, memory_kb: int) -> None:
    write(root, "proc/loadavg", "0.31 0.20 0.11 1/180 912\n")
    write(root, "proc/meminfo", f"MemTotal:       {memory_kb} kB\nMemFree:          100000 kB\n")
    write(root, "proc/self/status", "Name:\tagent\nVmHWM:\t   2048 kB\nVmRSS:\t   1024 kB\n")
    write(root, "proc/vmstat", "nr_free_pages 1\noom_kill 0\n")


def raspberry_pi_4(root: Path) -> None:
    """Four equal cores without dot product, once throttled for under-voltage, now capped."""
    common(root, 3884360)
    cores(root, [CORTEX_A72] * 4, OLD, [1800000] * 4, [1500000] * 4, None, "ondemand")
    write(root, "sys/firmware/devicetree/base/model", "Raspberry Pi 4 Model B Rev 1.4\0")
    write(root, "sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    write(root, "sys/class/thermal/thermal_zone0/temp", "71576\n")
    write(root, "sys/devices/platform/soc/soc:firmware/get_throttled", "50002\n")


def raspberry_pi_5(root: Path) -> None:
    """Four equal cores with dot product and a fan at its second level; nothing throttled."""
    common(root, 8245888)
    cores(root, [CORTEX_A76] * 4, DOT, [2400000] * 4, [2400000] * 4, [1024] * 4, "performance")
    write(root, "sys/firmware/devicetree/base/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    write(root, "sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    write(root, "sys/class/thermal/thermal_zone0/temp", "48200\n")
    write(root, "sys/class/thermal/cooling_device0/type", "pwm-fan\n")
    write(root, "sys/class/thermal/cooling_device0/cur_state", "2\n")
    write(root, "sys/devices/platform/soc/soc:firmware/get_throttled", "0\n")
    write(root, "proc/pressure/cpu", "some avg10=1.53 avg60=0.87 avg300=0.40 total=8812\n")
    write(root, "proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")


def phone(root: Path) -> None:
    """Three kinds of cores, zones of one name, a zone and a clock that are kept from the shell, on battery."""
    common(root, 7700000)
    parts = [CORTEX_A510] * 4 + [CORTEX_A715] * 4 + [CORTEX_X3]
    clocks = [1704000] * 4 + [2367000] * 4 + [2914000]
    cores(root, parts, NEW, clocks, [324000] * 4 + [402000] * 4 + [500000], [250] * 4 + [700] * 4 + [1024], "sched_pixel")
    write(root, "sys/devices/system/cpu/cpu8/cpufreq/scaling_cur_freq", "<unknown>\n")
    for number, (kind, temperature) in enumerate((("BIG", "45000"), ("LITTLE", "41000"), ("skin", "33500"), ("skin", "32500"), ("modem", "0"))):
        write(root, f"sys/class/thermal/thermal_zone{number}/type", f"{kind}\n")
        write(root, f"sys/class/thermal/thermal_zone{number}/temp", f"{temperature}\n")
    (root / "sys/class/thermal/thermal_zone10").mkdir()
    for number, (kind, state) in enumerate((("thermal-cpufreq-0", "0"), ("thermal-cpufreq-1", "3"))):
        write(root, f"sys/class/thermal/cooling_device{number}/type", f"{kind}\n")
        write(root, f"sys/class/thermal/cooling_device{number}/cur_state", f"{state}\n")
    write(root, "sys/class/power_supply/usb/type", "USB\n")
    for name, text in (("type", "Battery"), ("capacity", "83"), ("status", "Discharging"), ("current_now", "-412000"), ("voltage_now", "4151000")):
        write(root, f"sys/class/power_supply/battery/{name}", f"{text}\n")
