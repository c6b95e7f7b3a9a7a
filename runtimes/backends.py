"""Run one model file: ONNX through onnxruntime, TFLite through LiteRT or tflite-runtime.

All share one verb, ``run(ids, types) -> outputs by name`` for one input. Which inputs and outputs a file has is read from the file:

- inputs: ``input_ids``, ``attention_mask`` and ``token_type_ids`` [1, n]; the last two only where the file takes them;
- outputs: float32, per input [1, ...] or per token [1, n, ...] (:func:`per_token`).

A loaded model serves one thread at a time.

TFLite goes through LiteRT's CompiledModel where the installed version can share packed weights between signatures: the
interpreter packs a copy for each, which costs memory, and time as soon as the copies push each other out of the cache.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtimes.errors import BadInput, IntegrityError
from runtimes.onnx_structure import check_onnx
from runtimes.session import MOST_THREADS, SessionOptions
from runtimes.tflite_structure import check_tflite

if TYPE_CHECKING:
    from runtimes.text import Encoding

SIGNATURE_PREFIX = "serving_"
INPUTS = ("attention_mask", "input_ids", "token_type_ids")
TOKEN_SCORES = ("start_logits", "end_logits")
"""Outputs with one number for each token."""


class Model(Protocol):
    """A loaded model file."""

    runtime: str

    def run(self, ids: Sequence[int], types: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Run one input.

        Args:
            ids: its n tokens.
            types: the token type of each, all 0 if None; ignored by a file that takes none.

        Returns:
            Every output of the file by name, float32: per input [...], per token [n, ...].

        Raises:
            BadInput: more tokens than the file takes.
        """

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs as a manifest lists them."""


def load_model(path: Path, threads: int | None = None, session: SessionOptions | None = None) -> Model:
    """Load ``path`` with the runtime for its suffix.

    Args:
        threads: instead of those in ``session``.
        session: how to run it; the defaults if None.

    Raises:
        BadInput: the runtime is not installed, there is none for this suffix, or a number of threads that none takes.
        IntegrityError: the file is damaged, or the runtime cannot read it.
    """
    session = session or SessionOptions()
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise BadInput(f"{threads} threads: 1 to {MOST_THREADS} can be asked for")
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
        self._path = path
        check_onnx(path)
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
        self._inputs = {item.name: np.int32 if item.type == "tensor(int32)" else np.int64 for item in self._session.get_inputs()}
        _check_inputs(path, self._inputs)
        self._outputs = [item.name for item in self._session.get_outputs()]

    def run(self, ids: Sequence[int], types: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        row = np.array([ids], np.int64)
        given = {"input_ids": row, "attention_mask": np.ones_like(row)}
        if "token_type_ids" in self._inputs:
            given["token_type_ids"] = np.zeros_like(row) if types is None else np.array([types], np.int64)
        return {name: value[0] for name, value in self._results(given).items()}  # nothing is padded, so nothing is cut

    def run_batch(self, encodings: Sequence[Encoding], pad_id: int = 0) -> list[dict[str, np.ndarray]]:
        """What :meth:`run` gives for each input, from one run of all, padded to the longest."""
        ids = np.full((len(encodings), max(len(one.ids) for one in encodings)), pad_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, one in enumerate(encodings):
            tokens = len(one.ids)
            ids[row, :tokens], mask[row, :tokens], types[row, :tokens] = one.ids, 1, one.types
        results = self._results({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
        return [
            {name: value[row, : len(one.ids)] if per_token(name, value.ndim) else value[row] for name, value in results.items()}
            for row, one in enumerate(encodings)
        ]

    def _results(self, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feeds = {name: given[name].astype(dtype, copy=False) for name, dtype in self._inputs.items()}
        try:
            results = self._session.run(self._outputs, feeds)
        except Exception as error:  # onnxruntime raises a family of its own that is not public
            raise IntegrityError(f"{self._path}: {self.runtime} cannot run {list(given['input_ids'].shape)} tokens: {error}") from error
        return {name: value.astype(np.float32, copy=False) for name, value in zip(self._outputs, results, strict=True)}

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs as a manifest lists them: name, dtype, shape."""
        return tuple(
            [{"name": t.name, "dtype": t.type.removeprefix("tensor(").removesuffix(")"), "shape": list(t.shape)} for t in items]
            for items in (self._session.get_inputs(), self._session.get_outputs())
        )


