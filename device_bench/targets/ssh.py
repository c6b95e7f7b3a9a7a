"""Linux boards behind SSH: ``ssh:pi@rpi5``. The Python agent runs there, with what Python and runtimes the board has or is given.

What this does not do: change anything on the board but its own folder, which is gone afterwards, and the private environment
that ``provision`` makes, which stays; accept host keys, ask for passwords or reconnect (see ``ssh_wire.py``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device_bench.board_python import BoardPython, ask_python
from device_bench.provision import provision
from device_bench.targets.base import AGENT, DEADLINE_S, Finished, RemoteTarget
from device_bench.targets.ssh_wire import Address, Connection, last_line
from runtimes.bundle import file_sha256
from runtimes.errors import BadInput, IntegrityError, PocketbertError, TargetUnreachable

PYTHON = "python3"
WORK_PARENT = "/tmp"
COMMAND_TIMEOUT_S = 120.0
LEAST_BYTES_PER_SECOND = 50_000
# What a full disk leaves is removed at once, so that a smaller file may still fit.
RECEIVE = 'export LC_ALL=C; cat > "$1" || { code=$?; rm -f "$1"; exit $code; }'
DIGEST = 'if command -v sha256sum > /dev/null; then sha256sum < "$1"; else "$2" -c "$3" "$1"; fi'
DIGEST_IN_PYTHON = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
_FULL = re.compile("No space left on device|Disk quota exceeded|File too large")
# onnxruntime on a newer file version, operator set and operator; TFLite on a newer version of an operator.
_TOO_OLD = re.compile(
    "Unsupported model IR version|is under development and support|is not a registered function/op|Didn't find op for builtin opcode"
)
_GLIBC_TOO_OLD = re.compile(r"version `GLIBC_([0-9.]+)' not found")
_WRONG_MACHINE = re.compile("wrong ELF class|invalid ELF header|Exec format error|Error loading shared library|Error relocating")


class SshTarget(RemoteTarget):
    """A board; a context manager, connected while it is entered.

    Args:
        address: ``user@host``, ``user@host:port``, or a name of the user's ssh configuration.
        name: what messages call it; ``ssh:ADDRESS`` if empty.
        python: the interpreter there; python3 if empty.
        provision: bring the runtimes into a private environment on the board, and use that.
        work_folder: where the job's own folder is made there; /tmp if empty.
        deadline_s: a job that takes longer is stopped; by the agent itself, or ``grace_s`` later by us.
        agent: the script to run there.
        say: is told what provisioning does.
    """

    def __init__(
        self, address: str, name: str = "", python: str = "", provision: bool = False, work_folder: str = "",
        deadline_s: float = DEADLINE_S, agent: Path = AGENT, say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name = name or f"ssh:{address}"
        self.deadline_s = deadline_s
        self._connection = Connection(self.name, Address.parse(address), work_folder.removeprefix("~/") or WORK_PARENT)  # sessions start at home
        self._agent = agent
        self._python = python or PYTHON
        self._provision = provision
        self._say = say or (lambda _: None)
        self._agent_python = self._python
        self.board: BoardPython | None = None
        """What Python is there; known once connected."""

    # --- the wire -----------------------------------------------------------------------------------------------

    def connect(self) -> str:
        try:
            self.folder = self._connection.open()
            self.board = ask_python(self, self._python)
            self._agent_python = provision(self, say=self._say) if self._provision else self._python
        except BaseException:
            self.disconnect()
            raise
        return self.folder

    def disconnect(self) -> None:
        self._connection.close()

    @property
    def staging(self) -> str:
        """A folder beside the board's private environments that is removed with the lease; nobody makes it but provisioning."""
        return f"{self.board.cache}/.new-{os.path.basename(self._connection.folder)}"

    def execute(self, arguments: list[str], timeout_s: float, keep_stdin: bool = False) -> Finished:
        if not keep_stdin:
            return self._connection.run(arguments, timeout_s, f"running {os.path.basename(arguments[0])}")
        reading, writing = os.pipe()
        try:
            return self._connection.run(arguments, timeout_s, "the agent ran", stdin=reading)
        finally:
            os.close(reading)
            os.close(writing)

    def send(self, local: Path, remote: str) -> None:
        size = local.stat().st_size
        timeout_s = COMMAND_TIMEOUT_S + size / LEAST_BYTES_PER_SECOND
        with local.open("rb") as file:
            done = self._connection.run(["sh", "-c", RECEIVE, "receive", remote], timeout_s, f"sending {local.name}", stdin=file)
        if done.exit_code == 0:
            return
        said = last_line(done.stderr)
        if _FULL.search(said):
            free = self._free_bytes(os.path.dirname(remote))
            room = "" if free is None else f", {free / 1e6:.1f} MB are free"
            message = f"{self.name}: disk full: {local.name} ({size / 1e6:.1f} MB) does not fit into {os.path.dirname(remote)}{room}"
            raise TargetUnreachable(f"{message}; free some, or name another work_folder ({said})")
        raise TargetUnreachable(f"{self.name}: {local.name} cannot be written there: {said or f'exit code {done.exit_code}'}")

    def fetch(self, remote: str, local: Path) -> None:
        digest = self.sha256(remote)
        with local.open("wb") as file:
            done = self._connection.run(["cat", remote], self.deadline_s, f"fetching {local.name}", stdout=file)
        if done.exit_code != 0 or file_sha256(local) != digest:
            local.unlink()
            raise IntegrityError(f"{self.name}: {os.path.basename(remote)} did not arrive whole from there: {last_line(done.stderr)}; try again")

    def sha256(self, remote: str) -> str:
        done = self.execute(["sh", "-c", DIGEST, "digest", remote, self._python, DIGEST_IN_PYTHON], COMMAND_TIMEOUT_S)
        digest = done.stdout.split()[:1]
        if done.exit_code != 0 or not digest or not re.fullmatch("[0-9a-f]{64}", digest[0]):
            raise TargetUnreachable(f"{self.name}: no checksum of {remote}: {last_line(done.stderr) or repr(done.stdout[:80])}")
        return digest[0]

    def command(self, job: dict[str, Any], job_file: str) -> list[str]:
        return [self._agent_python, "-X", "utf8", self.push(self._agent), job_file]

    # --- the job ------------------------------------------------------------------------------------------------

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().run(job)
        except (BadInput, IntegrityError) as error:
            explained = self._explain(job, str(error).strip())
            if explained is None:
                raise
            raise explained from error

    def _explain(self, job: dict[str, Any], message: str) -> PocketbertError | None:
        """A refusal of the agent that has to do with what this board is; None for any other."""
        if "no runtime for" in message:
            if needed := _GLIBC_TOO_OLD.search(message):
                versions = f"the runtime there needs glibc {needed[1]}, and the board has {self.board.glibc}"
                return TargetUnreachable(f"{message}; {versions}; --provision brings one that fits, if there is one")
            if _WRONG_MACHINE.search(message):
                return TargetUnreachable(f"{message}; that runtime is for another machine than {self.board.where}; --provision brings one that fits")
            return BadInput(message if self._provision else f"{message}; --provision brings it there")
        if _TOO_OLD.search(message):
            runtime = self.info()["formats"].get(job["format"], "the runtime")
            advice = "bring a newer one" if self._provision else "--provision brings a newer one, where there is one for this board"
            return TargetUnreachable(f"{message}; {runtime} there is too old for this file; {advice}")
        return None

    def _free_bytes(self, folder: str) -> int | None:
        fields = self.execute(["df", "-Pk", folder], COMMAND_TIMEOUT_S).stdout.splitlines()[-1:]
        match = re.search(r"\s[0-9]+\s+[0-9]+\s+([0-9]+)\s+[0-9]+%", fields[0]) if fields else None
        return None if match is None else int(match[1]) * 1024
