"""Measure one model file on the machine this runs on, after a proof that its outputs are right.

::

    python agent.py JOB.json          prints exactly one JSON document on stdout; logs of the runtimes go to stderr

Self-contained: the standard library, numpy, and one of onnxruntime, ai-edge-litert, tflite-runtime. Python >= 3.9.
``agent/runner`` holds its sibling in C for places without Python; both speak this protocol, version 3.

The job is an object with "mode" and, but for mode info, "model" (path), "format" ("onnx" or "tflite"), "threads", "cores"
([int], "big", "little" or null), "inputs" (path of an inputs file), "golden" (path of an inputs file with outputs, or null),
"tolerance" (the most that a value of a golden output may be off):

* info: conditions, and the formats that can run here with the name of their runtime.
* latency: "cases" [{"case": "texts"} | {"case": "length", "length": int}], "warmup" {"window": int, "tolerance": float,
  "max_seconds": float}, "min_inferences", "min_seconds". A case may carry a "min_inferences" of its own.
* memory: every input once; peak against baseline.
* outputs: every input once; the file "output" becomes an inputs file with what the model gave.
* count: every input once, then once more between getpriority(0x7a, 2i) and getpriority(0x7a, 2i + 1), which an emulator that
  counts instructions looks for and a kernel refuses without harm.
* sustained: inputs for "min_seconds" after "warmup", summed up once per "window_seconds".

Optional: "session" is that of a bundle's manifest (its "threads" are not read): ``{"graph_optimization_level": str,
"memory_pattern": bool, "memory_arena": bool, "config": {str: str}}`` for ONNX, ``{"weight_cache": "memory"|"none"}`` for
TFLite; what is left out is the runtime's default, and "memory". "deadline_s": the job is killed after so long.
"watch_stdin": it is killed when standard input ends, because then the host has gone.

A model takes input_ids and attention_mask, and may take token_type_ids. Its outputs are float32 of any number and names:
[1, values] is one tensor of the whole input, [1, tokens, width] has a row per token, and so have start_logits and end_logits
[1, tokens]. What is computed for padding is cut off before outputs are compared or written.

An inputs file is little-endian, in units of four bytes:

* "PBI3"; int32 N >= 1, inputs; int32 K >= 0, outputs.
* int32 offsets[N + 1], rising from 0; int32 ids[offsets[N]]: input i is ids[offsets[i]:offsets[i + 1]]; int32 types[offsets[N]]:
  the token type of each id.
* K outputs, in the order of their names' bytes: the name in UTF-8, 1 to 63 bytes of 64, the rest zero; int32 width >= 0; int32
  offsets[N + 1], rising from 0; float32 values[offsets[N]]. The output for input i is values[offsets[i]:offsets[i + 1]]: a
  vector where the width is 0, else rows of that width.
* Nothing follows.

The answer: ``runtime``, ``conditions``, and what the mode gives; or ``{"error": {"kind", "message"}}`` with the exit code of
its kind. A process of its own does the work; the one that was started waits, and says so when the kernel killed it. A signal
that cannot be read is null, never 0.

What it does not do: time a model whose golden outputs are wrong; subtract the cost of calling a runtime from Python;
time and read memory in one process; merge or compare runs; open a connection; change governors or clocks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import select
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path

ROOT = Path("/")
SIGNATURE_PREFIX = "serving_"
MARK = 0x7A
VERSION = 3
MAGIC = b"PBI3"
NAME_BYTES = 64
INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
PER_TOKEN = ("start_logits", "end_logits")
EXIT_CODES = {
    "internal": 1, "bad_job": 2, "missing_runtime": 2, "too_long": 2, "wrong_output": 3, "timeout": 4, "out_of_memory": 4,
    "killed": 4, "host_gone": 4, "unreadable_model": 5, "failed_inference": 5,
}  # fmt: skip
BASE_KEYS = ("model", "format", "threads", "cores", "inputs", "golden", "tolerance")
MODE_KEYS = {
    "info": (), "memory": (), "count": (), "outputs": ("output",), "latency": ("cases", "warmup", "min_inferences", "min_seconds"),
    "sustained": ("warmup", "min_seconds", "window_seconds"),
}  # fmt: skip
SESSION_KEYS = {
    "onnx": ("threads", "graph_optimization_level", "memory_pattern", "memory_arena", "config"), "tflite": ("threads", "weight_cache"),
}  # fmt: skip
GRAPH_LEVELS = {
    "disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL",
}  # fmt: skip
ISA_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8",
    "amx_bf16", "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "sme",
)  # fmt: skip


class AgentError(Exception):
    """A measurement that was refused or could not be made; ``kind`` is a key of ``EXIT_CODES``."""

    def __init__(self, kind: str, message: str, **facts) -> None:
        super().__init__(message)
        self.kind = kind
        self.facts = facts


def main(arguments: list[str]) -> int:
    answer_fd = os.dup(1)  # kept for the answer alone: native libraries print to fd 1 whenever they like
    os.dup2(2, 1)
    try:
        job = read_job(arguments)
        if job["mode"] != "info":
            code = supervise(job)
            if code is not None:
                return code
        answer, code = run_job(job), 0
    except AgentError as error:
        answer, code = {"error": {"kind": error.kind, "message": str(error), **error.facts}}, EXIT_CODES[error.kind]
    except Exception as error:  # the caller reads JSON, so it is told in JSON
        traceback.print_exc()
        answer, code = {"error": {"kind": "internal", "message": f"{type(error).__name__}: {error}"}}, EXIT_CODES["internal"]
    document = json.dumps(answer, allow_nan=False)
    with os.fdopen(answer_fd, "w", encoding="ascii") as stream:
        stream.write(document + "\n")
    return code


# --- the process that waits ---------------------------------------------------------------------------------------


def supervise(job: dict) -> int | None:
    """Fork: None in the child, which does the work; in the parent the exit code of a child that ended by itself.

    The parent sleeps until the child ends, the deadline passes, or standard input ends (and ``watch_stdin`` is set).

    Raises:
        AgentError: in the parent, with why the child did not end by itself and the most memory it held (``rss_bytes``).
    """
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    kills_before = out_of_memory_kills()
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent()
        return None
    verdict = wait_for_end(job, ended)
    if verdict is not None:
        os.kill(worker, signal.SIGKILL)
    _, status, usage = os.wait4(worker, 0)
    if verdict is None and os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    rss_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if verdict is None:
        verdict = name_death(os.WTERMSIG(status), rss_bytes, kills_before, out_of_memory_kills())
    raise AgentError(verdict[0], f"{job['model']}: {verdict[1]}", rss_bytes=rss_bytes)


def wait_for_end(job: dict, ended: int) -> tuple[str, str] | None:
    """None when ``ended`` tells that the child has; else the (kind, reason) for which it must be stopped."""
    deadline_s = job.get("deadline_s")
    deadline = None if deadline_s is None else time.monotonic() + deadline_s
    watched = [ended, 0] if job.get("watch_stdin") else [ended]
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select(watched, [], [], left)[0]
        if ended in ready:
            return None
        if 0 in ready and not os.read(0, 4096):
            return "host_gone", "the host has gone; stopped"
        if not ready:
            return "timeout", f"no end within {deadline_s:g} s; stopped"


def name_death(number: int, rss_bytes: int, kills_before: int | None, kills_after: int | None) -> tuple[str, str]:
    """(kind, reason) of a child that a signal ended; the kills are the kernel's count of processes it killed for memory."""
    held = f"it held {rss_bytes / 1e6:.0f} MB at most"
    if number == signal.SIGKILL and None not in (kills_before, kills_after) and kills_after > kills_before:
        return "out_of_memory", f"out of memory: killed by the kernel; {held}"
    likely = "; the kernel does not say whether for memory" if number == signal.SIGKILL and kills_after is None else ""
    return "killed", f"killed by {signal.Signals(number).name}{likely}; {held}"