class TfliteModel:
    """A TFLite file with one signature per length bucket; an input runs in the smallest bucket that holds it."""

    def __init__(self, path: Path, session: SessionOptions | None = None) -> None:
        session = session or SessionOptions()
        interpreter_class, self.runtime = _interpreter_class()
        self._path = path
        check_tflite(path)
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

    def run(self, ids: Sequence[int], types: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        bucket = next((n for n in self.buckets if n >= len(ids)), None)
        if bucket is None:
            raise BadInput(f"{len(ids)} tokens do not fit the largest bucket of {self.buckets[-1]}")
        try:
            return self._signatures[bucket].run(ids, types)
        except (RuntimeError, ValueError, OverflowError) as error:  # OverflowError: an id that int32 does not hold
            raise IntegrityError(f"{self._path}: {self.runtime} cannot run {len(ids)} tokens: {error}") from error

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs of the largest bucket as a manifest lists them; N stands for the bucket's length."""
        signature = self._signatures[self.buckets[-1]]
        return tuple(
            [
                {"name": name, "dtype": np.dtype(details[name]["dtype"]).name, "shape": _shape(name, details[name]["shape"], is_input)}
                for name in sorted(details)  # the order of the file, which not every runtime keeps
            ]
            for details, is_input in ((signature.inputs, True), (signature.outputs, False))
        )


class _InterpretedSignature:
    """One signature run by the interpreter of LiteRT or tflite-runtime."""

    def __init__(self, path: Path, interpreter: Any, name: str, bucket: int) -> None:
        self._runner = interpreter.get_signature_runner(name)
        self.inputs, self.outputs = self._runner.get_input_details(), self._runner.get_output_details()
        _check_signature(path, name, bucket, self.inputs, self.outputs)
        self._feeds = {key: np.zeros((1, bucket), np.int32) for key in self.inputs}
        self._per_token = {key: per_token(key, len(details["shape"])) for key, details in self.outputs.items()}

    def run(self, ids: Sequence[int], types: Sequence[int] | None) -> dict[str, np.ndarray]:
        tokens = len(ids)
        _fill(self._feeds, ids, types)
        return {name: value[0, :tokens] if self._per_token[name] else value[0] for name, value in self._runner(**self._feeds).items()}


class _CompiledSignature:
    """One signature run by LiteRT's CompiledModel, on arrays and buffers that are made once."""

    def __init__(self, path: Path, model: Any, name: str, bucket: int) -> None:
        self.inputs, self.outputs = model.get_input_tensor_details(name), model.get_output_tensor_details(name)
        _check_signature(path, name, bucket, self.inputs, self.outputs)
        self._run, self._index = model.run_by_index, model.get_signature_index(name)
        in_order = model.get_signature_list()[name]
        self._feeds = {key: np.zeros((1, bucket), np.int32) for key in in_order["inputs"]}
        self._buffers = [model.create_input_buffer_by_name(name, key) for key in in_order["inputs"]]
        self._writes = list(zip(self._buffers, self._feeds.values(), strict=True))
        for buffer, array in self._writes:
            buffer.write(array)  # the first write of all makes LiteRT print, and here that is silenced
        self._results = [model.create_output_buffer_by_name(name, key) for key in in_order["outputs"]]
        shapes = {key: tuple(int(size) for size in self.outputs[key]["shape"]) for key in in_order["outputs"]}
        self._reads = [
            (key, buffer, int(np.prod(shape)), shape[1:] if len(shape) > 2 else None, per_token(key, len(shape)))
            for (key, shape), buffer in zip(shapes.items(), self._results, strict=True)
        ]

    def run(self, ids: Sequence[int], types: Sequence[int] | None) -> dict[str, np.ndarray]:
        _fill(self._feeds, ids, types)
        for buffer, array in self._writes:
            buffer.write(array)
        self._run(self._index, self._buffers, self._results)
        outputs = {}
        for name, buffer, size, shape, of_tokens in self._reads:
            value = buffer.read(size, np.float32)  # flat, and fresh memory each time
            if shape is not None:
                value = value.reshape(shape)
            outputs[name] = value[: len(ids)] if of_tokens else value
        return outputs


def per_token(name: str, rank: int) -> bool:
    """Whether the output ``name`` has a row for each token, rather than one for the whole input; ``rank`` counts the batch axis."""
    return rank == 3 or name in TOKEN_SCORES


def _fill(feeds: dict[str, np.ndarray], ids: Sequence[int], types: Sequence[int] | None) -> None:
    """Write one input into the arrays [1, N] of a signature; nothing of the input before may be left."""
    tokens = len(ids)
    values = {"input_ids": ids, "attention_mask": 1, "token_type_ids": 0 if types is None else types}
    for name, array in feeds.items():
        array[0, :tokens] = values[name]
        array[0, tokens:] = 0


def _shape(name: str, sizes: Sequence[int], is_input: bool) -> list[int | str]:
    """A shape for a manifest, N where it is the bucket's length."""
    shape: list[int | str] = [int(size) for size in sizes]
    if is_input or per_token(name, len(shape)):
        shape[1] = "N"
    return shape


def _check_inputs(path: Path, names: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(INPUTS))
    if unknown or "input_ids" not in names:
        what = f"takes {unknown[0]!r}" if unknown else "takes no input_ids"
        raise IntegrityError(f"{path}: {what}; inputs that can be fed are {', '.join(INPUTS)}, and input_ids is needed")


def _check_signature(path: Path, name: str, bucket: int, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
    """Refuse what would be fed or read wrongly."""
    _check_inputs(path, inputs)
    for key, details in inputs.items():
        if tuple(details["shape"]) != (1, bucket) or np.dtype(details["dtype"]) != np.int32:
            raise IntegrityError(f"{path}: {name}: {key} is {_described(details)}; expected int32 [1, {bucket}]")
    for key, details in outputs.items():
        of_tokens = per_token(key, len(details["shape"]))
        if np.dtype(details["dtype"]) != np.float32 or details["shape"][0] != 1 or (of_tokens and details["shape"][1] != bucket):
            raise IntegrityError(f"{path}: {name}: {key} is {_described(details)}; expected float32 [1, {f'{bucket}, ' if of_tokens else ''}...]")


def _described(details: dict[str, Any]) -> str:
    return f"{np.dtype(details['dtype']).name} {[int(size) for size in details['shape']]}"


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
