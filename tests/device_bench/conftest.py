"""Real tiny models in both formats: mean of token embeddings [12, 4] under the mask, times a matrix [4, 3]."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from device_bench.measurement import Candidate
from device_bench.targets import AGENT
from device_bench.texts import write_texts

VOCABULARY, HIDDEN, CLASSES = 12, 4, 3
TEXTS = [[1, 5, 2], [1, 3, 4, 2], [1, 6, 7, 8, 9, 2], [1, 10, 2], [1, 3, 5, 7, 9, 11, 4, 6, 8, 2]]


def weights() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    return (
        generator.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32),
        generator.normal(size=(HIDDEN, CLASSES)).astype(np.float32),
    )


def reference_logits(texts: list[list[int]]) -> np.ndarray:
    embeddings, head = weights()
    return np.stack([embeddings[ids].mean(axis=0) @ head for ids in texts])


def write_onnx(path: Path, embeddings: np.ndarray, head: np.ndarray) -> Path:
    from onnx import TensorProto, checker, helper, numpy_helper, save

    nodes = [
        helper.make_node("Gather", ["embeddings", "input_ids"], ["hidden"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
        helper.make_node("Mul", ["hidden", "mask3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "middle"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("MatMul", ["mean", "head"], ["logits"]),
    ]
    constants = {"embeddings": embeddings, "head": head, "last": np.array([-1]), "middle": np.array([1])}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "n"]) for name in ("input_ids", "attention_mask")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, CLASSES])]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    save(model, path)
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
                self.embeddings = torch.nn.Parameter(torch.from_numpy(embeddings))
                self.head = torch.nn.Parameter(torch.from_numpy(head))

            def forward(self, input_ids, attention_mask):
                mask = attention_mask.to(torch.float32).unsqueeze(-1)
                hidden = torch.nn.functional.embedding(input_ids, self.embeddings) * mask
                return {"logits": hidden.sum(dim=1) / mask.sum(dim=1) @ self.head}

        converter, model = litert_torch, Tiny().eval()
        for length in lengths:
            row = torch.ones(1, length, dtype=torch.int32)
            sample = {"input_ids": row, "attention_mask": row.clone()}
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
    return Candidate("tiny onnx", onnx_file, "onnx", "onnx/tiny.onnx", TEXTS, reference_logits(TEXTS[:3]), 1e-4, baseline=True)


@pytest.fixture
def tflite_candidate(tflite_file) -> Candidate:
    return Candidate("tiny tflite", tflite_file, "tflite", "tflite/tiny.tflite", TEXTS, reference_logits(TEXTS[:3]), 1e-4)


@pytest.fixture
def make_job(tmp_path):
    """A short latency job for a model file; keywords replace its keys."""

    def make(model: Path, /, **changes) -> dict:
        write_texts(tmp_path / "inputs.texts", TEXTS)
        write_texts(tmp_path / "golden.texts", TEXTS, reference_logits(TEXTS))
        job = {
            "model": str(model), "format": model.suffix[1:], "threads": 1, "cores": None, "mode": "latency",
            "inputs": str(tmp_path / "inputs.texts"), "golden": str(tmp_path / "golden.texts"), "tolerance": 1e-4,
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
