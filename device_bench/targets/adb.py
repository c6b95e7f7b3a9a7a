"""An Android phone behind ADB (or a Linux board with Android's debug daemon): the C runner, natively, in a folder of its own.

Connecting starts one shell there that makes the folder and waits for the end of its standard input. Its end is the end of
the session, however that comes (an error here, a killed process, a cable that was pulled): the shell then kills what works
in the folder and removes it. A folder whose shell was killed (a phone that restarted, a daemon that was switched off) is
found dead and removed by the next session on that phone.

What this does not do: install apps, root the phone, wake or unlock it; run Python there; use a GPU or an NPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from device_bench.android import describe_phone, parse_battery, parse_properties, parse_thermal
from device_bench.elf import MACHINE_ABIS, read_elf
from device_bench.runner_build import LIBRARIES, build_runner, library_in, runner_arguments
from device_bench.targets.adb_wire import Late, Refused, Shell, Wire, ask, broken, choose_phone, connect_server, explain_state
from device_bench.targets.base import DEADLINE_S, Finished, RemoteTarget, quoted
from runtimes.bundle import file_sha256
from runtimes.errors import BadInput, IntegrityError, TargetUnreachable

AARS = {"onnx": "com.microsoft.onnxruntime:onnxruntime-android", "tflite": "com.google.ai.edge.litert:litert, 2 or later"}
# Shells of a phone that are asked something must not hang a session: dumpsys gives up by itself after 10 s.
_SHORT_S = 30.0
_HASH_S = 300.0
_STARTERS = ("env", "taskset")
"""Commands that start what they are given."""
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127
_SEPARATOR = "== pocketbert =="

# Whatever works in a folder, as its current one or below.
_KILL_WORK = r"""
kill_work() {
  ls -l /proc/[0-9]*/cwd 2>/dev/null | while read -r line; do
    case $line in *"/cwd -> $1" | *"/cwd -> $1/"*) line=${line#*/proc/}; kill -9 "${line%%/*}" ;; esac
  done
}
"""
# $1: where to make the folder ("": the usual place), $2: "fixed" for Android's fixed performance mode.
# The folder's name says which shell keeps it: its process id and when it started, in ticks since boot. Nothing but a shell's
# own commands, ls, cat, mkdir, rm and sleep is used, which toybox, busybox and coreutils all have.
_LEASE = (
    _KILL_WORK
    + r"""
