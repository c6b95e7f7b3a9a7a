"""What Android's own commands print of a phone: properties, battery, heat. Text in, facts out; null for what is not said.

The formats are those of ``getprop``, ``dumpsys battery`` and ``dumpsys thermalservice`` since Android 10; a phone without one
of them (or a Linux board with Android's debug daemon) prints nothing or an error, and everything of it is null.

What this does not do: talk to the phone (``targets/adb.py`` does); read /sys and ``dumpsys meminfo`` (the runner does, there).
"""

from __future__ import annotations

import math
import re
from typing import Any

# android.os.BatteryManager: 2 is the only one in which the charge rises; 1 means that the driver does not know.
BATTERY_STATUS = {2: "Charging", 3: "Discharging", 4: "Not charging", 5: "Full"}
POWER_SOURCES = {"AC powered": "AC", "USB powered": "USB", "Wireless powered": "wireless", "Dock powered": "dock"}
THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
# android.os.Temperature: these three types are a voltage in mV, a current in mA and a charge in percent.
NOT_TEMPERATURES = {6, 7, 8}


def parse_properties(text: str) -> dict[str, str]:
    """``getprop`` without arguments: key -> value, without the empty ones. A value may have several lines."""
    found = re.findall(r"^\[([^\]\n]+)\]: \[(.*?)\]$", text.replace("\r\n", "\n"), flags=re.MULTILINE | re.DOTALL)
    return {key: value for key, value in found if value}


def describe_phone(properties: dict[str, str]) -> dict[str, Any]:
    """manufacturer, model, soc {manufacturer, model, platform}, android (release), sdk (int), abis ([str], best first)."""
    abis = properties.get("ro.product.cpu.abilist") or properties.get("ro.product.cpu.abi")
    sdk = properties.get("ro.build.version.sdk", "")
    return {
        "manufacturer": properties.get("ro.product.manufacturer"),
        "model": properties.get("ro.product.model"),
        "soc": {
            "manufacturer": properties.get("ro.soc.manufacturer"),
            "model": properties.get("ro.soc.model"),
            "platform": properties.get("ro.board.platform"),
        },
        "android": properties.get("ro.build.version.release"),
        "sdk": int(sdk) if sdk.isdecimal() else None,
        "abis": abis.split(",") if abis else None,
    }


def parse_battery(text: str) -> dict[str, Any] | None:
    """``dumpsys battery``: capacity_percent, status (as in /sys/class/power_supply), charging, plugged, temperature_c, voltage_uv.

    charging is whether the charge rises; plugged the power source's name or "no". None where there is no battery, and where
    somebody has set the values by hand (``dumpsys battery set``), because they say nothing of the phone then.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.strip().partition(":")
        if separator:
            fields.setdefault(key, value.strip())  # vendors append sections of their own with the same keys
    if "level" not in fields or "UPDATES STOPPED" in text or fields.get("present") == "false":
        return None
    level, scale, status, voltage_mv = (_integer(fields.get(key)) for key in ("level", "scale", "status", "voltage"))
    tenths_c = _integer(fields.get("temperature"))
    sources = [name for key, name in POWER_SOURCES.items() if fields.get(key) == "true"]
    return {
        "capacity_percent": None if level is None or not scale else round(100 * level / scale),
        "status": BATTERY_STATUS.get(status),
        "charging": status == 2 if status in BATTERY_STATUS else None,
        "plugged": sources[0] if sources else "no" if any(key in fields for key in POWER_SOURCES) else None,
        "temperature_c": None if tenths_c is None else tenths_c / 10,
        "voltage_uv": None if not voltage_mv else voltage_mv * 1000,
        "current_ua": None,
    }


def parse_thermal(text: str) -> tuple[str | None, dict[str, float | None] | None]:
    """``dumpsys thermalservice``: (throttling status as a word, temperatures in °C by sensor name).

    The status is None where the service has no sensors behind it (it says 0 then) or was overridden by hand.
    """
    found = re.search(r"^\s*Thermal Status: (\d+)\s*$", text, flags=re.MULTILINE)
    made_up = re.search(r"^\s*(HAL Ready: false|IsStatusOverride: true)\s*$", text, flags=re.MULTILINE)
    status = None if found is None or made_up else int(found[1])
    # Behind this heading they are fresh; what is cached above it may be hours old.
    _, heading, fresh = text.partition("Current temperatures from HAL:")
    temperatures: dict[str, float | None] = {}
    for value, kind, name in re.findall(r"\bTemperature\{mValue=([^,]+), mType=(-?\d+), mName=([^,}]+)", fresh if heading else text):
        if int(kind) not in NOT_TEMPERATURES:
            temperatures[name] = _finite(value)
    word = None if status is None else THERMAL_STATUS[status] if status < len(THERMAL_STATUS) else str(status)
    return word, temperatures or None


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else None


def _finite(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
