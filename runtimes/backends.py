"""Run one model file: ONNX through onnxruntime, TFLite through LiteRT or tflite-runtime.

All share one verb, ``logits(ids) -> float32 [C]`` for one text. Which inputs a file has is read from the file.
A loaded model serves one thread at a time.

TFLite goes through LiteRT's CompiledModel where the installed version can share packed weights between signatures: the
interpreter packs a copy for each, which costs memory, and time as soon as the copies push each other out of the cache.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtimes.errors import BadInput, IntegrityError
from runtimes.session import SessionOptions

SIGNATURE_PREFIX = "serving_"
OUTPUTS = ("logits", "probabilities")
"""What a file's result may be called; the bundle's manifest says how to decode it."""


class Model(Protocol):
    """A loaded model file."""

    runtime: str

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits float32 [C] of one text given as token ids; probabilities where that is what the file gives."""

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs as a manifest lists them."""


def load_model(path: Path, threads: int | None = None, session: SessionOptions | None = None) -> Model:
    """Load ``path`` with the runtime for its suffix.

    Args:
        threads: instead of those in ``session``.
        session: how to run it; the defaults if None.

    Raises:
        BadInput: the runtime is not installed, or there is none for this suffix.
        IntegrityError: the runtime cannot read the file.
    """
    session = session or SessionOptions()
    if threads is not None:
        session = replace(session, threads=threads)
    if path.suffix == ".onnx":
        return OnnxModel(path, session)
    if path.suffix == ".tflite":
        return TfliteModel(path, session)
    raise BadInput(f"{path}: no runtime for {path.suffix!r}; .onnx and .tflite files can be run")


def installed_formats() -> dict[str, str]:
    """Formats that can be run here -> name of the runtime."""
    found = {}
    for file_format, load in (("onnx", _onnxruntime), ("tflite", _interpreter_class)):
        try:
            found[file_format] = load()[1]
        except BadInput:
            continue
    return found


class OnnxModel:
    """An ONNX file; texts run at their own length."""

    def __init__(self, path: Path, session: SessionOptions | None = None) -> None:
        ort, self.runtime = _onnxruntime()
        session = session or SessionOptions()
        levels = ort.GraphOptimizationLevel
        options = ort.SessionOptions()
        options.intra_op_num_threads = session.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.graph_optimization_level = {
            "disabled": levels.ORT_DISABLE_ALL, "basic": levels.ORT_ENABLE_BASIC, "extended": levels.ORT_ENABLE_EXTENDED,
            "all": levels.ORT_ENABLE_ALL,
        }[session.graph_optimization_level]  # fmt: skip
        options.enable_mem_pattern = session.memory_pattern
        options.enable_cpu_mem_arena = session.memory_arena
        for key, value in session.config.items():
            options.add_session_config_entry(key, value)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a family of its own that is not public
            raise IntegrityError(f"{path}: onnxruntime cannot read it: {error}") from error
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._output = [_result_name(path, [item.name for item in self._session.get_outputs()])]

    def logits(self, ids: list[int]) -> np.ndarray:
        row = np.asarray([ids], dtype=np.int64)
        feeds = {name: _feed(name, row, np.ones_like(row)) for name in self._inputs}
        return self._session.run(self._output, feeds)[0][0]

    def batch_logits(self, id_lists: Sequence[Sequence[int]], pad_id: int = 0) -> np.ndarray:
        """Logits [b, C] of texts padded to the longest and run together."""
        width = max(map(len, id_lists))
        ids = np.full((len(id_lists), width), pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(id_lists):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        return self._session.run(self._output, {name: _feed(name, ids, mask) for name in self._inputs})[0]

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs as a manifest lists them: name, dtype, shape."""
        return tuple(
            [{"name": t.name, "dtype": t.type.removeprefix("tensor(").removesuffix(")"), "shape": list(t.shape)} for t in items]
            for items in (self._session.get_inputs(), self._session.get_outputs())
        )


class TfliteModel:
    """A TFLite file with one signature per length bucket; a text runs in the smallest bucket that holds it."""

    def __init__(self, path: Path, session: SessionOptions | None = None) -> None:
        session = session or SessionOptions()
        interpreter_class, self.runtime = _interpreter_class()
        compiled = session.weight_cache == "memory" and _can_share_packed_weights()
        try:
            with _native_stderr_silenced():
                self._model = _compile(path, session.threads) if compiled else _interpret(interpreter_class, path, session.threads)
                names = self._model.get_signature_list()
                lengths = sorted(int(n.removeprefix(SIGNATURE_PREFIX)) for n in names if n.startswith(SIGNATURE_PREFIX))
                signature = _CompiledSignature if compiled else _InterpretedSignature
                self._signatures = {n: signature(path, self._model, f"{SIGNATURE_PREFIX}{n}", n) for n in lengths}
        except (ValueError, RuntimeError) as error:
            raise IntegrityError(f"{path}: {self.runtime} cannot read it: {error}") from error
        if not lengths:
            raise IntegrityError(f"{path}: no signature {SIGNATURE_PREFIX}N; the file has {sorted(names)}")
        self.buckets = lengths

    def logits(self, ids: list[int]) -> np.ndarray:
        bucket = next((n for n in self.buckets if n >= len(ids)), None)
        if bucket is None:
            raise BadInput(f"{len(ids)} tokens do not fit the largest bucket of {self.buckets[-1]}")
        return self._signatures[bucket].logits(ids)

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs of the largest bucket as a manifest lists them; N stands for the bucket's length."""
        signature = self._signatures[self.buckets[-1]]
        return tuple(
            [
                {"name": n, "dtype": np.dtype(d["dtype"]).name, "shape": ["N" if size == self.buckets[-1] else int(size) for size in d["shape"]]}
                for n, d in sorted(details.items())  # runtimes list them in orders of their own
            ]
            for details in (signature.inputs, signature.outputs)
        )


