"""``pocketbert check``: files of other converters are held against their model, and a broken one is told with the place of the fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from exporters.converters import convert_onnx
from pipeline.models.checkpoint import Checkpoint
from tests.e2e.test_convert import NAMES, TEXTS, checkpoint  # noqa: F401 - a fixture
from tests.pipeline.cli.test_main import pocketbert, refused


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory) -> tuple[Path, Path]:  # noqa: F811
    """(model, folder with its float32 and int8 files as optimum and ONNX Runtime write them)."""
    model = checkpoint("BertForSequenceClassification", id2label=NAMES)
    folder = tmp_path_factory.mktemp("published") / "onnx"
    folder.mkdir()
    convert_onnx(Checkpoint.load(model).model, folder / "model.onnx", 1)
    quantize_dynamic(folder / "model.onnx", folder / "model_quantized.onnx", weight_type=QuantType.QInt8)
    (folder.parent / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return model, folder


def checked(file: Path, model: Path, folder: Path, *options: str):
    return pocketbert("check", str(file), "--against", str(model), "--texts", str(folder.parent / "texts.txt"), *options)


def test_files_of_other_converters_are_right(published):
    model, folder = published
    done = checked(folder, model, folder, "--json", "--metric-drop", "100")
    assert done.returncode == 0, done.stderr
    verdicts = {one["file"]: one for one in json.loads(done.stdout)["files"]}
    assert set(verdicts) == {"model.onnx", "model_quantized.onnx"}
    exact, rounded = verdicts["model.onnx"], verdicts["model_quantized.onnx"]
    assert exact["metrics"]["agreement"] == 100 and exact["metrics"]["divergence"] < 1e-5 and exact["worst"][1] < 1e-4
    assert rounded["metrics"]["divergence"] > exact["metrics"]["divergence"] and rounded["worst"][1] > 1e-3
    assert exact["broken"] is None and rounded["broken"] is None


def test_a_damaged_matrix_is_named(published, tmp_path):
    model, folder = published
    loaded = onnx.load(folder / "model.onnx")
    matrix = Checkpoint.load(model).model.layers[0].ffns[0].up.weight.detach().numpy().T
    damaged = 0
    for initializer in loaded.graph.initializer:
        value = numpy_helper.to_array(initializer)
        if value.shape == matrix.shape and np.array_equal(value, matrix):
            initializer.CopyFrom(numpy_helper.from_array(np.round(value / value.std()) * value.std() * np.float32(1.2), initializer.name))
            damaged += 1
    assert damaged == 1
    onnx.save(loaded, tmp_path / "model.onnx")
    done = checked(tmp_path / "model.onnx", model, folder, "--json", "--metric-drop", "100")
    worst = json.loads(done.stdout)["files"][0]["worst"]
    assert worst[0] == "layers.0.ffns.0.up" and worst[1] > 0.1


def test_a_file_that_gives_noise_is_exit_3(published, tmp_path):
    model, folder = published
    loaded = onnx.load(folder / "model.onnx")
    generator = np.random.default_rng(0)
    for initializer in loaded.graph.initializer:
        value = numpy_helper.to_array(initializer)
        if value.dtype == np.float32 and value.ndim == 2:
            initializer.CopyFrom(numpy_helper.from_array(generator.permutation(value.reshape(-1)).reshape(value.shape), initializer.name))
    onnx.save(loaded, tmp_path / "model.onnx")
    done = checked(tmp_path / "model.onnx", model, folder)
    refused_with = (done.returncode, done.stdout.split()[0])
    assert refused_with == (3, "broken"), done.stdout + done.stderr
    assert "agreement is" in done.stderr


def test_files_that_cannot_be_judged_are_refused(published, tmp_path):
    model, folder = published
    refused(checked(tmp_path, model, folder), 2, "no .onnx or .tflite file")
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    done = checked(tmp_path / "model.onnx", model, folder)
    assert done.returncode == 3 and "damaged or cut off" in done.stderr, done.stderr
