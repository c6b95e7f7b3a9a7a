"""Emulated ARM user space: QEMU, a small Debian system for its programs, and the runtimes' own ARM libraries, in the cache.

:func:`setup` makes it (it downloads; ``pocketbert devices setup qemu``), :func:`find` gives what was made.

What this does not do: say how fast anything is. Emulated seconds belong to no device, and the memory of an emulated process
holds QEMU's own; agreement of outputs and counts of instructions are what it is good for.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from device_bench import board_cache, debian
from device_bench.wheels import pip_download
from runtimes.errors import BadInput

PLUGIN_SOURCE = Path(__file__).parent / "agent" / "count_instructions.c"
CLOCK_SOURCE = Path(__file__).parent / "agent" / "guest_clock.c"
# One and the same compiler everywhere, so that the runner's instruction counts can be compared between machines.
COMPILER_PACKAGES = ("gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross")
UNUSED_PACKAGES = (
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "libasan8-arm64-cross",
    "libhwasan0-arm64-cross",
    "liblsan0-arm64-cross",
    "libtsan2-arm64-cross",
    "libubsan1-arm64-cross",
)
CORES = 4
CACHES = ((1, "Data", "64K"), (1, "Instruction", "64K"), (2, "Unified", "512K"))
"""Of each emulated core: level, kind, size."""
GUEST_PYTHON = "3.11"  # bookworm's
QEMU_PACKAGE = "qemu-user"  # 7.2 of bookworm; -static and later suites' packages have no plugins
_QEMU_TIMEOUT_S = 300.0
_QUOTED_CHARACTERS = 600


@dataclass(frozen=True)
class Cpu:
    """One processor that QEMU can be.

    Args:
        qemu: for QEMU's ``-cpu``.
        implementer: with ``part``, what its /proc/cpuinfo calls it.
    """

    qemu: str
    implementer: str
    part: str
    meaning: str


@dataclass(frozen=True)
class Architecture:
    """What the guest system of one architecture is made of.

    Args:
        debian: its name in Debian, ``triplet`` that of its library folders.
        wheel_platforms: of the runtimes, newest first.
        runtimes: PyPI project -> format of the files it runs.
    """

    qemu: str
    debian: str
    triplet: str
    packages: tuple[str, ...]
    wheel_platforms: tuple[str, ...]
    runtimes: Mapping[str, str]
    cpus: Mapping[str, Cpu]
    has_counts: bool
    wheel_parts: tuple[str, ...]


LIBRARIES = {"onnx": "onnxruntime/capi/libonnxruntime.so*", "tflite": "ai_edge_litert/libLiteRt.so"}
"""Where a runtime's wheel has the library that the C runner opens."""
ARCHITECTURES = {
    "aarch64": Architecture(
        qemu="qemu-aarch64",
        debian="arm64",
        triplet="aarch64-linux-gnu",
        packages=("libc6", "libstdc++6", "libgomp1", "libgcc-s1", "zlib1g"),
        wheel_platforms=(*(f"manylinux_2_{minor}_aarch64" for minor in (35, 34, 28, 27)), "manylinux2014_aarch64"),
        runtimes={"onnxruntime": "onnx", "ai-edge-litert": "tflite"},
        cpus={
            "cortex-a53": Cpu("cortex-a53", "0x41", "0xd03", "Armv8.0, in order: Raspberry Pi 3, little cores of old phones"),
            "cortex-a72": Cpu("cortex-a72", "0x41", "0xd08", "Armv8.0 without dot products: Raspberry Pi 4"),
            "cortex-a76": Cpu("cortex-a76", "0x41", "0xd0b", "Armv8.2 with dot products: Raspberry Pi 5, phones since 2019"),
            # QEMU 7.2 computes wrong int8 products where a runtime picks SME (logits off by 0.05 to 0.09); without SME they
            # agree with x86 bit for bit. It takes the part number of a Neoverse N2, which has the rest (SVE2, i8mm, bf16).
            "max": Cpu("max,sme=off", "0x41", "0xd49", "all that QEMU knows but SME: SVE2, int8 matrix products"),
        },
        has_counts=True,
        wheel_parts=tuple(LIBRARIES.values()),
    ),
    "armv7": Architecture(
        qemu="qemu-arm",
        debian="armhf",
        triplet="arm-linux-gnueabihf",
        packages=("python3", "python3-numpy", "libstdc++6", "libgcc-s1", "libatomic1", "zlib1g"),
        wheel_platforms=("manylinux_2_34_armv7l", "manylinux2014_armv7l"),
        runtimes={"tflite-runtime": "tflite"},
        cpus={"cortex-a7": Cpu("cortex-a7", "0x41", "0xc07", "Armv7 with NEON: Raspberry Pi 2")},
        has_counts=False,
        wheel_parts=("tflite_runtime/*", "tflite_runtime-*/METADATA"),
    ),
}  # fmt: skip
A64_FEATURES = {
    "HWCAP": (
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 asimddp "
        "sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
    ).split(),
    "HWCAP2": (
        "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh rng bti mte"
    ).split(),
}  # fmt: skip
"""The kernel's names of the bits of AT_HWCAP and AT_HWCAP2, from bit 0."""
SETUP_NAMES = {"aarch64": "qemu", "armv7": "qemu-armv7"}
"""What ``pocketbert devices setup`` calls them."""
FIXED_VERSIONS = {"tflite-runtime": "2.14.0"}
"""Runtimes that this machine need not have: the last that was built for Armv7."""


