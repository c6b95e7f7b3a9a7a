"""Measure one model file on the machine this runs on, after a proof that its outputs are right.

::

    python agent.py JOB.json          prints exactly one JSON document on stdout; logs of the runtimes go to stderr

Self-contained: the standard library, numpy, and one of onnxruntime, ai-edge-litert, tflite-runtime. Python >= 3.9.
``agent/runner`` holds its sibling in C for places without Python; both speak this protocol.

The job is an object with "mode" and, but for mode info, "model" (path), "format" ("onnx" or "tflite"), "threads", "cores"
([int], "big", "little" or null), "inputs" (path of a .texts file), "golden" (the same with logits, or null), "tolerance":

* info: conditions, and the formats that can run here with the name of their runtime.
* latency: "cases" [{"case": "texts"} | {"case": "length", "length": int}], "warmup" {"window": int, "tolerance": float,
  "max_seconds": float}, "min_inferences", "min_seconds". A case may carry a "min_inferences" of its own.
* memory: every text once; peak against baseline.
* outputs: every text once; its logits go to the file "output", float32 [N, C], little-endian.
* count: every text once, then once more between getpriority(0x7a, 2i) and getpriority(0x7a, 2i + 1), which an emulator that
  counts instructions looks for and a kernel refuses without harm.
* sustained: texts for "min_seconds" after "warmup", summed up once per "window_seconds".

Optional: "session" is that of a bundle's manifest (its "threads" are not read): ``{"graph_optimization_level": str,
"memory_pattern": bool, "memory_arena": bool, "config": {str: str}}`` for ONNX, ``{"weight_cache": "memory"|"none"}`` for
TFLite; what is left out is the runtime's default, and "memory". "deadline_s": the job is killed after so long.
"watch_stdin": it is killed when standard input ends, because then the host has gone. A .texts file: little-endian int32 N,
int32 C (0: no logits), int32 offsets[N + 1], int32 ids[offsets[N]], float32 logits[N, C].

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
VERSION = 2
OUTPUTS = ("logits", "probabilities")
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
    texts, _ = read_texts(job["inputs"])
    golden = None if job["golden"] is None else read_texts(job["golden"])
    if golden is not None and golden[1] is None:
        raise AgentError("bad_job", f"{job['golden']}: has no logits")
    answer = {"runtime": runtime_name, "conditions": read_conditions(ROOT, runtime_name)}
    measure = {
        "latency": measure_latency, "memory": measure_memory, "outputs": write_outputs, "count": mark_inferences, "sustained": measure_sustained,
    }[job["mode"]]  # fmt: skip
    answer["conditions"]["before"] = read_state(ROOT)
    answer.update(measure(job, runtime, texts, golden))
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


def read_texts(path: str) -> tuple:
    """(texts as int arrays [n_tokens], logits float32 [N, C] or None) of a .texts file."""
    import numpy as np

    try:
        words = np.fromfile(path, dtype="<i4")
    except OSError as error:
        raise AgentError("bad_job", f"{path}: no texts can be read: {error}") from error
    count, classes = words[:2].tolist() if len(words) > 1 else (0, 0)
    offsets = words[2 : count + 3]
    if count < 1 or classes < 0 or len(offsets) != count + 1 or offsets[0] != 0 or (np.diff(offsets) < 1).any():
        raise AgentError("bad_job", f"{path}: not a .texts file with one text or more, none of them empty")
    ids, logits = words[count + 3 :][: offsets[-1]], words[count + 3 + offsets[-1] :]
    if len(ids) != offsets[-1] or len(logits) != count * classes:
        raise AgentError("bad_job", f"{path}: {os.path.getsize(path)} bytes are too few or too many for {count} texts with {classes} logits each")
    return np.split(ids, offsets[1:-1]), logits.view("<f4").reshape(count, classes) if classes else None


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
    """onnxruntime on the CPU, batch 1; a text runs at its own length. ``session`` as in the job, None for the defaults."""

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
        self._output = [check_names(path, self._inputs, [item.name for item in self._session.get_outputs()])]

    def computed_length(self, length: int) -> int:
        """Tokens that are computed for a text of ``length`` tokens."""
        return length

    def feed(self, ids):
        """What :meth:`run` takes for one text int [n_tokens]."""
        return make_feed(self._inputs, ids, len(ids), "int64")

    def run(self, feed):
        """Logits [1, C], or probabilities where that is what the file gives."""
        return self._session.run(self._output, feed)[0]


class BucketedModel:
    """A text runs in the smallest signature ``serving_N`` that holds it, padded with zeros."""

    def __init__(self, path: str, names) -> None:
        self._path = path
        self._names = {int(n[len(SIGNATURE_PREFIX) :]): n for n in names if n.startswith(SIGNATURE_PREFIX)}
        self._buckets = sorted(self._names)
        if not self._buckets:
            raise AgentError("unreadable_model", f"{path}: no signature {SIGNATURE_PREFIX}N")

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
        for runner, inputs in self._runners.values():
            self._output = check_names(path, inputs, list(runner.get_output_details()))

    def feed(self, ids):
        bucket = self.computed_length(len(ids))
        runner, inputs = self._runners[bucket]
        return runner, make_feed(inputs, ids, bucket, "int32")

    def run(self, feed):
        runner, arrays = feed
        return runner(**arrays)[self._output]


class CompiledTfliteModel(BucketedModel):
    """LiteRT's CompiledModel with one copy of packed weights for all signatures; ``compile`` is of :func:`litert_compiler`."""

    def __init__(self, path: str, threads: int, compile) -> None:
        import numpy as np

        with native_stderr_silenced():
            self._model = compile(path, threads)
            signatures = self._model.get_signature_list()
            super().__init__(path, signatures)
            self._parts = {}
            for bucket, name in self._names.items():
                inputs, outputs = signatures[name]["inputs"], signatures[name]["outputs"]
                output = check_names(path, inputs, outputs)
                buffers = [self._model.create_input_buffer_by_name(name, item) for item in inputs]
                results = [self._model.create_output_buffer_by_name(name, item) for item in outputs]
                for buffer in buffers:  # the first one written makes LiteRT speak again
                    buffer.write(np.zeros((1, bucket), dtype="int32"))
                shape = self._model.get_output_tensor_details(name)[output]["shape"]
                logits = results[outputs.index(output)]
                self._parts[bucket] = inputs, (self._model.get_signature_index(name), buffers, results, logits, tuple(shape))

    def feed(self, ids):
        bucket = self.computed_length(len(ids))
        inputs, parts = self._parts[bucket]
        return list(make_feed(inputs, ids, bucket, "int32").values()), parts

    def run(self, feed):
        arrays, (index, buffers, results, logits, shape) = feed
        for buffer, array in zip(buffers, arrays):  # noqa: B905 - strict= needs Python 3.10
            buffer.write(array)
        self._model.run_by_index(index, buffers, results)
        return logits.read(shape[0] * shape[1], "float32").reshape(shape)