class _InterpretedSignature:
    """One signature run by the interpreter of LiteRT or tflite-runtime."""

    def __init__(self, path: Path, interpreter: Any, name: str, bucket: int) -> None:
        self._runner = interpreter.get_signature_runner(name)
        self.inputs, self.outputs = self._runner.get_input_details(), self._runner.get_output_details()
        self._names, self._bucket, self._output = list(self.inputs), bucket, _result_name(path, list(self.outputs))

    def logits(self, ids: list[int]) -> np.ndarray:
        row = np.zeros((1, self._bucket), dtype=np.int32)
        mask = np.zeros((1, self._bucket), dtype=np.int32)
        row[0, : len(ids)] = ids
        mask[0, : len(ids)] = 1
        return self._runner(**{name: _feed(name, row, mask) for name in self._names})[self._output][0]


class _CompiledSignature:
    """One signature run by LiteRT's CompiledModel, on arrays and buffers that are made once."""

    def __init__(self, path: Path, model: Any, name: str, bucket: int) -> None:
        self.inputs, self.outputs = model.get_input_tensor_details(name), model.get_output_tensor_details(name)
        self._run, self._index = model.run_by_index, model.get_signature_index(name)
        self._row, self._mask = np.zeros((1, bucket), dtype=np.int32), np.zeros((1, bucket), dtype=np.int32)
        in_order = model.get_signature_list()[name]
        buffers = {key: model.create_input_buffer_by_name(name, key) for key in in_order["inputs"]}
        for buffer in buffers.values():
            buffer.write(self._row)  # what is never written again, token types, stays 0
        arrays = {"input_ids": self._row, "attention_mask": self._mask}
        self._written = [(buffer, arrays[key]) for key, buffer in buffers.items() if key in arrays]
        self._buffers = list(buffers.values())
        self._results = [model.create_output_buffer_by_name(name, key) for key in in_order["outputs"]]
        result = _result_name(path, in_order["outputs"])
        self._logits = self._results[in_order["outputs"].index(result)]
        self._classes = int(np.prod(self.outputs[result]["shape"]))

    def logits(self, ids: list[int]) -> np.ndarray:
        tokens = len(ids)
        self._row[0, :tokens], self._row[0, tokens:] = ids, 0
        self._mask[0, :tokens], self._mask[0, tokens:] = 1, 0
        for buffer, array in self._written:
            buffer.write(array)
        self._run(self._index, self._buffers, self._results)
        return self._logits.read(self._classes, np.float32)


def _result_name(path: Path, outputs: Sequence[str]) -> str:
    found = next((name for name in OUTPUTS if name in outputs), None)
    if found is None:
        raise IntegrityError(f"{path}: no output {' or '.join(OUTPUTS)}; the file has {', '.join(sorted(outputs))}")
    return found


def _feed(name: str, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if name == "input_ids":
        return ids
    return mask if name == "attention_mask" else np.zeros_like(ids)


def _onnxruntime():
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import, before anything could be sent
    try:
        import onnxruntime
    except ImportError as error:
        raise BadInput("onnxruntime is not installed; pip install 'pocketbert[onnx]'") from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime, f"onnxruntime {onnxruntime.__version__}"


def _interpreter_class():
    try:
        import ai_edge_litert
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, f"ai-edge-litert {getattr(ai_edge_litert, '__version__', 'unknown')}"
    except ImportError:
        try:
            import tflite_runtime
            from tflite_runtime.interpreter import Interpreter
        except ImportError as error:
            raise BadInput("no TFLite runtime is installed; pip install 'pocketbert[tflite]'") from error
        return Interpreter, f"tflite-runtime {tflite_runtime.__version__}"


def _interpret(interpreter_class: Any, path: Path, threads: int) -> Any:
    interpreter = interpreter_class(model_path=str(path), num_threads=threads)
    # Before any signature is asked for, or tflite-runtime 2.14 leaves XNNPACK out and takes four times as long.
    interpreter.allocate_tensors()
    return interpreter


def _can_share_packed_weights() -> bool:
    """Whether LiteRT is there in a version whose CompiledModel takes options; 2.1 does not, 2.3 does."""
    try:
        import ai_edge_litert.options  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def _compile(path: Path, threads: int) -> Any:
    """A LiteRT CompiledModel whose signatures share one copy of the packed weights, held in memory."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator
    from ai_edge_litert.options import CpuOptions, Options

    cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=":memory")  # a name that XNNPACK keeps for "no file"
    options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
    return CompiledModel.from_file(str(path), options=options, environment=_litert_environment())


@lru_cache(maxsize=1)
def _litert_environment() -> Any:
    """LiteRT's environment, one for all models of this process."""
    from ai_edge_litert.environment import Environment

    # LiteRT tells of its accelerators once more when the process ends, after Python is gone. Nothing of ours speaks that late.
    atexit.register(_silence_native_stderr)
    return Environment.create()


@contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    """Keep native libraries from printing: LiteRT logs every accelerator that it tries, and has no switch for it (2.3).

    File descriptor 2 belongs to the whole process, so other threads are silenced too. What goes wrong is raised, not printed.
    """
    try:
        saved = os.dup(2)
    except OSError:  # no standard error, nothing to silence
        yield
        return
    try:
        _silence_native_stderr()
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _silence_native_stderr() -> None:
    if sys.stderr is not None and not sys.stderr.closed:
        sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