@dataclass(frozen=True)
class Emulator:
    """A finished emulator of one architecture; see :func:`find`.

    Attributes:
        runtimes: PyPI project -> version of what runs in it.
    """

    folder: Path
    architecture: str
    tools: Path
    system: Path
    runtimes: Mapping[str, str]

    @property
    def cpus(self) -> Mapping[str, Cpu]:
        return ARCHITECTURES[self.architecture].cpus

    def command(self, cpu: str, argv: Sequence[str], count_to: Path | None = None, environment: Mapping[str, str] | None = None) -> list[str]:
        """The command line that runs the guest program ``argv`` on ``cpu``.

        Args:
            argv: of the guest, with paths of this machine; those of its system are looked up there first.
            count_to: file for the counts of instructions, one line per mark (see ``count_instructions.c``).
            environment: variables that the guest has and the emulator has not.

        Raises:
            BadInput: no such CPU, or no counts for this architecture.
        """
        if cpu not in self.cpus:
            raise BadInput(f"qemu:{cpu}: no such CPU; there are {', '.join(known_cpus())}")
        architecture = ARCHITECTURES[self.architecture]
        # QEMU comes from Debian whatever runs here, so it brings its loader and its C library.
        loader = next((self.tools / "usr").glob("lib*/ld-linux*.so*"))
        libraries = debian.host_libraries(self.tools)
        command = [str(loader), "--library-path", str(libraries), str(self.tools / "usr/bin" / architecture.qemu)]
        if count_to is not None:
            if not architecture.has_counts:
                raise BadInput(f"qemu:{cpu}: instructions are counted on aarch64 only")
            command += ["-plugin", f"{_escaped(self.folder / 'count_instructions.so')},out={_escaped(count_to)}"]
        for name, value in (environment or {}).items():
            command += ["-E", f"{name}={value}"]
        return [*command, "-cpu", self.cpus[cpu].qemu, "-L", str(self.root(cpu)), *argv]

    @property
    def clock(self) -> Path:
        """The library that gives a guest a clock which goes by its own looks at it (aarch64; see ``guest_clock.c``)."""
        return self.folder / "guest_clock.so"

    @property
    def compiler(self) -> Path:
        """The C compiler for guest programs (aarch64)."""
        return self.folder / "cc"

    def root(self, cpu: str) -> Path:
        """The guest's system as it looks on ``cpu``."""
        return self.folder / "roots" / cpu

    def library(self, file_format: str) -> Path:
        """The runtime's library for ``--runtime`` of the C runner.

        Raises:
            BadInput: this architecture has none.
        """
        found = sorted((self.folder / "runtimes").glob(LIBRARIES[file_format])) if file_format in LIBRARIES else []
        if not found:
            raise BadInput(f"{file_format} files: no library for {self.architecture} that the C runner could open")
        return found[0]

    def python(self, cpu: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs the guest's Python, with the runtimes in its path; where the guest has one."""
        libraries = self.system / "usr/lib" / ARCHITECTURES[self.architecture].triplet
        environment = {
            "PYTHONPATH": f"{self.folder / 'runtimes'}:{self.system / 'usr/lib/python3/dist-packages'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Debian chooses one of several by links that a package's script would make.
            "LD_LIBRARY_PATH": f"{libraries / 'blas'}:{libraries / 'lapack'}",
        }
        (interpreter,) = self.system.glob("usr/bin/python3.[0-9][0-9]")
        return self.command(cpu, [str(interpreter), "-S", "-s", *argv], environment=environment)


def known_cpus() -> list[str]:
    """Names of all CPUs of all architectures."""
    return [name for architecture in ARCHITECTURES.values() for name in architecture.cpus]


def architecture_of(cpu: str) -> str:
    """The architecture that has ``cpu``.

    Raises:
        BadInput: none has.
    """
    for name, architecture in ARCHITECTURES.items():
        if cpu in architecture.cpus:
            return name
    raise BadInput(f"qemu:{cpu}: no such CPU; there are {', '.join(known_cpus())}")


def find(arch: str) -> Emulator:
    """The emulator that :func:`setup` made.

    Raises:
        BadInput: it was not made, or for other versions of the runtimes than are installed now.
    """
    emulator = _describe(arch)
    if not (emulator.folder.exists() and emulator.tools.exists() and emulator.system.exists()):
        versions = ", ".join(f"{name} {number}" for name, number in emulator.runtimes.items())
        raise BadInput(f"qemu: no {arch} emulator with {versions} is set up; say: pocketbert devices setup {SETUP_NAMES[arch]}")
    return emulator


def setup(arch: str, say: Callable[[str], None]) -> Emulator:
    """The emulator for ``arch`` ("aarch64" or "armv7"), made if need be: it downloads about 40 MB and unpacks 150 MB.

    Raises:
        BadInput: this machine lacks apt-get, dpkg-deb, pip or a C compiler, or is none that this works on.
        TargetUnreachable: the Debian mirror or the package index does not answer.
    """
    emulator = _describe(arch)
    architecture = ARCHITECTURES[arch]
    _tools().unpack(say)
    _system(architecture).unpack(say)

    def build(folder: Path) -> None:
        for project, number in emulator.runtimes.items():
            say(f"downloading {project} {number} ({arch})")
            with tempfile.TemporaryDirectory(prefix=".wheels-", dir=board_cache.boards_folder()) as wheels:
                wheel = _download_wheel(project, number, architecture.wheel_platforms, Path(wheels))
                _unzip(wheel, architecture.wheel_parts, folder / "runtimes")
        if architecture.has_counts:
            _write_compiler(folder / "cc", say)
            _compile(_host_compiler(), PLUGIN_SOURCE, folder / "count_instructions.so")
            _compile(str(folder / "cc"), CLOCK_SOURCE, folder / "guest_clock.so")
        unfinished = replace(emulator, folder=folder)
        for name in architecture.cpus:
            _make_root(unfinished, name)

    board_cache.build_once(emulator.folder, build)
    return find(arch)


def _describe(arch: str) -> Emulator:
    """The emulator as it is or would be."""
    if arch not in ARCHITECTURES:
        raise BadInput(f"{arch}: no such architecture; there are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[arch]
    runtimes = {project: FIXED_VERSIONS.get(project) or _installed_version(project) for project in architecture.runtimes}
    recipe = {
        "runtimes": runtimes,
        "sources": [hashlib.sha256(path.read_bytes()).hexdigest() for path in (PLUGIN_SOURCE, CLOCK_SOURCE)],
        "host": debian.host_architecture(),
        "packages": [folder.name for folder in (_tools().folder, _system(architecture).folder, _compiler().folder)],
        "cpus": {name: cpu.qemu for name, cpu in architecture.cpus.items()},
        "version": 5,
    }
    return Emulator(board_cache.place(f"qemu-{arch}", recipe), arch, _tools().folder, _system(architecture).folder, runtimes)


def _tools() -> debian.PackageSet:
    return debian.PackageSet((QEMU_PACKAGE,), debian.host_architecture())


def _system(architecture: Architecture) -> debian.PackageSet:
    return debian.PackageSet(architecture.packages, architecture.debian)


def _compiler() -> debian.PackageSet:
    return debian.PackageSet(COMPILER_PACKAGES, debian.host_architecture(), without=UNUSED_PACKAGES)


def _installed_version(project: str) -> str:
    try:
        return version(project)
    except PackageNotFoundError as error:
        message = f"{project} is not installed here, and the emulator gets the same version: pip install 'pocketbert[onnx,tflite]'"
        raise BadInput(message) from error


def _download_wheel(project: str, number: str, platforms: Sequence[str], folder: Path) -> Path:
    wheel = pip_download(f"{project}=={number}", GUEST_PYTHON, platforms, folder)
    if wheel is None:
        raise BadInput(f"{project} {number}: the package index has no wheel for {platforms[0]} and Python {GUEST_PYTHON}")
    return wheel


def _unzip(wheel: Path, parts: Sequence[str], folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if any(fnmatch(name, part) for part in parts):
                archive.extract(name, folder)


def _host_compiler() -> str:
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if found is None:
        raise BadInput("no C compiler for the plugin that counts instructions: install gcc")
    return found


def _compile(compiler: str, source: Path, library: Path) -> None:
    command = [compiler, "-std=gnu11", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BadInput(f"{source.name} cannot be compiled by {compiler}: {done.stderr.strip()[-_QUOTED_CHARACTERS:]}")


def _write_compiler(path: Path, say: Callable[[str], None]) -> None:
    """A script that runs the private cross compiler, which finds its parts by where it lies; on Arm the machine's own one will do."""
    if debian.host_architecture() == "arm64":
        script = '#!/bin/sh\nexec cc "$@"\n'
    else:
        root = _compiler().unpack(say)
        libraries = debian.host_libraries(root)
        script = f"#!/bin/sh\nLD_LIBRARY_PATH={shlex.quote(str(libraries))} exec {shlex.quote(str(root))}/usr/bin/aarch64-linux-gnu-gcc "
        script += f'--sysroot={shlex.quote(str(root))} "$@"\n'
    path.write_text(script, encoding="utf-8")
    path.chmod(0o755)


def _make_root(emulator: Emulator, cpu: str) -> None:
    """The guest's system with /proc/cpuinfo and /sys of a board with ``cpu``, where the guest would otherwise see this machine's.

    With this machine's cpuinfo onnxruntime crashes, and with one of another CPU a runtime uses instructions that are not
    there (QEMU 8.1 and later make one by themselves). What else a runtime asks is the same everywhere, so that counts are.
    """
    root = emulator.root(cpu)
    root.mkdir(parents=True)
    for entry in emulator.system.iterdir():
        if entry.name not in ("proc", "sys"):
            (root / entry.name).symlink_to(Path("../../..") / emulator.system.name / entry.name)
    known, features = emulator.cpus[cpu], " ".join(_features(emulator, cpu))
    version_number = 7 if emulator.architecture == "armv7" else 8
    cpuinfo = "".join(
        f"processor\t: {core}\nFeatures\t: {features}\nCPU implementer\t: {known.implementer}\nCPU architecture: {version_number}\n"
        f"CPU variant\t: 0x0\nCPU part\t: {known.part}\nCPU revision\t: 0\n\n"
        for core in range(CORES)
    )
    folder = "sys/devices/system/cpu"
    files = {"proc/cpuinfo": cpuinfo, f"{folder}/kernel_max": f"{CORES - 1}\n"}
    files |= {f"{folder}/{name}": f"0-{CORES - 1}\n" for name in ("possible", "present", "online")}
    for core in range(CORES):
        files |= {f"{folder}/cpu{core}/topology/{name}": "0\n" for name in ("physical_package_id", "cluster_id")}
        files |= {f"{folder}/cpu{core}/topology/{name}_list": f"0-{CORES - 1}\n" for name in ("cluster_cpus", "core_siblings", "package_cpus")}
        files[f"{folder}/cpu{core}/topology/core_id"] = f"{core}\n"
        for index, (level, kind, size) in enumerate(CACHES):
            cache = {"level": level, "type": kind, "size": size, "shared_cpu_list": core}
            files |= {f"{folder}/cpu{core}/cache/index{index}/{name}": f"{value}\n" for name, value in cache.items()}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="ascii")
    for name in ("sys/bus/pci/devices", "sys/class/drm", "sys/class/accel"):  # no graphics, no accelerators
        (root / name).mkdir(parents=True)


def _features(emulator: Emulator, cpu: str) -> list[str]:
    """Names of the features that QEMU gives ``cpu``, as the kernel would write them.

    Raises:
        BadInput: the emulator does not run.
    """
    (library,) = emulator.system.glob("usr/lib/*/libc.so.6")  # a program, too: it prints its version
    command = emulator.command(cpu, [str(library)], environment={"LD_SHOW_AUXV": "1"})
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_QEMU_TIMEOUT_S)
    words = dict(re.findall(r"^AT_(HWCAP2?):[ \t]*(.*)$", done.stdout, flags=re.MULTILINE))
    if done.returncode != 0 or "HWCAP" not in words:
        raise BadInput(f"qemu:{cpu} does not run here: {(done.stderr or done.stdout).strip()[-_QUOTED_CHARACTERS:]}")
    if emulator.architecture == "armv7":  # the C library knows the names by itself
        return [*words["HWCAP"].split(), *words.get("HWCAP2", "").split()]
    return [name for word, names in A64_FEATURES.items() for bit, name in enumerate(names) if int(words.get(word, "0"), 16) >> bit & 1]


def _escaped(path: Path) -> str:
    """For QEMU, where a comma ends a value."""
    return str(path).replace(",", ",,")
