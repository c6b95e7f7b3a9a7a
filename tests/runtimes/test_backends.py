"""Named outputs of model files: the same by ONNX Runtime, LiteRT's interpreter and LiteRT's CompiledModel, whatever is padded."""

from __future__ import annotations

import numpy as np
import pytest

from runtimes import backends
from runtimes.backends import load_model, per_token
from runtimes.errors import BadInput, IntegrityError
from runtimes.session import SessionOptions
from runtimes.text import Encoding
from tests.runtimes.tiny_files import random_tables, write_onnx, write_tflite

BUCKETS = [4, 9]
SHAPES = {
    "text-classification": ({"logits": 4}, {}, False),
    "pairs": ({"probabilities": 9}, {}, True),  # as many classes as the larger bucket has tokens
    "token-classification": ({}, {"logits": 9}, False),
    "intent-and-slots": ({"logits": 4}, {"slot_logits": 3}, True),
    "question-answering": ({}, {"start_logits": None, "end_logits": None}, True),
    "one": ({"logits": 1}, {"slot_logits": 1}, True),
    "sentence-embedding": ({"sentence_embedding": 6}, {}, False),
}
HOW = ["onnx", "interpreted", "compiled"]
INPUTS = [
    Encoding([2, 5, 3], [0, 0, 1]), Encoding([2, 5, 6, 7, 8, 9, 10, 11, 3], [0, 0, 0, 1, 1, 1, 1, 1, 1]), Encoding([1], [1]),
    Encoding([2, 5, 6, 3], [0, 0, 0, 0]),
]  # fmt: skip


@pytest.fixture(params=SHAPES, scope="module")
def tables(request):
    return random_tables(*SHAPES[request.param])


@pytest.fixture(params=HOW, scope="module")
def model(request, tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    if request.param == "onnx":
        return load_model(write_onnx(folder / "model.onnx", tables))
    path = write_tflite(folder / "model.tflite", tables, BUCKETS)
    loaded = load_model(path, session=SessionOptions(weight_cache="memory" if request.param == "compiled" else "none"))
    assert type(loaded._model).__name__ == {"compiled": "CompiledModel", "interpreted": "Interpreter"}[request.param]
    return loaded


def same(got, expected) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name].dtype == np.float32 and got[name].shape == values.shape, name
        np.testing.assert_allclose(got[name], values, atol=1e-5, err_msg=name)


def test_every_output_is_given_by_name_cut_to_the_tokens(model, tables):
    """Long after short and short after long: nothing of an input before is left in the arrays that are used again."""
    for one in [*INPUTS, *INPUTS[::-1]]:
        same(model.run(one.ids, one.types), tables.expected(one.ids, one.types))
        same(model.run(one.ids), tables.expected(one.ids))


def test_results_stay_what_they_were_when_the_next_input_runs(model, tables):
    first = model.run(INPUTS[1].ids, INPUTS[1].types)
    model.run(INPUTS[1].ids[::-1], INPUTS[1].types[::-1])
    same(first, tables.expected(INPUTS[1].ids, INPUTS[1].types))


def test_ids_may_be_arrays(model, tables):
    same(model.run(np.array(INPUTS[0].ids, np.int32), np.array(INPUTS[0].types)), tables.expected(INPUTS[0].ids, INPUTS[0].types))


def test_tensors_are_told_as_a_manifest_lists_them(model, tables):
    inputs, outputs = model.tensors()
    assert [one["name"] for one in inputs] == ["attention_mask", "input_ids", "token_type_ids"][: 3 if tables.types else 2]
    length = "sequence_length" if isinstance(model, backends.OnnxModel) else "N"
    assert all(one["shape"][1] == length for one in inputs)
    shapes = {one["name"]: one["shape"][1:] for one in outputs}
    assert shapes == {name: [table.shape[1]] for name, table in tables.inputs.items()} | {
        name: [length, *table.shape[1:]] for name, table in tables.tokens.items()
    }


def test_a_padded_batch_gives_what_each_input_gives_alone(tables, tmp_path):
    model = load_model(write_onnx(tmp_path / "model.onnx", tables))
    for got, one in zip(model.run_batch(INPUTS, pad_id=0), INPUTS, strict=True):
        same(got, tables.expected(one.ids, one.types))


def test_a_padded_batch_pads_with_the_pad_id(tmp_path):
    tables = random_tables({"logits": 2}, {})
    model = load_model(write_onnx(tmp_path / "model.onnx", tables))
    (short, _) = model.run_batch(INPUTS[:2], pad_id=4)
    np.testing.assert_allclose(short["logits"], tables.expected(INPUTS[0].ids)["logits"] + 6 * tables.inputs["logits"][4], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "rank", "expected"),
    [
        ("logits", 2, False), ("logits", 3, True), ("slot_logits", 3, True), ("start_logits", 2, True), ("end_logits", 2, True),
        ("sentence_embedding", 2, False),
    ],
)
def test_which_outputs_are_per_token(name, rank, expected):
    assert per_token(name, rank) is expected


def test_too_many_tokens_for_the_largest_bucket(tmp_path):
    model = load_model(write_tflite(tmp_path / "model.tflite", random_tables({"logits": 2}, {}), BUCKETS))
    assert model.buckets == BUCKETS
    with pytest.raises(BadInput, match="10 tokens do not fit the largest bucket of 9"):
        model.run([2] * 10)


def renamed(path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_file_with_an_input_that_cannot_be_fed_is_refused(tmp_path, cache):
    """Zeros for it would give an answer, and a wrong one."""
    tables = random_tables({"logits": 2}, {"slot_logits": 2})
    onnx, tflite = write_onnx(tmp_path / "model.onnx", tables), write_tflite(tmp_path / "model.tflite", tables, BUCKETS)
    for path in (onnx, tflite):
        renamed(path, b"token_type_ids", b"position_token")
        with pytest.raises(IntegrityError, match=rf"{path.name}: takes 'position_token'; inputs that can be fed are attention_mask, input_ids"):
            load_model(path, session=SessionOptions(weight_cache=cache))


def test_a_tflite_file_whose_tensors_are_not_as_named_is_refused(tmp_path):
    tables = random_tables({"start_logits": 7}, {})  # an output by this name has a number for each token
    path = write_tflite(tmp_path / "model.tflite", tables, BUCKETS)
    with pytest.raises(IntegrityError, match=r"serving_4: start_logits is float32 \[1, 7\]; expected float32 \[1, 4, \.\.\.\]"):
        load_model(path)
    path = write_tflite(tmp_path / "other.tflite", random_tables({"logits": 2}, {}), BUCKETS, prefix="encode_")
    with pytest.raises(IntegrityError, match=r"no signature serving_N; the file has \['encode_4', 'encode_9'\]"):
        load_model(path)


def test_an_onnx_file_may_take_int32(tmp_path):
    import onnx

    path = write_onnx(tmp_path / "model.onnx", random_tables({"logits": 2}, {}))
    model = onnx.load(path)
    for one in model.graph.input:
        one.type.tensor_type.elem_type = onnx.TensorProto.INT32
    onnx.save(model, path)
    same(load_model(path).run([2, 5, 3]), random_tables({"logits": 2}, {}).expected([2, 5, 3]))
