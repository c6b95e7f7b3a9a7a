"""Which places to measure: names such as ``ssh:pi@rpi5``, and lab files that describe a drawer of boards.

A lab file is TOML with one ``[[target]]`` table per place; ``on`` is its name as on the command line, every other key is a
field of :class:`Place`::

    [[target]]
    on = "ssh:pi@rpi5"
    name = "Raspberry Pi 5"
    provision = true
    threads = [1, 4]

    [[target]]
    on = "adb:R5CT1234"
    cores = "big"
    libraries = ["onnxruntime-android.aar"]

What this does not do: look for devices; connect (the targets do, when they are entered).
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from device_bench.targets import LocalTarget, RemoteTarget, Target
from runtimes.errors import BadInput

KINDS = ("local", "ssh", "adb", "qemu")
CLUSTERS = ("big", "little")
MOST = {"threads": 1024, "cores": 4095, "memory_cap_mb": 1e8, "deadline_s": 1e6}
"""Larger values are slips: no place that is measured has so much."""
LONGEST_TEXT = 4096
"""Characters of a name or path."""


@dataclass(frozen=True)
class Place:
    """One place and how to measure there.

    Args:
        on: ``local``, ``ssh:USER@HOST[:PORT]``, ``adb[:SERIAL]`` or ``qemu:CPU``.
        name: what tables call it; ``on`` if empty.
        python: the interpreter there (ssh) or the environment to measure (local); the usual one if empty.
        provision: make a private environment with the runtimes there (ssh).
        work_folder: where the job's own folder is made there; a usual place if empty.
        cores: pin to these, or to the "big" or "little" ones.
        threads: thread counts to measure; those of the measurement if empty.
        memory_cap_mb: the most memory a job may take (local).
        runner: the C runner built for that place (adb); ours for its processor if empty.
        libraries: files or folders, wheels or AARs to take the runtimes from (adb).
        benchmark_model: TFLite's own benchmark binary, to be run beside our runner (adb).
        fixed_performance: hold Android's fixed performance mode meanwhile, for clocks that the phone can keep up (adb).
        emulated: a virtual machine whose processor is emulated: its outputs are held against ours, and nothing is timed (ssh, adb).
        deadline_s: a job that takes longer is stopped.
    """

    on: str
    name: str = ""
    python: str = ""
    provision: bool = False
    work_folder: str = ""
    cores: tuple[int, ...] | str | None = None
    threads: tuple[int, ...] = ()
    memory_cap_mb: float | None = None
    runner: str = ""
    libraries: tuple[str, ...] = ()
    benchmark_model: str = ""
    fixed_performance: bool = False
    emulated: bool = False
    deadline_s: float = 900.0

    @property
    def kind(self) -> str:
        return self.on.partition(":")[0]

    @property
    def address(self) -> str:
        return self.on.partition(":")[2]

    @property
    def label(self) -> str:
        return self.name or self.on


_ONLY_FOR = {
    "python": ("local", "ssh"), "provision": ("ssh",), "work_folder": ("ssh", "adb"), "memory_cap_mb": ("local",), "runner": ("adb",),
    "libraries": ("adb",), "benchmark_model": ("adb",), "fixed_performance": ("adb",), "emulated": ("ssh", "adb"),
}  # fmt: skip


def parse_places(names: str, **common: Any) -> list[Place]:
    """The places of a comma-separated list of names and ``@lab.toml`` files; ``common`` holds for names, not for lab files.

    Raises:
        BadInput: an unknown kind or key, a value of the wrong kind, two places of one label, or none at all.
    """
    places: list[Place] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        places += read_lab(Path(name[1:])) if name.startswith("@") else [_checked({"on": name, **common}, f"--on {name}", strict=False)]
    labels = [place.label for place in places]
    twice = [label for label in labels if labels.count(label) > 1]
    if not places:
        raise BadInput("--on: no target named; local, ssh:USER@HOST, adb:SERIAL, qemu:CPU or @lab.toml")
    if twice:
        raise BadInput(f"--on: {twice[0]} is named twice; give one of them another name in a lab file")
    return places


def read_lab(path: Path) -> list[Place]:
    """The places of a lab file."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
        raise BadInput(f"{str(path)[:200]}: cannot be read as a lab file: {str(error)[:200]}") from error
    unknown = [key for key in raw if key != "target"]
    tables = raw.get("target")
    if unknown or not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise BadInput(f"{path}: a lab file has [[target]] tables and nothing else" + (f"; found {unknown[0]!r}" if unknown else ""))
    return [_checked(table, f"{path}: target[{number}]", strict=True) for number, table in enumerate(tables, start=1)]