started() {
  { read -r line < "/proc/$1/stat"; } 2>/dev/null || return 1
  set -- ${line##*) }
  echo "${20}"
}
remove() {
  kill_work "$1"
  rm -rf "$1" || { sleep 1; rm -rf "$1"; }
}
performance() { cmd power set-fixed-performance-mode-enabled "$1" >&2; }
trap '' HUP INT TERM PIPE
umask 077
if [ -n "$1" ]; then base=$1; elif [ -d /data/local/tmp ]; then base=/data/local/tmp; else base=/tmp; fi
cd "$base" && base=$(pwd -P) && cd / || exit 1
for old in "$base"/pocketbert-*-*; do
  identity=${old##*/pocketbert-}
  case $identity in *[!0-9-]*) continue ;; esac
  [ "$(started "${identity%-*}")" = "${identity#*-}" ] || remove "$old"
done
folder=$base/pocketbert-$$-$(started $$)
mkdir "$folder" || exit 1
if [ "$2" = fixed ]; then performance true || { remove "$folder"; exit 1; }; fi
echo "$folder"
cat > /dev/null
remove "$folder"
if [ "$2" = fixed ]; then performance false; fi
"""
)
_ASK_MACHINE = f"uname -m; ls -d /system/bin/linker /system/bin/linker64 2>/dev/null; echo '{_SEPARATOR}'; getprop"
_ASK_STATE = f"dumpsys battery; echo '{_SEPARATOR}'; dumpsys thermalservice"


class AdbTarget(RemoteTarget):
    """One phone. ``conditions`` of its answers are the runner's and, under ``phone``, ``before`` and ``after``, Android's.

    ``phone``: manufacturer, model, soc {manufacturer, model, platform}, android, sdk, abis, work_folder, fixed_performance.
    ``before`` and ``after`` gain ``thermal_status`` ("none" to "shutdown"); ``battery`` gains charging, plugged and
    temperature_c; what the shell may not read in /sys (temperatures_c, battery) is taken from Android's services.

    Args:
        serial: as in ``adb devices``; HOST:PORT of wireless debugging; "" for ``ANDROID_SERIAL`` or the only phone there is.
        name: for tables and messages; adb:SERIAL if empty.
        runner: the C runner for that phone; if None it is built for it, which needs an Android NDK.
        libraries: AARs, wheels, folders or shared libraries to take the runtimes from; the first that has one counts.
        work_folder: where the session's folder is made; /data/local/tmp, or /tmp where that is not.
        deadline_s: a job that takes longer is stopped.
        fixed_performance: hold Android's fixed performance mode during the session (Android 11, not on every phone): clocks
            that the phone can keep up, for figures that repeat.
    """

    def __init__(
        self, serial: str = "", name: str = "", runner: Path | None = None, libraries: Sequence[Path] = (), work_folder: str = "",
        deadline_s: float = DEADLINE_S, fixed_performance: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name = name or f"adb:{serial}"
        self.deadline_s = deadline_s
        self._named = bool(name)
        self._serial = serial
        self._given_runner = runner
        self._places = list(libraries)
        self._work_folder = work_folder
        self._fixed = fixed_performance
        self._client: Any = None
        self._wire: Wire | None = None
        self._lease: Shell | None = None
        self._to_disconnect = ""
        self._phone: dict[str, Any] = {}
        self._machine = ""
        self._kind = ""
        self._bionic = False
        self._runner: Path | None = None
        self._libraries: dict[str, Path] | None = None
        self._formats: dict[str, str] | None = None

    # --- the wire -----------------------------------------------------------------------------------------------

    def connect(self) -> str:
        self._runner = self._libraries = self._formats = None  # without a serial it may be another phone this time
        self._client = connect_server()
        try:
            serial, connected = choose_phone(self._client, self._serial)
            self._to_disconnect = serial if connected else ""
            if not self._named:
                self.name = f"adb:{serial}"
            self._wire = Wire(self._client, serial)
            if "shell_v2" not in self._wire.features():
                raise TargetUnreachable(f"{self.name}: its ADB cannot keep a command's streams apart; Android 7 or newer is needed")
            folder = self._make_folder()
            self._read_machine()
            self._phone |= {"work_folder": str(Path(folder).parent), "fixed_performance": self._fixed}
        except BaseException:
            self.disconnect()
            raise
        return folder

    def disconnect(self) -> None:
        self._wire = None
        lease, self._lease = self._lease, None
        if lease is not None:
            # Gone already, or too slow to wait for: closing ends the shell's input anyway, and it cleans up by itself.
            with contextlib.suppress(Late, *broken()):
                lease.close_stdin()
                lease.wait(_SHORT_S)
            lease.close()
        serial, self._to_disconnect = self._to_disconnect, ""
        if serial:
            with contextlib.suppress(TargetUnreachable):  # a server that has gone has no connections
                ask(self._client, f"host:disconnect:{serial}")

    def execute(self, arguments: list[str], timeout_s: float, keep_stdin: bool = False) -> Finished:
        started = arguments[0] if arguments[0] not in _STARTERS else next((one for one in arguments if one.startswith(self.folder)), arguments[0])
        program = Path(started).name
        line = f"cd {shlex.quote(self.folder)} && exec {quoted(arguments)}"
        try:
            done = self._run_line(line, timeout_s, f"running {program}", keep_stdin)
        except Late as late:
            raise TargetUnreachable(f"{self.name}: {program} did not end within {timeout_s:g} s; {self._kill_work()}") from late
        if done.exit_code == _NOT_EXECUTABLE:
            words = " ".join(done.stderr.split())
            raise TargetUnreachable(f"{self.name}: {self.folder} does not let programs run ({words}); name another work folder")
        return done

    def send(self, local: Path, remote: str) -> None:
        try:
            with local.open("rb") as file, self._told(f"sending {local.name}"):
                self._connected().send(file, remote)
        except Refused as refused:
            words = str(refused)
            advice = "; free some space on the phone" if "No space left" in words or "Disk quota" in words else ""
            size_mb = local.stat().st_size / 1e6
            raise TargetUnreachable(f"{self.name}: {local.name} ({size_mb:.1f} MB) cannot be written to {remote}: {words}{advice}") from refused

    def fetch(self, remote: str, local: Path) -> None:
        local.write_bytes(self._read(remote))

    def sha256(self, remote: str) -> str:
        done = self.execute(["sha256sum", remote], _HASH_S)
        if done.exit_code == _NOT_FOUND:  # a toybox without it: read back what arrived
            return hashlib.sha256(self._read(remote)).hexdigest()
        if done.exit_code != 0:
            raise TargetUnreachable(f"{self.name}: {remote}: {' '.join(done.stderr.split()) or 'cannot be read'}")
        return done.stdout.split()[0].lstrip("\\")  # coreutils marks names that it escapes

    def command(self, job: dict[str, Any], job_file: str) -> list[str]:
        runner = self._push_into("runner", self._find_runner())
        library = self._find_libraries().get(job.get("format", ""))
        if library is None:
            return [runner, *runner_arguments(job, None)]
        folder = f"{self.folder}/{job['format']}"
        for neighbour in _neighbours(library):
            self._push_into(job["format"], neighbour)
        there = self._push_into(job["format"], library)
        return ["env", f"LD_LIBRARY_PATH={folder}", runner, *runner_arguments(job, Path(there))]

    # --- the job ------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        if self._formats is None:  # what its libraries are does not change; what the phone says of itself does
            formats: dict[str, str] = {}
            for format, library in self._find_libraries().items():
                formats |= self.run({"mode": "info", "format": format})["formats"]
                if format not in formats:
                    raise BadInput(f"{self.name}: {library} cannot be opened there; is it whole, and made for this system?")
            self._formats = formats
        return {**self.run({"mode": "info"}), "formats": dict(self._formats)}

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """As :meth:`RemoteTarget.run`; what does not fit the phone is refused before anything is sent.

        Raises:
            BadInput: also for a runner or a library that is missing or made for another kind of phone.
        """
        self._find_runner()
        if job["mode"] != "info" and job.get("format") not in self._find_libraries():
            raise BadInput(f"{self.name}: {self._missing_library(job.get('format'))}")
        before = self._read_state()
        answer = super().run(job)
        conditions = answer["conditions"]
        names = [name for name in (self._phone["manufacturer"], self._phone["model"]) if name is not None]
        conditions["board"] = conditions.get("board") or " ".join(names) or None
        conditions["phone"] = dict(self._phone)
        _complete(conditions["before"], before)
        if "after" in conditions:
            _complete(conditions["after"], self._read_state())
        return answer

    # --- what fits ----------------------------------------------------------------------------------------------

    def _find_runner(self) -> Path:
        """The program to send; checked against the phone once."""
        if self._runner is None:
            runner = self._given_runner
            if runner is None:
                try:
                    runner = build_runner(self._kind)
                except BadInput as error:
                    advice = f"or build it elsewhere (`pocketbert devices build-runner {self._kind}`) and name it as the runner"
                    raise BadInput(f"{self.name}: {error}; {advice}") from error
            self._check_program(runner, "runner")
            self._runner = runner
        return self._runner

    def check_program(self, program: Path) -> None:
        """Refuse a program that this phone cannot start.

        Raises:
            BadInput: it is no program, or for another kind of machine, or needs a loader that is not there.
        """
        self._check_program(program, "program")

    def _check_program(self, program: Path, what: str) -> None:
        elf = read_elf(program)
        abis = self._phone["abis"] or [MACHINE_ABIS.get(self._machine, self._machine)]
        build = f"build one for it (`pocketbert devices build-runner {self._kind}`)" if what == "runner" else "take the one for it"
        if not elf.runs_on(abis):
            raise BadInput(f"{self.name}: the {what} {program} is for {elf.abi}, the phone runs {', '.join(abis)}; {build}")
        if elf.interpreter is not None and self._run_short(f"[ -e {shlex.quote(elf.interpreter)} ]").exit_code != 0:
            world = "Android" if self._bionic else "Linux with glibc"
            raise BadInput(f"{self.name}: the {what} {program} needs {elf.interpreter}, which is not there: it was not built for {world}; {build}")

    def _find_libraries(self) -> dict[str, Path]:
        """Format -> the library to send."""
        if self._libraries is None:
            found: dict[str, Path] = {}
            for place in self._places:
                reasons = []
                for format, name in LIBRARIES.items():
                    if place.is_file() and ".so" in place.name and not place.name.startswith(name):
                        continue  # the other runtime's library itself
                    try:
                        found.setdefault(format, library_in(place, format, self._kind))
                    except BadInput as error:
                        reasons.append(str(error))
                if len(reasons) == len(LIBRARIES) or (reasons and place.is_file() and ".so" in place.name):
                    raise BadInput(f"{self.name}: {'; '.join(dict.fromkeys(reasons))}")
            self._libraries = found
        return self._libraries

    def _missing_library(self, format: str | None) -> str:
        if format not in LIBRARIES:
            return f"format {format!r} is none of {', '.join(LIBRARIES)}"
        where = f"the AAR {AARS[format]}" if self._bionic else f"the runtime's wheel for {self._machine}"
        return f"no {LIBRARIES[format]} was named to run {format} files; download {where} and name it among the libraries"

    # --- asking the phone ---------------------------------------------------------------------------------------

    def _make_folder(self) -> str:
        line = f"exec sh -c {shlex.quote(_LEASE)} lease {shlex.quote(self._work_folder)} {'fixed' if self._fixed else 'free'}"
        with self._told("making a work folder"):
            try:
                self._lease = self._connected().shell(line)
                folder = self._lease.read_line(_SHORT_S)
                words = "" if folder else " ".join(self._lease.wait(_SHORT_S).stderr.split())
            except Late as error:
                raise TargetUnreachable(f"{self.name}: its shell did not answer within {_SHORT_S:g} s; is the phone overloaded?") from error
        if not folder:
            advice = "leave fixed performance out, or " if self._fixed else ""
            raise TargetUnreachable(f"{self.name}: no work folder can be made: {words or 'no reason given'}; {advice}name another work folder")
        return folder

    def _read_machine(self) -> None:
        machine, _, properties = self._run_short(_ASK_MACHINE).stdout.partition(f"{_SEPARATOR}\n")
        self._machine, *loaders = machine.split() or ["unknown"]
        self._phone = describe_phone(parse_properties(properties))
        self._bionic = bool(loaders)
        abis = self._phone["abis"] or []
        glibc = {abi: kind for kind, abi in MACHINE_ABIS.items()} | {"armeabi-v7a": "armv7l"}
        # On Android its own name for the best of its ABIs; with glibc that of the machine as `uname -m` has it.
        self._kind = (abis[0] if self._bionic else glibc.get(abis[0], abis[0])) if abis else self._machine

    def _read_state(self) -> dict[str, Any]:
        """thermal_status, temperatures_c and battery as Android's services tell them."""
        try:
            said = self._run_line(_ASK_STATE, _SHORT_S, "asking the phone").stdout
        except Late:  # a service that hangs says nothing
            said = ""
        battery, _, thermal = said.partition(f"{_SEPARATOR}\n")
        status, temperatures = parse_thermal(thermal)
        return {"thermal_status": status, "temperatures_c": temperatures, "battery": parse_battery(battery)}

    def _run_short(self, line: str) -> Finished:
        try:
            return self._run_line(line, _SHORT_S, "asking the phone")
        except Late as late:
            raise TargetUnreachable(f"{self.name}: its shell did not answer within {_SHORT_S:g} s; is the phone overloaded?") from late

    def _run_line(self, line: str, timeout_s: float, doing: str, keep_stdin: bool = False) -> Finished:
        with self._told(doing):
            shell = self._connected().shell(line)
            try:
                if not keep_stdin:
                    shell.close_stdin()
                return shell.wait(timeout_s)
            finally:
                shell.close()

    def _kill_work(self) -> str:
        """Kill what works in the folder; how that went."""
        try:
            self._run_short(f"{_KILL_WORK}kill_work {shlex.quote(self.folder)}")
        except TargetUnreachable:
            return "the phone does not answer any more, so it may still run there"
        return "it was killed there"

    def _push_into(self, folder: str, local: Path) -> str:
        """Send a file under its own name, by which other libraries ask for it; its path there."""
        if not local.is_file():
            raise BadInput(f"{local}: no such file")
        digest = file_sha256(local)
        remote = f"{self.folder}/{folder}/{local.name}"
        if self._sent.get(remote) != digest:
            self.send(local, remote)
            arrived = self.sha256(remote)
            if arrived != digest:
                raise IntegrityError(f"{self.name}: {local.name} did not arrive whole: sha256 {arrived[:12]}… there, {digest[:12]}… here; try again")
            self._sent[remote] = digest
        return remote

    def _connected(self) -> Wire:
        if self._wire is None:
            raise TargetUnreachable(f"{self.name}: not connected; use it in a with statement")
        return self._wire

    def _read(self, remote: str) -> bytes:
        try:
            with self._told(f"reading {remote}"):
                return b"".join(self._connected().fetch(remote))
        except Refused as refused:
            raise TargetUnreachable(f"{self.name}: {remote} cannot be read: {refused}") from refused

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """What breaks the connection meanwhile is told with what the server sees of the phone now."""
        try:
            yield
        except broken() as error:
            raise TargetUnreachable(f"{self.name}: the connection broke while {doing}: {error}; {self._whereabouts()}") from error

    def _whereabouts(self) -> str:
        if self._wire is None:
            return "the session was ended meanwhile"
        try:
            state = self._wire.state()
        except TargetUnreachable:
            return "the ADB server has gone too: run again"
        if state is None:
            return "the phone is not connected any more: plug it in and run again"
        return "run again" if state == "device" else explain_state(state)


def _neighbours(library: Path) -> list[Path]:
    """Libraries of the same folder that it needs, and those that they need."""
    found: list[Path] = []
    waiting = [library]
    while waiting:
        for name in read_elf(waiting.pop()).needed:
            beside = library.parent / name
            if beside.is_file() and beside != library and beside not in found:
                found.append(beside)
                waiting.append(beside)
    return found


def _complete(state: dict[str, Any], android: dict[str, Any]) -> None:
    """Add to a state of the runner what Android told at that time; what the runner read itself stays."""
    state["thermal_status"] = android["thermal_status"]
    zones = state.get("temperatures_c") or {}
    if all(value is None for value in zones.values()):
        state["temperatures_c"] = android["temperatures_c"] or state.get("temperatures_c")
    read = {key: value for key, value in (state.get("battery") or {}).items() if value is not None}
    if android["battery"] is not None:
        state["battery"] = {**android["battery"], **read}
