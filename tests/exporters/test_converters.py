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
from pipeline.methods.distill.mobilebert import DistillMobilebert, make_student
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder
from runtimes.backends import load_model
from tests.exporters.encoders import randomized

SHAPE = {"layers": 2, "hidden_size": 32, "bottleneck_size": 16, "heads": 2, "ffn_size": 32, "embedding_size": 16}
BUCKETS = {"bert": [16], "mobilebert": [6, 16]}
"""By family; the converter takes seconds for each."""


def id_lists() -> list[list[int]]:
    generator = np.random.default_rng(0)
    lengths = [1, 2, 5, 6, 7, 15, 16, *generator.integers(1, 17, 93)]
    return [[2, *generator.integers(5, 80, max(0, n - 1)).tolist()] for n in lengths]


@pytest.fixture(scope="module", params=["bert", "student"])
def model(request, tiny_model) -> Encoder:
    """The tiny BERT, or a MobileBERT-style student of it; what was 1 or 0 when it was made is random."""
    teacher = Checkpoint.load(tiny_model, ["on", "off", "music"]).model
    return randomized(teacher if request.param == "bert" else make_student(DistillMobilebert(**SHAPE), teacher, 16))


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert_onnx(model, folder / "new" / "m.onnx")
    convert_tflite(model, folder / "new" / "m.tflite", BUCKETS[model.config.family])
    quantize_onnx(folder / "new" / "m.onnx", folder / "int8" / "m.onnx")
    quantize_tflite(folder / "new" / "m.tflite", folder / "int8" / "m.tflite")
    return folder


def test_both_files_compute_the_model(model, files):
    lists = id_lists()
    expected = torch_results(model, lists)
    assert expected.std(axis=0).min() > 0.01
    for name in ("m.onnx", "m.tflite"):
        assert check_parity(expected, files / "new" / name, lists).worst < 1e-4


def test_their_int8_files_stay_near_the_model(model, files):
    lists = id_lists()
    expected = torch_results(model, lists)
    for name in ("m.onnx", "m.tflite"):
        loaded = load_model(files / "int8" / name)
        got = np.stack([loaded.logits(ids) for ids in lists])
        assert np.corrcoef((got - got.mean(axis=0)).ravel(), (expected - expected.mean(axis=0)).ravel())[0, 1] > 0.98, name
        assert np.abs(got - expected).max() > 1e-5, "nothing was quantized"


def test_files_are_what_their_readers_expect(model, files):
    proto = onnx.load(files / "new" / "m.onnx")
    assert proto.opset_import[0].version == OPSET
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if model.config.type_vocab_size else [])
    assert {item.name for item in proto.graph.input} == set(names)
    assert [item.name for item in proto.graph.output] == ["logits"]
    quantized = onnx.load(files / "int8" / "m.onnx").graph
    held = {item.name: item.data_type for item in quantized.initializer}
    assert onnx.TensorProto.INT8 in held.values()
    assert load_model(files / "new" / "m.tflite").buckets == load_model(files / "int8" / "m.tflite").buckets == BUCKETS[model.config.family]
    inputs, _ = load_model(files / "new" / "m.tflite").tensors()
    assert {item["name"]: item["dtype"] for item in inputs} == dict.fromkeys(names, "int32")
    assert not stat.S_IMODE((files / "int8" / "m.tflite").stat().st_mode) & 0o111, "a model file is no program"


def test_the_torch_module_is_left_in_its_own_state(model, files):
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
