"""What Android's commands print: several versions and makers, and what is not said is null."""

from __future__ import annotations

import pytest

from device_bench.android import describe_phone, parse_battery, parse_properties, parse_thermal

PIXEL_PROPERTIES = """\
[ro.board.platform]: [zuma]
[ro.build.version.release]: [14]
[ro.build.version.sdk]: [34]
[ro.empty]: []
[ro.product.cpu.abi]: [arm64-v8a]
[ro.product.cpu.abilist]: [arm64-v8a]
[ro.product.manufacturer]: [Google]
[ro.product.model]: [Pixel 8]
[ro.soc.manufacturer]: [Google]
[ro.soc.model]: [Tensor G3]
[sys.boot.reason.history]: [reboot,ota,1700000000
reboot,1690000000]
"""
BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Dock powered: false
  Max charging current: 500000
  status: 2
  health: 2
  present: true
  level: 87
  scale: 100
  voltage: 4213
  temperature: 291
  technology: Li-ion
"""
SAMSUNG_BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: false
  Wireless powered: false
  status: 3
  health: 2
  present: true
  level: 100
  scale: 200
  voltage: 3871
  temperature: -15
  technology: Li-ion
  LED Charging: true
Battery service of the maker:
  level: 3
  status: 5
"""
THERMAL = """\
IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 2
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=99.0, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
HAL Ready: true
HAL connection:
\tThermalHAL AIDL 2  connected: yes
Current temperatures from HAL:
\tTemperature{mValue=61.4, mType=0, mName=BIG, mStatus=0}
\tTemperature{mValue=NaN, mType=1, mName=G3D, mStatus=0}
\tTemperature{mValue=29.3, mType=2, mName=battery, mStatus=0}
\tTemperature{mValue=4168.0, mType=6, mName=vbat, mStatus=0}
\tTemperature{mValue=1250.0, mType=7, mName=ibat, mStatus=0}
\tTemperature{mValue=87.0, mType=8, mName=soc, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=0, mType=2, mName=thermal-cpufreq-0}
Temperature static thresholds from HAL:
\tTemperatureThreshold{mType=3, mName=VIRTUAL-SKIN, mHotThrottlingThresholds=[NaN, 39.0]}
"""


def test_properties():
    properties = parse_properties(PIXEL_PROPERTIES)
    assert properties["ro.soc.model"] == "Tensor G3"
    assert properties["sys.boot.reason.history"] == "reboot,ota,1700000000\nreboot,1690000000"
    assert "ro.empty" not in properties
    assert parse_properties(PIXEL_PROPERTIES.replace("\n", "\r\n")) == properties
    assert parse_properties("/system/bin/sh: getprop: inaccessible or not found\n") == {}


def test_phone():
    assert describe_phone(parse_properties(PIXEL_PROPERTIES)) == {
        "manufacturer": "Google", "model": "Pixel 8", "soc": {"manufacturer": "Google", "model": "Tensor G3", "platform": "zuma"},
        "android": "14", "sdk": 34, "abis": ["arm64-v8a"],
    }  # fmt: skip


def test_older_phone_and_one_that_is_none():
    older = describe_phone({"ro.product.cpu.abilist": "arm64-v8a,armeabi-v7a,armeabi", "ro.build.version.sdk": "Tiramisu"})
    assert older["abis"] == ["arm64-v8a", "armeabi-v7a", "armeabi"]
    assert older["sdk"] is None
    nothing = describe_phone({})
    assert nothing.pop("soc") == {"manufacturer": None, "model": None, "platform": None}
    assert set(nothing.values()) == {None}


def test_battery():
    assert parse_battery(BATTERY) == {
        "capacity_percent": 87, "status": "Charging", "charging": True, "plugged": "USB", "temperature_c": 29.1, "voltage_uv": 4213000,
        "current_ua": None,
    }  # fmt: skip


def test_battery_first_section_counts_and_level_is_a_share_of_scale():
    battery = parse_battery(SAMSUNG_BATTERY)
    assert (battery["capacity_percent"], battery["status"], battery["charging"], battery["plugged"]) == (50, "Discharging", False, "no")
    assert battery["temperature_c"] == -1.5


@pytest.mark.parametrize(("status", "word", "charging"), [(4, "Not charging", False), (5, "Full", False), (1, None, None), ("?", None, None)])
def test_battery_status(status, word, charging):
    battery = parse_battery(BATTERY.replace("status: 2", f"status: {status}"))
    assert (battery["status"], battery["charging"]) == (word, charging)


@pytest.mark.parametrize(
    "text",
    [
        "", "Can't find service: battery\n", BATTERY.replace("present: true", "present: false"),
        BATTERY.replace("state:\n", "state:\n  (UPDATES STOPPED -- use 'reset' to restart)\n"),
    ],
)  # fmt: skip
def test_no_battery_or_one_set_by_hand(text):
    assert parse_battery(text) is None


def test_battery_lines_that_are_missing():
    battery = parse_battery("Current Battery Service state:\n  level: 20\n")
    assert set(battery.values()) == {None}


def test_thermal():
    status, temperatures = parse_thermal(THERMAL)
    assert status == "moderate"
    assert temperatures == {"BIG": 61.4, "G3D": None, "battery": 29.3}  # neither volts nor amperes nor percent, and nothing cached


def test_thermal_cached_where_nothing_is_fresh():
    assert parse_thermal("Thermal Status: 0\nCached temperatures:\n\tTemperature{mValue=31.5, mType=3, mName=skin, mStatus=0}\n") == (
        "none", {"skin": 31.5},
    )  # fmt: skip


@pytest.mark.parametrize("line", ["HAL Ready: true", "IsStatusOverride: false"])
def test_thermal_status_that_nothing_is_behind(line):
    value = "false" if line.endswith("true") else "true"
    assert parse_thermal(THERMAL.replace(line, f"{line.split(':')[0]}: {value}"))[0] is None


@pytest.mark.parametrize("text", ["", "Can't find service: thermalservice\n"])
def test_no_thermal_service(text):
    assert parse_thermal(text) == (None, None)
