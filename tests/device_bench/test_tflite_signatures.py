"""Signatures read from the flatbuffer: held against what LiteRT reads, and damaged files."""

from __future__ import annotations

import random

import pytest

from device_bench.tflite_signatures import read_signatures
from runtimes.errors import BadInput, IntegrityError


def test_same_as_the_runtime_reads(tflite_file):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(tflite_file))
    signatures = read_signatures(tflite_file)
    assert {one.key: sorted(input.name for input in one.inputs) for one in signatures} == {
        key: value["inputs"] for key, value in interpreter.get_signature_list().items()
    }
    (first,) = [one for one in signatures if one.subgraph == 0]
    assert [(input.tensor, list(input.shape)) for input in first.inputs] == [
        (detail["name"], detail["shape"].tolist()) for detail in interpreter.get_input_details()
    ]
    for one in signatures:
        assert {input.shape for input in one.inputs} == {(1, int(one.key.removeprefix("serving_")))}


def test_no_tflite_file(tmp_path):
    with pytest.raises(BadInput, match="No such file"):
        read_signatures(tmp_path / "gone.tflite")
    (tmp_path / "other").write_bytes(b"ONNX, perhaps")
    with pytest.raises(IntegrityError, match="no TFLite file"):
        read_signatures(tmp_path / "other")


def test_damaged_files_are_read_or_refused(tflite_file, tmp_path):
    whole, damaged, generator = tflite_file.read_bytes(), tmp_path / "damaged.tflite", random.Random(7)
    for _ in range(300):
        data = bytearray(whole[: generator.randrange(8, len(whole))])
        for _ in range(generator.randrange(3)):
            data[generator.randrange(8, len(data) + 1) - 1] = generator.randrange(256)
        damaged.write_bytes(data)
        try:
            read_signatures(damaged)
        except IntegrityError as error:
            assert "damaged.tflite" in str(error)