def out_of_memory_kills() -> int | None:
    for line in (read_text(ROOT, "proc/vmstat") or "").splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return None


def die_with_parent() -> None:
    """Linux kills this process when its parent ends, so that no work goes on that nobody waits for."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


# --- the job ------------------------------------------------------------------------------------------------------


def read_job(arguments: list[str]) -> dict:
    if len(arguments) != 1:
        raise AgentError("bad_job", "usage: python agent.py JOB.json")
    try:
        job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AgentError("bad_job", f"{arguments[0]}: cannot be read as a job: {error}") from error
    if not isinstance(job, dict) or job.get("mode") not in MODE_KEYS:
        raise AgentError("bad_job", f"{arguments[0]}: a job is an object with a mode of {', '.join(MODE_KEYS)}")
    needed = (*BASE_KEYS, *MODE_KEYS[job["mode"]]) if job["mode"] != "info" else ()
    missing = [key for key in needed if key not in job]
    if missing:
        raise AgentError("bad_job", f"{arguments[0]}: the job lacks {', '.join(missing)}")
    return job


def run_job(job: dict) -> dict:
    if job["mode"] == "info":
        return {"conditions": {**read_conditions(ROOT, None), "before": read_state(ROOT)}, "formats": installed_formats()}
    if job["format"] not in FORMATS:
        raise AgentError("bad_job", f"format {job['format']!r} is none of {', '.join(FORMATS)}")
    if not os.path.isfile(job["model"]):
        raise AgentError("bad_job", f"{job['model']}: no such file")
    if job["cores"] is not None:
        pin(choose_cores(job["cores"], ROOT))  # before the imports, because libraries start their threads there
    session = read_session(job)
    runtime, runtime_name = import_runtime(job["format"], session)
    inputs, _ = read_inputs(job["inputs"])
    golden = None if job["golden"] is None else read_inputs(job["golden"])
    if golden is not None and not golden[1][0]:
        raise AgentError("bad_job", f"{job['golden']}: has no outputs")
    answer = {"runtime": runtime_name, "conditions": read_conditions(ROOT, runtime_name)}
    measure = {
        "latency": measure_latency, "memory": measure_memory, "outputs": write_outputs, "count": mark_inferences, "sustained": measure_sustained,
    }[job["mode"]]  # fmt: skip
    answer["conditions"]["before"] = read_state(ROOT)
    answer.update(measure(job, runtime, inputs, golden))
    answer["conditions"]["after"] = read_state(ROOT)
    return answer


def read_session(job: dict) -> dict:
    """The options of the job's ``session``, {} if it has none."""
    session = job.get("session") or {}
    if not isinstance(session, dict):
        raise AgentError("bad_job", f"session: {session!r} is not an object of options")
    known = SESSION_KEYS[job["format"]]
    wrong = [key for key in session if key not in known]
    wrong += ["graph_optimization_level"] if session.get("graph_optimization_level", "all") not in GRAPH_LEVELS else []
    wrong += ["weight_cache"] if session.get("weight_cache", "memory") not in ("memory", "none") else []
    if wrong:
        raise AgentError("bad_job", f"session.{wrong[0]}: {session[wrong[0]]!r} is no option for {job['format']} files")
    return session


