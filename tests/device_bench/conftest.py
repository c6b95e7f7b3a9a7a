"""Real tiny models in both formats, with token types and an output of each kind.

A token's vector is its embedding [12, 4] plus that of its type [2, 4]. ``logits`` [3] are the mean of the vectors under the mask,
times a matrix; ``slot_logits`` [n, 2], ``start_logits`` [n] and ``end_logits`` [n] are each vector times another.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from device_bench.agent.agent import write_inputs
from device_bench.measurement import Candidate
from device_bench.targets import AGENT
from runtimes.text import Encoding

VOCABULARY, HIDDEN, CLASSES, TAGS = 12, 4, 3, 2
TEXTS = [[1, 5, 2], [1, 3, 4, 2], [1, 6, 7, 8, 9, 2], [1, 10, 2], [1, 3, 5, 7, 9, 11, 4, 6, 8, 2]]
INPUTS = [Encoding(ids, [int(place > 2) for place in range(len(ids))]) for ids in TEXTS]
OUTPUTS = ["end_logits", "logits", "slot_logits", "start_logits"]


def weights() -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and the matrix of the logits."""
    generator = np.random.default_rng(7)
    return (
        generator.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32),
        generator.normal(size=(HIDDEN, CLASSES)).astype(np.float32),
    )


def other_weights(hidden: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(8)
    shapes = {"types": (2, hidden), "tags": (hidden, TAGS), "starts": (hidden,), "ends": (hidden,)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def reference_outputs(inputs: Sequence[Encoding] = INPUTS, change: float = 0.0) -> list[dict[str, np.ndarray]]:
    """What the models give for each input; ``change`` is added to every logit."""
    (embeddings, head), others = weights(), other_weights(HIDDEN)
    found = []
    for one in inputs:
        vectors = embeddings[one.ids] + others["types"][one.types]
        logits = vectors.mean(axis=0) @ head + np.float32(change)
        per_token = {"slot_logits": vectors @ others["tags"], "start_logits": vectors @ others["starts"]}
        found.append({"end_logits": vectors @ others["ends"], "logits": logits, **per_token})
    return found


def pairs(inputs: Sequence[Encoding]) -> list[tuple[list[int], list[int]]]:
    return [(one.ids, one.types) for one in inputs]


def assert_outputs(got: Sequence[dict], expected: Sequence[dict], atol: float = 1e-5) -> None:
    for one, other in zip(got, expected, strict=True):
        assert list(one) == list(other)
        for name, values in other.items():
            assert one[name].shape == values.shape
            np.testing.assert_allclose(one[name], values, rtol=0, atol=atol)


def write_onnx(path: Path, embeddings: np.ndarray, head: np.ndarray) -> Path:
    from onnx import TensorProto, checker, helper, numpy_helper, save

    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["words"]),
        helper.make_node("Gather", ["types", "token_type_ids"], ["kinds"]),
        helper.make_node("Add", ["words", "kinds"], ["hidden"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["hidden", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
        helper.make_node("MatMul", ["hidden", "tags"], ["slot_logits"]),
        helper.make_node("MatMul", ["hidden", "starts"], ["start_logits"]),
        helper.make_node("MatMul", ["hidden", "ends"], ["end_logits"]),
    ]
    constants = {"embeddings": embeddings, "head": head, "last": np.array([-1]), "middle": np.array([1]), **other_weights(embeddings.shape[1])}
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "n"]) for name in names]
    shapes = {"start_logits": [1, "n"], "logits": [1, head.shape[1]], "end_logits": [1, "n"], "slot_logits": [1, "n", TAGS]}  # in no order
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, path)
    return path


def write_identity(path: Path, *names: str) -> Path:
    """An ONNX file that gives its first input as its logits, in whole numbers."""
    from onnx import TensorProto, helper, save

    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "n"]) for name in names]
    result = [helper.make_tensor_value_info("logits", TensorProto.INT64, [1, "n"])]
    graph = helper.make_graph([helper.make_node("Identity", [names[0]], ["logits"])], "identity", inputs, result)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def make_onnx(tmp_path):
    """Writes the ONNX model with other embeddings and head."""

    def make(change) -> Path:
        return write_onnx(tmp_path / "changed.onnx", *change(*weights()))

    return make


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("onnx") / "tiny.onnx", *weights())