FORMATS = ("onnx", "tflite")


def check_names(path: str, inputs: list[str], outputs: list[str]) -> str:
    """The name of the result; refuses a file that is no text classifier's."""
    known = {"input_ids", "attention_mask", "token_type_ids"}
    if not {"input_ids", "attention_mask"} <= set(inputs) <= known or not set(OUTPUTS) & set(outputs):
        message = f"{path}: inputs {sorted(inputs)}, outputs {sorted(outputs)}; needed: input_ids, attention_mask -> {' or '.join(OUTPUTS)}"
        raise AgentError("unreadable_model", message)
    return next(name for name in OUTPUTS if name in outputs)


def make_feed(names: list[str], ids, length: int, dtype: str) -> dict:
    """Arrays [1, length]: ids, a mask with ones where there are ids, and token types 0."""
    import numpy as np

    arrays = {name: np.zeros((1, length), dtype=dtype) for name in names}
    arrays["input_ids"][0, : len(ids)] = ids
    arrays["attention_mask"][0, : len(ids)] = 1
    return arrays


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


def check_golden(job: dict, model, golden) -> None:
    """Refuse a model with a golden logit that is off by more than the tolerance, or not a number."""
    import numpy as np

    texts, logits = golden
    for number, ids in enumerate(texts, start=1):
        got, expected = infer(job, model, model.feed(ids))[0], logits[number - 1]
        worst = float(np.abs(got - expected).max()) if got.shape == expected.shape else float("nan")
        if not worst <= job["tolerance"]:
            message = f"{job['model']}: golden case {number} differs by {worst:.4g}, at most {job['tolerance']:.4g} is allowed"
            raise AgentError("wrong_output", message)


# --- measuring ----------------------------------------------------------------------------------------------------


