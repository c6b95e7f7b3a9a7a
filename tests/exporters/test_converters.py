"""The ecosystem's converters, with which the baseline is written: their files compute the model, too."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporters.converters import OPSET, convert_onnx, convert_tflite, quantize_onnx, quantize_tflite
from exporters.parity import check_parity, torch_results
from pipeline.models.encoder import Encoder
from runtimes.backends import load_model
from runtimes.text import Encoding
from tests.exporters.encoders import HEADS, encoder
from tests.exporters.encoders import texts as random_texts
from tests.exporters.results import file_results, inputs, joined

BUCKETS = {"bert": [16], "unequal student": [6, 16]}
"""By kind; the converter takes seconds for each."""


def texts() -> list[Encoding]:
    generator = np.random.default_rng(0)
    lengths = [1, 2, 5, 6, 7, 15, 16, *generator.integers(1, 17, 93)]
    return inputs([[2, *generator.integers(5, 80, max(0, n - 1)).tolist()] for n in lengths])


@pytest.fixture(scope="module", params=BUCKETS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind) -> Encoder:
    return encoder(kind)


@pytest.fixture(scope="module")
def files(kind, model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_onnx(model, folder / "new" / "m.onnx")
    convert_tflite(model, folder / "new" / "m.tflite", BUCKETS[kind])
    quantize_onnx(folder / "new" / "m.onnx", folder / "int8" / "m.onnx")
    quantize_tflite(folder / "new" / "m.tflite", folder / "int8" / "m.tflite")
    return folder


def test_both_files_compute_the_model(model, files):
    expected = torch_results(model, texts())
    assert joined(expected, "logits").std(axis=0).min() > 0.01
    for name in ("m.onnx", "m.tflite"):
        assert check_parity(expected, files / "new" / name, texts()).worst < 1e-4


def test_their_int8_files_stay_near_the_model(model, files):
    expected = joined(torch_results(model, texts()), "logits")
    for name in ("m.onnx", "m.tflite"):
        got = joined(file_results(files / "int8" / name, texts()), "logits")
        assert np.corrcoef((got - got.mean(axis=0)).ravel(), (expected - expected.mean(axis=0)).ravel())[0, 1] > 0.98, name
        assert np.abs(got - expected).max() > 1e-5, "nothing was quantized"


def test_files_are_what_their_readers_expect(kind, files):
    proto = onnx.load(files / "new" / "m.onnx")
    assert proto.opset_import[0].version == OPSET
    names = ["input_ids", "attention_mask"]
    assert [item.name for item in proto.graph.input] == names
    assert [item.name for item in proto.graph.output] == ["logits"]
    quantized = onnx.load(files / "int8" / "m.onnx").graph
    held = {item.name: item.data_type for item in quantized.initializer}
    assert onnx.TensorProto.INT8 in held.values()
    assert load_model(files / "new" / "m.tflite").buckets == load_model(files / "int8" / "m.tflite").buckets == BUCKETS[kind]
    tensors, _ = load_model(files / "new" / "m.tflite").tensors()
    assert {item["name"]: item["dtype"] for item in tensors} == dict.fromkeys(names, "int32")
    assert not stat.S_IMODE((files / "int8" / "m.tflite").stat().st_mode) & 0o111, "a model file is no program"


def test_the_torch_module_is_left_in_its_own_state(model, files):
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("shape", "heads"), [*(("bert", heads) for heads in HEADS), ("roberta", "span"), ("distilbert", "mean")])
def test_the_baseline_of_every_task_computes_the_model(shape, heads, tmp_path):
    """Pairs have token types where the model has two of them; the file takes them then, and else does not."""
    model = encoder(shape, heads=HEADS[heads])
    pairs = inputs(random_texts(24), segments=2)
    convert_onnx(model, tmp_path / "m.onnx", segments=2)
    check_parity(torch_results(model, pairs), tmp_path / "m.onnx", pairs)
    graph = onnx.load(tmp_path / "m.onnx").graph
    typed = ["token_type_ids"] if shape == "bert" else []
    assert [item.name for item in graph.input] == ["input_ids", "attention_mask", *typed]
    axes = {item.name: [dim.dim_param for dim in item.type.tensor_type.shape.dim][:2] for item in graph.output}
    per_token = model.config.per_token_outputs
    assert list(axes) == [name for head in HEADS[heads] for name in head["outputs"]]
    for name, (first, *second) in axes.items():
        assert first == "batch_size" and ("sequence_length" in second) == (name in per_token), name


def test_a_converted_tflite_file_of_pairs(tmp_path):
    model = encoder("bert", heads=HEADS["intent and slots"])
    pairs = inputs(random_texts(12), segments=2)
    convert_tflite(model, tmp_path / "m.tflite", [20], segments=2)
    check_parity(torch_results(model, pairs), tmp_path / "m.tflite", pairs)