def write_tflite(path: Path, embeddings: np.ndarray, head: np.ndarray, lengths: tuple[int, ...]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter's own, which a test cannot mend
        import litert_torch
        import torch

        class Tiny(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, value in {"embeddings": embeddings, "head": head, **other_weights(embeddings.shape[1])}.items():
                    setattr(self, name, torch.nn.Parameter(torch.from_numpy(value)))

            def forward(self, input_ids, attention_mask, token_type_ids):
                mask = attention_mask.to(torch.float32).unsqueeze(-1)
                hidden = torch.nn.functional.embedding(input_ids, self.embeddings) + torch.nn.functional.embedding(token_type_ids, self.types)
                logits = (hidden * mask).sum(dim=1) / mask.sum(dim=1) @ self.head
                spans = {"start_logits": hidden @ self.starts, "end_logits": hidden @ self.ends}
                return {**spans, "logits": logits, "slot_logits": hidden @ self.tags}

        converter, model = litert_torch, Tiny().eval()
        for length in lengths:
            row = torch.ones(1, length, dtype=torch.int32)
            sample = {"input_ids": row, "attention_mask": row.clone(), "token_type_ids": row.clone()}
            converter = converter.signature(f"serving_{length}", model, sample_kwargs=sample)
        converter.convert().export(str(path))
    return path


@pytest.fixture(scope="session")
def tflite_file(tmp_path_factory) -> Path:
    return write_tflite(tmp_path_factory.mktemp("tflite") / "tiny.tflite", *weights(), (8, 16))


@pytest.fixture(scope="session")
def wide_tflite_file(tmp_path_factory) -> Path:
    """The same with a head of 8 MB."""
    generator = np.random.default_rng(7)
    embeddings, head = (generator.normal(size=size).astype(np.float32) for size in ((VOCABULARY, 1024), (1024, 2048)))
    return write_tflite(tmp_path_factory.mktemp("wide") / "wide.tflite", embeddings, head, (4, 8, 12, 16))


@pytest.fixture
def onnx_candidate(onnx_file) -> Candidate:
    return Candidate("tiny onnx", onnx_file, "onnx", "onnx/tiny.onnx", INPUTS, reference_outputs(INPUTS[:3]), 1e-4, baseline=True)


@pytest.fixture
def tflite_candidate(tflite_file) -> Candidate:
    return Candidate("tiny tflite", tflite_file, "tflite", "tflite/tiny.tflite", INPUTS, reference_outputs(INPUTS[:3]), 1e-4)


@pytest.fixture
def make_job(tmp_path):
    """A short latency job for a model file; keywords replace its keys."""

    def make(model: Path, /, **changes) -> dict:
        write_inputs(tmp_path / "measured.inputs", pairs(INPUTS))
        write_inputs(tmp_path / "golden.inputs", pairs(INPUTS), reference_outputs())
        job = {
            "model": str(model), "format": model.suffix[1:], "threads": 1, "cores": None, "mode": "latency",
            "inputs": str(tmp_path / "measured.inputs"), "golden": str(tmp_path / "golden.inputs"), "tolerance": 1e-4,
            "cases": [{"case": "texts"}], "warmup": {"window": 4, "tolerance": 0.5, "max_seconds": 0.05},
            "min_inferences": 12, "min_seconds": 0.0,
        }  # fmt: skip
        return {**job, **changes}

    return make


@pytest.fixture
def run_agent(tmp_path):
    """Start the agent as a user would: (exit code, the one JSON document on stdout)."""

    def run(job: object) -> tuple[int, dict]:
        path = tmp_path / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run([sys.executable, str(AGENT), str(path)], capture_output=True, text=True, timeout=120)
        assert done.stdout.count("\n") == 1, done.stdout + done.stderr
        return done.returncode, json.loads(done.stdout)

    return run