def measure_latency(job: dict, runtime, texts: list, golden) -> dict:
    """Load and first inference, then each case; all in one process on one loaded model."""
    start = time.perf_counter_ns()
    model = load(job, runtime)
    loaded = time.perf_counter_ns()
    first = model.feed(texts[0] if golden is None else golden[0][0])
    start_first = time.perf_counter_ns()
    infer(job, model, first)
    end_first = time.perf_counter_ns()
    if golden is not None:
        check_golden(job, model, golden)
    cases = [measure_case(job, model, case, texts) for case in job["cases"]]
    return {"load_ms": milliseconds(loaded - start), "first_inference_ms": milliseconds(end_first - start_first), "cases": cases}


def measure_case(job: dict, model, case: dict, texts: list) -> dict:
    """Time every inference of one case, over and over the texts until both minimums are reached."""
    import numpy as np

    if case["case"] == "length":
        texts = [np.resize(ids, case["length"]) for ids in texts[: job["warmup"]["window"]]]  # repeated or cut
    feeds = [model.feed(ids) for ids in texts]
    lengths = [len(ids) for ids in texts]
    shapes = {model.computed_length(length): feeds[index] for index, length in enumerate(lengths)}
    warmup = warm_up(job, model, list(shapes.values()), feeds)
    gc.collect()
    gc.disable()
    try:
        samples_ns = time_inferences(model, feeds, case.get("min_inferences", job["min_inferences"]), job["min_seconds"])
    finally:
        gc.enable()
    tokens_mean = float(np.resize(lengths, len(samples_ns)).mean())  # the loop went round the texts
    result = {"case": case["case"], "length": case.get("length"), "tokens_mean": round(tokens_mean, 3), "warmup": warmup}
    return {**result, **latency_summary(samples_ns), "samples_ns": samples_ns}


def warm_up(job: dict, model, shapes: list, feeds: list) -> dict:
    """Run every shape once, then one window of inferences again and again until two successive medians agree.

    The window holds the same texts each time, or their lengths would be compared. At most ``max_seconds`` go into windows.
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


def measure_memory(job: dict, runtime, texts: list, golden) -> dict:
    """Peak RSS after every text ran once, against the RSS with runtime, texts and golden cases but no model. No timing.

    Pages of a model file that the runtime maps count as soon as they are touched.
    """
    baseline = read_memory_bytes(ROOT, "VmRSS")
    model = load(job, runtime)
    if golden is not None:
        check_golden(job, model, golden)
    for ids in texts:
        infer(job, model, model.feed(ids))
    peak = read_memory_bytes(ROOT, "VmHWM")
    difference = None if baseline is None or peak is None else peak - baseline
    shared_out = read_memory_bytes(ROOT, "Pss", "proc/self/smaps_rollup")
    return {"memory": {"baseline_bytes": baseline, "peak_bytes": peak, "model_bytes": difference, "pss_bytes": shared_out}}


def write_outputs(job: dict, runtime, texts: list, golden) -> dict:
    """The logits of every text, for a proof elsewhere that this machine computes what others do."""
    import numpy as np

    model = load(job, runtime)
    if golden is not None:
        check_golden(job, model, golden)
    logits = np.concatenate([infer(job, model, model.feed(ids)) for ids in texts])
    logits.astype("<f4").tofile(job["output"])
    return {"shape": list(logits.shape)}


def mark_inferences(job: dict, runtime, texts: list, golden) -> dict:
    """Each text once to warm up and once between two marks."""
    import ctypes

    mark = ctypes.CDLL(None).getpriority
    model = load(job, runtime)
    if golden is not None:
        check_golden(job, model, golden)
    for number, ids in enumerate(texts):
        feed = model.feed(ids)
        infer(job, model, feed)
        mark(MARK, 2 * number)
        model.run(feed)
        mark(MARK, 2 * number + 1)
    return {"marked": len(texts)}


def measure_sustained(job: dict, runtime, texts: list, golden) -> dict:
    """Latency over a long time: one window after the other, with clocks and temperatures, to show what heat does."""
    import numpy as np

    model = load(job, runtime)
    if golden is not None:
        check_golden(job, model, golden)
    feeds = [model.feed(ids) for ids in texts]
    warm_up(job, model, feeds, feeds)
    windows, start = [], time.monotonic()
    position = 0
    while time.monotonic() - start < job["min_seconds"]:
        # From where the last window stopped, so that every window sees a fair mix of the texts.
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