class Words:
    """The words of an inputs file, taken one stretch after the other. ValueError where the file does not hold what it says."""

    def __init__(self, words) -> None:
        self._words, self._at = words, 0

    def take(self, count: int):
        taken = self._words[self._at : self._at + count]
        if count < 0 or len(taken) != count:
            raise ValueError("the file is too short")
        self._at += count
        return taken

    def take_offsets(self, count: int):
        """Where ``count`` stretches begin, and where the last one ends."""
        import numpy as np

        offsets = self.take(count + 1).astype(np.int64)
        if offsets[0] != 0 or (np.diff(offsets) < 1).any():
            raise ValueError("offsets do not rise from 0")
        return offsets

    def take_name(self) -> bytes:
        name, _, rest = self.take(NAME_BYTES // 4).tobytes().partition(b"\0")
        if not 0 < len(name) < NAME_BYTES or rest.strip(b"\0"):
            raise ValueError("an output has no name")
        return name

    def finish(self) -> None:
        if self._at != len(self._words):
            raise ValueError("the file is too long")


def read_inputs(path: str) -> tuple:
    """(inputs, outputs) of an inputs file, both lists of N.

    An input is (ids int32 [n], types int32 [n]); its outputs are {name: float32 [values] or [rows, width]}, {} without any.
    """
    import numpy as np

    try:
        size, words = os.path.getsize(path), np.fromfile(path, dtype="<i4")
    except OSError as error:
        raise AgentError("bad_job", f"{path}: no inputs can be read: {error}") from error
    try:
        file = Words(words)
        if size % 4 or file.take(1).tobytes() != MAGIC:
            raise ValueError(f"it is none of version {VERSION}")
        count, names = (int(number) for number in file.take(2))
        if count < 1 or names < 0:
            raise ValueError("it has no inputs")
        offsets = file.take_offsets(count)
        ids, types = (np.split(file.take(int(offsets[-1])), offsets[1:-1]) for _ in range(2))
        outputs: list = [{} for _ in range(count)]
        last = b""
        for _ in range(names):
            name, width = file.take_name(), int(file.take(1)[0])
            offsets = file.take_offsets(count)
            if name <= last or width < 0 or (width and (offsets % width).any()):
                raise ValueError("its outputs are out of order")
            last = name
            for found, values in zip(outputs, np.split(file.take(int(offsets[-1])).view("<f4"), offsets[1:-1])):  # noqa: B905 - for Python 3.9
                found[name.decode()] = values.reshape(-1, width) if width else values
        file.finish()
    except ValueError as error:
        raise AgentError("bad_job", f"{path}: {size} bytes that are no inputs file: {error}") from error
    return list(zip(ids, types)), outputs  # noqa: B905 - strict= needs Python 3.10


def write_inputs(path, inputs, outputs=None) -> None:
    """Write an inputs file.

    Args:
        inputs: one pair or more of token ids and their types, both [n], n >= 1.
        outputs: {name: array [values] or [rows, width]} for every input, all with the same names and widths.
    """
    import numpy as np

    outputs = [{}] * len(inputs) if outputs is None else outputs
    names = {name.encode(): name for name in outputs[0]} if len(outputs) else {}
    if not len(inputs) or len(outputs) != len(inputs) or any(len(ids) < 1 or len(ids) != len(types) for ids, types in inputs):
        raise ValueError(f"{path}: {len(outputs)} outputs for {len(inputs)} inputs, one of them empty, or with other types than ids")
    if any(set(found) != set(outputs[0]) for found in outputs) or not all(0 < len(name) < NAME_BYTES for name in names):
        raise ValueError(f"{path}: outputs with other names than {sorted(outputs[0])}, or with a name that is too long")

    def stretches(arrays: list, dtype: str) -> list:
        offsets = np.cumsum([0, *(array.size for array in arrays)])
        if offsets[-1] > 0x7FFFFFFF:
            raise ValueError(f"{path}: {offsets[-1]} values are more than a file can hold")
        return [offsets.astype("<i4"), *(array.astype(dtype) for array in arrays)]

    columns = [[np.asarray(pair[column]) for pair in inputs] for column in range(2)]
    parts = [np.array([len(inputs), len(names)], "<i4"), *stretches(columns[0], "<i4"), *(types.astype("<i4") for types in columns[1])]
    for encoded, name in sorted(names.items()):
        arrays = [np.asarray(found[name]) for found in outputs]
        widths = {array.shape[1] if array.ndim == 2 else 0 for array in arrays}
        if len(widths) != 1 or any(array.ndim not in (1, 2) or not array.size for array in arrays):
            raise ValueError(f"{path}: output {name} is not [values] or [rows, width] for every input, of one width")
        parts += [np.frombuffer(encoded.ljust(NAME_BYTES, b"\0"), "u1"), np.array([widths.pop()], "<i4"), *stretches(arrays, "<f4")]
    with open(path, "wb") as file:
        file.write(MAGIC)
        for part in parts:
            file.write(part.tobytes())


def choose_cores(cores, root: Path) -> list[int]:
    """The cores that "big" or "little" names, by what the machine says of them; a list as it is."""
    if cores not in ("big", "little"):
        return cores
    clusters = read_clusters(root)
    if clusters is None or len(clusters) < 2:
        reason = "the machine does not say which those are" if clusters is None else "all cores are alike here"
        raise AgentError("bad_job", f"cores {cores!r}: {reason}; leave cores out or give their numbers")
    return clusters[-1 if cores == "big" else 0]["cores"]


def pin(cores: list[int]) -> None:
    """Run on ``cores`` only, with every thread started from now on."""
    if not hasattr(os, "sched_setaffinity"):
        raise AgentError("bad_job", f"{platform.system()} cannot pin to cores; leave cores out")
    try:
        os.sched_setaffinity(0, cores)
        refused = os.sched_getaffinity(0) != set(cores)
    except (OSError, ValueError, TypeError):
        refused = True
    if refused:
        raise AgentError("bad_job", f"cannot pin to cores {cores}; this process may use {read_affinity()}")


# --- models -------------------------------------------------------------------------------------------------------


class OnnxModel:
    """onnxruntime on the CPU, batch 1; an input runs at its own length. ``session`` as in the job, None for the defaults."""

    def __init__(self, path: str, threads: int, onnxruntime, session: dict | None = None) -> None:
        session = session or {}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        level = GRAPH_LEVELS[session.get("graph_optimization_level", "all")]
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.enable_mem_pattern = session.get("memory_pattern", True)
        options.enable_cpu_mem_arena = session.get("memory_arena", True)
        for key, value in session.get("config", {}).items():
            options.add_session_config_entry(key, value)
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._outputs = [item.name for item in self._session.get_outputs()]
        self._path = path
        check_names(path, self._inputs, self._outputs)

    def computed_length(self, length: int) -> int:
        """Tokens that are computed for an input of ``length`` tokens."""
        return length

    def feed(self, ids, types):
        """What :meth:`run` takes for one input, int [n] each."""
        return make_feed(self._inputs, ids, types, len(ids), "int64")

    def run(self, feed):
        """What is timed: every output of the file, read back as an app would."""
        return self._session.run(self._outputs, feed)

    def outputs(self, feed, result, length: int) -> dict:
        """What :meth:`run` gave for an input of ``length`` tokens, as :func:`name_outputs` has it."""
        return name_outputs(self._path, dict(zip(self._outputs, result)), length)  # noqa: B905 - strict= needs Python 3.10


class BucketedModel:
    """An input runs in the smallest signature ``serving_N`` that holds it, padded with zeros."""

    def __init__(self, path: str, names) -> None:
        self._path = path
        self._names = {int(n[len(SIGNATURE_PREFIX) :]): n for n in names if n.startswith(SIGNATURE_PREFIX)}
        self._buckets = sorted(self._names)
        if not self._buckets:
            raise AgentError("unreadable_model", f"{path}: no signature {SIGNATURE_PREFIX}N")

    def _check_signatures(self, signatures) -> None:
        """Refuse signatures, (names of inputs, names of outputs) each, that no text runs in or that do not agree."""
        given = set()
        for inputs, outputs in signatures:
            check_names(self._path, inputs, outputs)
            given.add(tuple(sorted(outputs)))
        if len(given) > 1:
            raise AgentError("unreadable_model", f"{self._path}: its signatures have different outputs")

    def computed_length(self, length: int) -> int:
        for bucket in self._buckets:
            if bucket >= length:
                return bucket
        message = f"{self._path}: {length} tokens do not fit the largest bucket of {self._buckets[-1]}"
        raise AgentError("too_long", message)


class TfliteModel(BucketedModel):
    """The interpreter of LiteRT or tflite-runtime, which packs the weights once for each signature."""

    def __init__(self, path: str, threads: int, interpreter_class) -> None:
        with native_stderr_silenced():
            self._interpreter = interpreter_class(model_path=path, num_threads=threads)
            # Before any signature is asked for, or tflite-runtime 2.14 leaves XNNPACK out and takes four times as long.
            self._interpreter.allocate_tensors()
            super().__init__(path, self._interpreter.get_signature_list())
            runners = {bucket: self._interpreter.get_signature_runner(name) for bucket, name in self._names.items()}
        self._runners = {bucket: (runner, list(runner.get_input_details())) for bucket, runner in runners.items()}
        self._check_signatures((inputs, list(runner.get_output_details())) for runner, inputs in self._runners.values())

    def feed(self, ids, types):
        bucket = self.computed_length(len(ids))
        runner, inputs = self._runners[bucket]
        return runner, make_feed(inputs, ids, types, bucket, "int32")

    def run(self, feed):
        runner, arrays = feed
        return runner(**arrays)

    def outputs(self, feed, result, length: int) -> dict:
        return name_outputs(self._path, result, length)


class CompiledTfliteModel(BucketedModel):
    """LiteRT's CompiledModel with one copy of packed weights for all signatures; ``compile`` is of :func:`litert_compiler`."""

    def __init__(self, path: str, threads: int, compile) -> None:
        import numpy as np

        with native_stderr_silenced():
            self._model = compile(path, threads)
            signatures = self._model.get_signature_list()
            super().__init__(path, signatures)
            self._check_signatures((signatures[name]["inputs"], signatures[name]["outputs"]) for name in self._names.values())
            self._parts, self._shapes = {}, {}
            for bucket, name in self._names.items():
                inputs, outputs = signatures[name]["inputs"], signatures[name]["outputs"]
                details = self._model.get_output_tensor_details(name)
                buffers = [self._model.create_input_buffer_by_name(name, item) for item in inputs]
                results = [self._model.create_output_buffer_by_name(name, item) for item in outputs]
                for buffer in buffers:  # the first one written makes LiteRT speak again
                    buffer.write(np.zeros((1, bucket), dtype="int32"))
                other = [item for item in outputs if np.dtype(details[item]["dtype"]) != np.float32]
                if other:
                    raise AgentError("unreadable_model", f"{path}: {other[0]} is {np.dtype(details[other[0]]['dtype'])}; needed: float32")
                index = self._model.get_signature_index(name)
                read_back = [(buffer, int(np.prod(details[item]["shape"]))) for buffer, item in zip(results, outputs)]  # noqa: B905 - for Python 3.9
                self._parts[bucket] = inputs, (index, buffers, results, read_back)
                self._shapes[index] = {item: tuple(details[item]["shape"]) for item in outputs}

    def feed(self, ids, types):
        bucket = self.computed_length(len(ids))
        inputs, parts = self._parts[bucket]
        return list(make_feed(inputs, ids, types, bucket, "int32").values()), parts

    def run(self, feed):
        arrays, (index, buffers, results, read_back) = feed
        for buffer, array in zip(buffers, arrays):  # noqa: B905 - strict= needs Python 3.10
            buffer.write(array)
        self._model.run_by_index(index, buffers, results)
        return [buffer.read(size, "float32") for buffer, size in read_back]

    def outputs(self, feed, result, length: int) -> dict:
        shapes = self._shapes[feed[1][0]]
        arrays = {name: values.reshape(shapes[name]) for name, values in zip(shapes, result)}  # noqa: B905 - strict= needs Python 3.10
        return name_outputs(self._path, arrays, length)


FORMATS = ("onnx", "tflite")


def check_names(path: str, inputs: list[str], outputs: list[str]) -> None:
    """Refuse a file that takes something else than tokens, or gives nothing that an inputs file could hold."""
    if not {"input_ids", "attention_mask"} <= set(inputs) <= set(INPUT_NAMES) or not outputs:
        found = f"inputs {', '.join(inputs)}; outputs {', '.join(outputs)}"
        raise AgentError("unreadable_model", f"{path}: {found}; needed: input_ids, attention_mask and no more than token_type_ids -> one output")
    long = [name for name in outputs if len(name.encode()) >= NAME_BYTES]
    if long:
        raise AgentError("unreadable_model", f"{path}: output {long[0]}: a name may have {NAME_BYTES - 1} bytes")


def make_feed(names: list[str], ids, types, length: int, dtype: str) -> dict:
    """Arrays [1, length]: ids, a mask with ones where there are ids, and token types; those that the model takes."""
    import numpy as np

    arrays = {name: np.zeros((1, length), dtype=dtype) for name in names}
    arrays["input_ids"][0, : len(ids)] = ids
    arrays["attention_mask"][0, : len(ids)] = 1
    if "token_type_ids" in arrays:
        arrays["token_type_ids"][0, : len(ids)] = types
    return arrays


def name_outputs(path: str, arrays: dict, length: int) -> dict:
    """name -> float32 [values] or [rows, width], out of arrays with a batch axis of 1; nothing of padding behind ``length``."""
    found = {}
    for name, array in arrays.items():
        if str(array.dtype) != "float32" or array.ndim not in (2, 3) or len(array) != 1 or not array.size:
            shape = f"{array.dtype} {list(array.shape)}"
            raise AgentError("unreadable_model", f"{path}: {name} is {shape}; needed: float32 [1, values] or [1, tokens, width]")
        per_token = array.ndim == 3 or name in PER_TOKEN
        found[name] = array[0, :length] if per_token else array[0]
    return found


def import_runtime(file_format: str, session: dict) -> tuple:
    """((path, threads) -> a model; name of the runtime with its version)."""
    try:
        import numpy  # noqa: F401 - part of the baseline, like the runtime

        if file_format == "onnx":
            os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # its upload thread starts at import
            import onnxruntime

            onnxruntime.disable_telemetry_events()
            return lambda path, threads: OnnxModel(path, threads, onnxruntime, session), f"onnxruntime {onnxruntime.__version__}"
        if importlib.util.find_spec("ai_edge_litert") is not None:
            import ai_edge_litert
            from ai_edge_litert.interpreter import Interpreter

            name = f"ai-edge-litert {getattr(ai_edge_litert, '__version__', 'unknown')}"
            # Versions up to 2.1 have a CompiledModel without options.
            if session.get("weight_cache", "memory") == "memory" and importlib.util.find_spec("ai_edge_litert.options") is not None:
                compile = litert_compiler()
                return lambda path, threads: CompiledTfliteModel(path, threads, compile), name
            return lambda path, threads: TfliteModel(path, threads, Interpreter), name
        import tflite_runtime
        from tflite_runtime.interpreter import Interpreter

        return lambda path, threads: TfliteModel(path, threads, Interpreter), f"tflite-runtime {tflite_runtime.__version__}"
    except ImportError as error:
        raise AgentError("missing_runtime", f"no runtime for {file_format} files in {sys.executable}: {error}") from error


@functools.lru_cache(maxsize=1)
def litert_compiler():
    """(path, threads) -> LiteRT's CompiledModel on the CPU, with its packed weights in memory; one environment for all."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.environment import Environment
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator
    from ai_edge_litert.options import CpuOptions, Options

    # LiteRT tells of its accelerators once more when the process ends, after Python is gone.
    atexit.register(silence_native_stderr)
    with native_stderr_silenced():
        environment = Environment.create()

    def compile(path: str, threads: int):
        cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=":memory")  # a name that XNNPACK keeps for "no file"
        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
        return CompiledModel.from_file(path, options=options, environment=environment)

    return compile


@contextlib.contextmanager
def native_stderr_silenced():
    """LiteRT logs every accelerator that it tries, and has no switch for it (2.3). What goes wrong is raised, not printed."""
    saved = os.dup(2)
    try:
        silence_native_stderr()
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def silence_native_stderr() -> None:
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def installed_formats() -> dict[str, str]:
    """format -> the runtime that would run it here, with its version; nothing is imported."""
    modules = {"onnx": ("onnxruntime",), "tflite": ("ai_edge_litert", "tflite_runtime")}
    found = {name: next((m for m in either if importlib.util.find_spec(m) is not None), None) for name, either in modules.items()}
    return {name: f"{module.replace('_', '-')} {version_of(module)}" for name, module in found.items() if module is not None}


def version_of(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def load(job: dict, runtime):
    try:
        return runtime(job["model"], job["threads"])
    except AgentError:
        raise
    except Exception as error:  # each runtime raises a family of its own
        raise AgentError("unreadable_model", f"{job['model']}: cannot be loaded: {error}") from error


def infer(job: dict, model, feed):
    try:
        return model.run(feed)
    except Exception as error:  # each runtime raises a family of its own
        raise AgentError("failed_inference", f"{job['model']}: loaded, but inference failed: {error}") from error


def outputs_of(job: dict, model, ids, types) -> dict:
    """What the model gives for one input: name -> float32 [values] or [rows, width]."""
    feed = model.feed(ids, types)
    return model.outputs(feed, infer(job, model, feed), len(ids))


def check_golden(job: dict, model, golden: tuple) -> None:
    """Refuse a model with a golden output that is missing, of another shape, off by more than the tolerance, or not a number."""
    import numpy as np

    for number, ((ids, types), expected) in enumerate(zip(*golden), start=1):  # noqa: B905 - strict= needs Python 3.10
        got = outputs_of(job, model, ids, types)
        case = f"{job['model']}: golden case {number} differs"
        for name, values in expected.items():
            if name not in got:
                raise AgentError("wrong_output", f"{case}: there is no output {name}")
            if got[name].shape != values.shape:
                raise AgentError("wrong_output", f"{case} in {name}: its shape is {list(got[name].shape)}, not {list(values.shape)}")
            worst = float(np.abs(got[name] - values).max())
            if not worst <= job["tolerance"]:
                raise AgentError("wrong_output", f"{case} by {worst:.4g} in {name}, at most {job['tolerance']:.4g} is allowed")


# --- measuring ----------------------------------------------------------------------------------------------------


def measure_latency(job: dict, runtime, inputs: list, golden) -> dict:
    """Load and first inference, then each case; all in one process on one loaded model."""
    start = time.perf_counter_ns()
    model = load(job, runtime)
    loaded = time.perf_counter_ns()
    first = model.feed(*(inputs if golden is None else golden[0])[0])
    start_first = time.perf_counter_ns()
    infer(job, model, first)
    end_first = time.perf_counter_ns()
    if golden is not None:
        check_golden(job, model, golden)
    cases = [measure_case(job, model, case, inputs) for case in job["cases"]]
    return {"load_ms": milliseconds(loaded - start), "first_inference_ms": milliseconds(end_first - start_first), "cases": cases}


def measure_case(job: dict, model, case: dict, inputs: list) -> dict:
    """Time every inference of one case, over and over the inputs until both minimums are reached."""
    import numpy as np

    if case["case"] == "length":
        length = case["length"]
        inputs = [(np.resize(ids, length), np.resize(types, length)) for ids, types in inputs[: job["warmup"]["window"]]]  # repeated or cut
    feeds = [model.feed(ids, types) for ids, types in inputs]
    lengths = [len(ids) for ids, _ in inputs]
    shapes = {model.computed_length(length): feeds[index] for index, length in enumerate(lengths)}
    warmup = warm_up(job, model, list(shapes.values()), feeds)
    gc.collect()
    gc.disable()
    try:
        samples_ns = time_inferences(model, feeds, case.get("min_inferences", job["min_inferences"]), job["min_seconds"])
    finally:
        gc.enable()
    tokens_mean = float(np.resize(lengths, len(samples_ns)).mean())  # the loop went round the inputs
    result = {"case": case["case"], "length": case.get("length"), "tokens_mean": round(tokens_mean, 3), "warmup": warmup}
    return {**result, **latency_summary(samples_ns), "samples_ns": samples_ns}


def warm_up(job: dict, model, shapes: list, feeds: list) -> dict:
    """Run every shape once, then one window of inferences again and again until two successive medians agree.

    The window holds the same inputs each time, or their lengths would be compared. At most ``max_seconds`` go into windows.
    """
    plan = job["warmup"]
    for feed in shapes:
        infer(job, model, feed)
    window = [feeds[i % len(feeds)] for i in range(plan["window"])]
    start = time.perf_counter()
    medians, inferences, stable, elapsed = [], len(shapes), False, 0.0
    while not stable and elapsed < plan["max_seconds"]:
        samples = []
        for feed in window:
            before = time.perf_counter()
            infer(job, model, feed)
            samples.append(time.perf_counter() - before)
            inferences += 1
            elapsed = time.perf_counter() - start
            if elapsed >= plan["max_seconds"]:
                break
        else:
            medians.append(statistics.median(samples))
            stable = len(medians) > 1 and abs(medians[-1] - medians[-2]) <= plan["tolerance"] * medians[-2]
    return {"inferences": inferences, "seconds": round(elapsed, 3), "stable": stable}


def time_inferences(model, feeds: list, min_inferences: int, min_seconds: float) -> list[int]:
    """Nanoseconds of each inference; the clock is read right before and after the call of the runtime."""
    clock, run, samples_ns = time.perf_counter_ns, model.run, []
    deadline = clock() + int(min_seconds * 1e9)
    while True:
        for feed in feeds:
            start = clock()
            run(feed)
            end = clock()
            samples_ns.append(end - start)
            if len(samples_ns) >= min_inferences and end >= deadline:
                return samples_ns


def latency_summary(samples_ns: list[int]) -> dict:
    """count, mean, min, p50, p90, p99 and the percentiles 0..100 in milliseconds, rounded to 1e-5."""
    import numpy as np

    quantiles = [milliseconds(q) for q in np.percentile(samples_ns, np.arange(101))]
    named = {"p50_ms": quantiles[50], "p90_ms": quantiles[90], "p99_ms": quantiles[99], "min_ms": quantiles[0]}
    return {"count": len(samples_ns), "mean_ms": milliseconds(np.mean(samples_ns)), **named, "quantiles_ms": quantiles}


def milliseconds(nanoseconds) -> float:
    return round(float(nanoseconds) / 1e6, 5)


def measure_memory(job: dict, runtime, inputs: list, golden) -> dict:
    """Peak RSS after every input ran once, against the RSS with runtime, inputs and golden cases but no model. No timing.

    Pages of a model file that the runtime maps count as soon as they are touched.
    """
    baseline = read_memory_bytes(ROOT, "VmRSS")
    model = load(job, runtime)
    if golden is not None:
        check_golden(job, model, golden)
    for ids, types in inputs:
        infer(job, model, model.feed(ids, types))
    peak = read_memory_bytes(ROOT, "VmHWM")
    difference = None if baseline is None or peak is None else peak - baseline
    shared_out = read_memory_bytes(ROOT, "Pss", "proc/self/smaps_rollup")
    return {"memory": {"baseline_bytes": baseline, "peak_bytes": peak, "model_bytes": difference, "pss_bytes": shared_out}}


def write_outputs(job: dict, runtime, inputs: list, golden) -> dict:
    """What the model gives for every input, for a proof elsewhere that this machine computes what others do."""
    model = load(job, runtime)
    if golden is not None:
        check_golden(job, model, golden)
    outputs = [outputs_of(job, model, ids, types) for ids, types in inputs]
    try:
        write_inputs(job["output"], inputs, outputs)
    except OSError as error:
        raise AgentError("bad_job", f"{job['output']}: cannot be written: {error}") from error
    except ValueError as error:  # an output that changes its form from input to input
        raise AgentError("unreadable_model", f"{job['model']}: its outputs cannot be written: {error}") from error
    return {"outputs": sorted(outputs[0])}


def mark_inferences(job: dict, runtime, inputs: list, golden) -> dict:
    """Each input once to warm up and once between two marks."""
    import ctypes

    mark = ctypes.CDLL(None).getpriority
    model = load(job, runtime)
    if golden is not None:
        check_golden(job, model, golden)
    for number, (ids, types) in enumerate(inputs):
        feed = model.feed(ids, types)
        infer(job, model, feed)
        mark(MARK, 2 * number)
        model.run(feed)
        mark(MARK, 2 * number + 1)
    return {"marked": len(inputs)}


def measure_sustained(job: dict, runtime, inputs: list, golden) -> dict:
    """Latency over a long time: one window after the other, with clocks and temperatures, to show what heat does."""
    import numpy as np

    model = load(job, runtime)
    if golden is not None:
        check_golden(job, model, golden)
    feeds = [model.feed(ids, types) for ids, types in inputs]
    warm_up(job, model, feeds, feeds)
    windows, start = [], time.monotonic()
    position = 0
    while time.monotonic() - start < job["min_seconds"]:
        # From where the last window stopped, so that every window sees a fair mix of the inputs.
        turned = feeds[position:] + feeds[:position]
        at_s = time.monotonic() - start
        samples_ns = time_inferences(model, turned, 1, job["window_seconds"])
        position = (position + len(samples_ns)) % len(feeds)
        p50, p90 = (milliseconds(q) for q in np.percentile(samples_ns, (50, 90)))
        state = read_state(ROOT)
        windows.append(
            {"at_s": round(at_s, 3), "count": len(samples_ns), "p50_ms": p50, "p90_ms": p90}
            | {key: state[key] for key in ("frequencies_khz", "temperatures_c")}
        )
    return {"windows": windows}


# --- conditions: files under ``root``, so that tests can bring their own ------------------------------------------


def read_conditions(root: Path, runtime: str | None) -> dict:
    """What does not change during a run. Every value may be null: the machine does not say.

    ``capacities``, ``governors`` and ``max_frequencies_khz`` go with ``cores``, as do ``frequencies_khz`` of :func:`read_state`.
    """
    cpu = read_cpu(root)
    flags = (cpu.get("flags") or cpu.get("Features") or [""])[0].split()
    arm_parts = zip(cpu.get("CPU implementer", []), cpu.get("CPU part", []))  # noqa: B905 - strict= needs Python 3.10
    parts = [f"implementer {implementer} part {part}" for implementer, part in arm_parts]
    cores = core_folders(root)
    numpy = sys.modules.get("numpy")
    libc, libc_version = platform.libc_ver()
    return {
        "cpu_model": " + ".join(sorted(set(cpu.get("model name") or parts))) or None,
        "board": read_line(root, "sys/firmware/devicetree/base/model"),
        "architecture": platform.machine() or None,
        "isa": [name for name in ISA_FLAGS if name in flags] if flags else None,
        "cores": [int(folder.name[3:]) for folder in cores] or None,
        "capacities": null_if_all_null([read_number(root, folder / "cpu_capacity") for folder in cores]),
        "governors": null_if_all_null([read_line(root, folder / "cpufreq/scaling_governor") for folder in cores]),
        "max_frequencies_khz": null_if_all_null([read_number(root, folder / "cpufreq/scaling_max_freq") for folder in cores]),
        "clusters": read_clusters(root),
        "affinity": read_affinity(),
        "memory_total_bytes": read_memory_bytes(root, "MemTotal", "proc/meminfo"),
        "kernel": f"{platform.system()} {platform.release()}",
        "libc": f"{libc} {libc_version}" if libc else None,
        "agent": f"python agent {VERSION}",
        "python": platform.python_version(),
        "numpy": None if numpy is None else numpy.__version__,
        "runtime": runtime,
    }


def read_clusters(root: Path) -> list | None:
    """Cores that are alike, the weakest first: by capacity where the kernel gives it, else by highest clock; null if neither."""
    cores = core_folders(root)
    capacities = [read_number(root, folder / "cpu_capacity") for folder in cores]
    clocks = [read_number(root, folder / "cpufreq/cpuinfo_max_freq") for folder in cores]
    strengths = clocks if None in capacities else capacities
    if not cores or None in strengths:
        return None
    clusters = []
    for strength in sorted(set(strengths)):
        members = [index for index, value in enumerate(strengths) if value == strength]
        numbers = [int(cores[index].name[3:]) for index in members]
        clusters.append({"cores": numbers, "capacity": capacities[members[0]], "max_frequency_khz": clocks[members[0]]})
    return clusters


def read_state(root: Path) -> dict:
    """What changes during a run.

    Load average of 1, 5, 15 minutes; temperature of each zone in °C; clock of each core; ``throttled``, the Raspberry Pi's
    bits (1 under-voltage, 2 clock capped, 4 throttled, 8 soft limit; shifted by 16: since boot); how hard each cooling device
    works; the battery; ``pressure``, the share of the last 10 s in which something waited, in percent.
    """
    clocks = [read_number(root, folder / "cpufreq/scaling_cur_freq") for folder in core_folders(root)]
    cooling = read_by_type(root, "sys/class/thermal", "cooling_device", "cur_state")
    return {
        "loadavg": read_load(root),
        "temperatures_c": {
            name: None if degrees is None else degrees / 1000
            for name, degrees in read_by_type(root, "sys/class/thermal", "thermal_zone", "temp").items()
        } or None,
        "frequencies_khz": null_if_all_null(clocks),
        "throttled": read_number(root, "sys/devices/platform/soc/soc:firmware/get_throttled", base=16, zero=True),
        "cooling": cooling or None,
        "battery": read_battery(root),
        "pressure": {kind: read_pressure(root, kind) for kind in ("cpu", "memory")} if (root / "proc/pressure").is_dir() else None,
    }  # fmt: skip


def read_load(root: Path) -> list | None:
    try:
        return [float(value) for value in (read_line(root, "proc/loadavg") or "").split()[:3]] or None
    except ValueError:
        return None


def read_by_type(root: Path, folder: str, kind: str, name: str) -> dict:
    """What each device of a kind says, under the name that its driver gives it; devices of one name are told apart by number."""
    found: dict = {}
    for device in sorted((root / folder).glob(kind + "[0-9]*"), key=lambda device: int(device.name[len(kind) :])):
        label = read_line(root, device / "type") or device.name
        found[f"{label} {device.name}" if label in found else label] = read_number(root, device / name, zero=name == "cur_state")
    return found


def read_battery(root: Path) -> dict | None:
    """Of the first battery: charge in percent, what it does, current (signs differ between drivers) and voltage."""
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if read_line(root, supply / "type") == "Battery":
            return {
                "capacity_percent": read_number(root, supply / "capacity", zero=True), "status": read_line(root, supply / "status"),
                "current_ua": read_number(root, supply / "current_now", zero=True), "voltage_uv": read_number(root, supply / "voltage_now"),
            }  # fmt: skip
    return None


def read_pressure(root: Path, kind: str) -> float | None:
    for line in (read_text(root, f"proc/pressure/{kind}") or "").splitlines():
        found = re.match(r"some avg10=([0-9.]+)", line)
        if found:
            return float(found[1])
    return None


def core_folders(root: Path) -> list[Path]:
    found = [f for f in (root / "sys/devices/system/cpu").glob("cpu[0-9]*") if f.name[3:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[3:]))


def null_if_all_null(values: list) -> list | None:
    return None if all(value is None for value in values) else values


def read_cpu(root: Path) -> dict[str, list[str]]:
    """Each key of /proc/cpuinfo -> its values in order of cores; {} where there is no such file."""
    found: dict[str, list[str]] = {}
    for line in (read_text(root, "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if value.strip():
            found.setdefault(key.strip(), []).append(value.strip())
    return found


def read_memory_bytes(root: Path, field: str, file: str = "proc/self/status") -> int | None:
    """A field such as ``VmRSS`` or ``VmHWM`` of this process; a Linux kernel gives kibibytes."""
    for line in (read_text(root, file) or "").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def read_affinity() -> list[int] | None:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def read_number(root: Path, path, base: int = 10, zero: bool = False) -> int | None:
    """None for text, and for 0 unless that is an answer: drivers write it for "not known"."""
    try:
        value = int(read_line(root, path) or "", base)
    except ValueError:
        return None
    return value if value or zero else None


def read_line(root: Path, path) -> str | None:
    return (read_text(root, path) or "").strip("\0 \n") or None


def read_text(root: Path, path) -> str | None:
    """None where the machine has no such signal or keeps it to itself."""
    try:
        return (root / path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
