"""Run one model file: ONNX through onnxruntime, TFLite through LiteRT or tflite-runtime.

All share one verb, ``logits(ids) -> float32 [C]`` for one text. Which inputs a file has is read from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from runtimes.errors import BadInput, IntegrityError

SIGNATURE_PREFIX = "serving_"


class Model(Protocol):
    """A loaded model file."""

    runtime: str

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits float32 [C] of one text given as token ids."""

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs as a manifest lists them."""


def load_model(path: Path, threads: int = 1) -> Model:
    """Load ``path`` with the runtime for its suffix.

    Raises:
        BadInput: the runtime is not installed, or there is none for this suffix.
        IntegrityError: the runtime cannot read the file.
    """
    if path.suffix == ".onnx":
        return OnnxModel(path, threads)
    if path.suffix == ".tflite":
        return TfliteModel(path, threads)
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

    def __init__(self, path: Path, threads: int = 1) -> None:
        ort, self.runtime = _onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a family of its own that is not public
            raise IntegrityError(f"{path}: onnxruntime cannot read it: {error}") from error
        self._inputs = [item.name for item in self._session.get_inputs()]

    def logits(self, ids: list[int]) -> np.ndarray:
        row = np.asarray([ids], dtype=np.int64)
        feeds = {name: _feed(name, row, np.ones_like(row)) for name in self._inputs}
        return self._session.run(["logits"], feeds)[0][0]

    def batch_logits(self, id_lists: Sequence[Sequence[int]], pad_id: int = 0) -> np.ndarray:
        """Logits [b, C] of texts padded to the longest and run together."""
        width = max(map(len, id_lists))
        ids = np.full((len(id_lists), width), pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(id_lists):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        return self._session.run(["logits"], {name: _feed(name, ids, mask) for name in self._inputs})[0]

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs as a manifest lists them: name, dtype, shape."""
        return tuple(
            [{"name": t.name, "dtype": t.type.removeprefix("tensor(").removesuffix(")"), "shape": list(t.shape)} for t in items]
            for items in (self._session.get_inputs(), self._session.get_outputs())
        )


class TfliteModel:
    """A TFLite file with one signature per length bucket; a text runs in the smallest bucket that holds it."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        interpreter_class, self.runtime = _interpreter_class()
        try:
            self._interpreter = interpreter_class(model_path=str(path), num_threads=threads)
            names = self._interpreter.get_signature_list()
        except (ValueError, RuntimeError) as error:
            raise IntegrityError(f"{path}: {self.runtime} cannot read it: {error}") from error
        lengths = sorted(int(n.removeprefix(SIGNATURE_PREFIX)) for n in names if n.startswith(SIGNATURE_PREFIX))
        if not lengths:
            raise IntegrityError(f"{path}: no signature {SIGNATURE_PREFIX}N; the file has {sorted(names)}")
        self.buckets = lengths
        self._runners = {n: self._interpreter.get_signature_runner(f"{SIGNATURE_PREFIX}{n}") for n in lengths}
        self._inputs = {n: list(runner.get_input_details()) for n, runner in self._runners.items()}

    def logits(self, ids: list[int]) -> np.ndarray:
        bucket = next((n for n in self.buckets if n >= len(ids)), None)
        if bucket is None:
            raise BadInput(f"{len(ids)} tokens do not fit the largest bucket of {self.buckets[-1]}")
        row = np.zeros((1, bucket), dtype=np.int32)
        mask = np.zeros((1, bucket), dtype=np.int32)
        row[0, : len(ids)] = ids
        mask[0, : len(ids)] = 1
        feeds = {name: _feed(name, row, mask) for name in self._inputs[bucket]}
        return self._runners[bucket](**feeds)["logits"][0]

    def tensors(self) -> tuple[list[dict], list[dict]]:
        """Inputs and outputs of the largest bucket as a manifest lists them; N stands for the bucket's length."""
        runner = self._runners[self.buckets[-1]]
        return tuple(
            [
                {"name": n, "dtype": np.dtype(d["dtype"]).name, "shape": ["N" if size == self.buckets[-1] else int(size) for size in d["shape"]]}
                for n, d in details.items()
            ]
            for details in (runner.get_input_details(), runner.get_output_details())
        )


def _feed(name: str, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if name == "input_ids":
        return ids
    return mask if name == "attention_mask" else np.zeros_like(ids)


def _onnxruntime():
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
