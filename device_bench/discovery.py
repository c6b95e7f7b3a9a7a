"""What there is to measure on: this machine, the phones that ADB sees, emulated processors.

What this does not do: look for boards on the network; they are named, as ``ssh:USER@HOST`` or in a lab file.
"""

from __future__ import annotations

from typing import Any

from device_bench.targets import LocalTarget
from runtimes.errors import PocketbertError


def discover() -> list[dict[str, Any]]:
    """One object per target: ``on`` (its name for ``--on``), ``what`` in words, ``ready``."""
    conditions, formats = _here()
    found = [{"on": "local", "what": f"{conditions}; {', '.join(formats) or 'no runtime is installed'}", "ready": bool(formats)}]
    return [*found, *_phones(), *_emulated()]


def _here() -> tuple[str, list[str]]:
    info = LocalTarget().info()
    conditions = info["conditions"]
    return f"{conditions['cpu_model'] or conditions['architecture']}, {len(conditions['affinity'] or [0])} cores", list(info["formats"].values())


def _phones() -> list[dict[str, Any]]:
    from device_bench.targets.adb_wire import connect_server, explain_state, list_phones

    try:
        phones = list_phones(connect_server())
    except PocketbertError as error:
        return [{"on": "adb:SERIAL", "what": str(error), "ready": False}]
    if not phones:
        return [{"on": "adb:SERIAL", "what": "no phone is connected", "ready": False}]
    return [
        {"on": f"adb:{serial}", "what": "ready" if state == "device" else explain_state(state), "ready": state == "device"}
        for serial, state in phones.items()
    ]


def _emulated() -> list[dict[str, Any]]:
    from device_bench.emulator import architecture_of, find, known_cpus

    found = []
    for cpu in known_cpus():
        try:
            find(architecture_of(cpu))
            found.append({"on": f"qemu:{cpu}", "what": "ready; outputs and instruction counts, no time", "ready": True})
        except PocketbertError as error:
            found.append({"on": f"qemu:{cpu}", "what": str(error), "ready": False})
    return found