def open_target(place: Place, say: Any = None) -> Target:
    """The target of a place; it connects when it is entered."""
    if place.kind == "local":
        target = LocalTarget(name=place.label, deadline_s=place.deadline_s)
        if place.memory_cap_mb is not None:
            target = replace(target, memory_cap_bytes=int(place.memory_cap_mb * 1e6))
        return replace(target, python=place.python) if place.python else target
    if place.kind == "qemu":
        from device_bench.targets.qemu import QemuTarget

        return QemuTarget(place.address, name=place.label)
    remote = _open_ssh(place, say) if place.kind == "ssh" else _open_adb(place)
    remote.emulated = place.emulated
    return remote


def _open_ssh(place: Place, say: Any) -> RemoteTarget:
    from device_bench.targets.ssh import SshTarget

    return SshTarget(
        place.address, name=place.label, python=place.python, provision=place.provision, work_folder=place.work_folder,
        deadline_s=place.deadline_s, say=say,
    )  # fmt: skip


def _open_adb(place: Place) -> RemoteTarget:
    from device_bench.targets.adb import AdbTarget

    return AdbTarget(
        place.address, name=place.label, runner=Path(place.runner) if place.runner else None,
        libraries=[Path(library) for library in place.libraries], work_folder=place.work_folder, deadline_s=place.deadline_s,
        fixed_performance=place.fixed_performance,
    )  # fmt: skip


def _checked(table: dict[str, Any], where: str, strict: bool) -> Place:
    """A place out of a table; ``strict`` refuses keys that its kind has no use for, which the command line gives to all."""
    known = {field.name for field in fields(Place)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            raise BadInput(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"))
    on = table.get("on")
    kind = on.partition(":")[0] if isinstance(on, str) else None
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise BadInput(f"{where}: on = {_shown(on)} is no target{guess}; known are local, ssh:, adb:, qemu:")
    if kind in ("ssh", "qemu") and not on.partition(":")[2]:
        raise BadInput(f"{where}: {kind} needs an address: {'ssh:USER@HOST' if kind == 'ssh' else 'qemu:cortex-a76'}")
    if kind == "local" and on != "local":
        raise BadInput(f"{where}: local has no address")
    values = {}
    for key, value in table.items():
        used = kind in _ONLY_FOR.get(key, KINDS)
        if not used and strict:
            raise BadInput(f"{where}: {key} means nothing for a target of kind {kind}")
        if used:
            values[key] = _checked_value(key, value, where)
    return Place(**values)


def _checked_value(key: str, value: Any, where: str) -> Any:
    default = next(field.default for field in fields(Place) if field.name == key)
    if key == "cores":
        fits = value is None or (isinstance(value, str) and value in CLUSTERS) or (_is_list(value, int) and _are_counts(value, key, least=0))
    elif key == "memory_cap_mb":
        fits = value is None or (type(value) in (int, float) and 0 < value <= MOST[key])
    elif key == "threads":
        fits = _is_list(value, int) and _are_counts(value, key, least=1)
    elif isinstance(default, tuple):
        fits = _is_list(value, str) and all(_is_text(item) for item in value)
    elif isinstance(default, float):
        fits = type(value) in (int, float) and 0 < value <= MOST[key]
    elif key == "on" or isinstance(default, str):  # on has no default
        fits = _is_text(value)
    else:
        fits = type(value) is bool
    if not fits:
        limit = f"; at most {MOST[key]:g}, and none twice" if key in MOST else ""
        raise BadInput(f"{where}: {key} = {_shown(value)} is nothing that {key} can be{limit}")
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _shown(value: Any) -> str:
    """``value`` for a message, cut where it is long."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a huge number"
    return f"{value!r:.200}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and "\0" not in value


def _are_counts(values: Sequence[int], key: str, least: int) -> bool:
    return len(set(values)) == len(values) and all(least <= value <= MOST[key] for value in values)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0 and all(type(item) is kind for item in value)
