"""Damaged model and tokenizer files are refused before a native library sees them; whole ones pass."""

from __future__ import annotations

import json
import random

import pytest

from runtimes.backends import load_model
from runtimes.errors import BadInput, IntegrityError
from runtimes.onnx_structure import check_onnx
from runtimes.session import MOST_THREADS
from runtimes.text import TextEncoder
from runtimes.tflite_structure import check_tflite
from tests.runtimes.tiny_files import random_tables, write_onnx, write_tflite

CHECKS = {"model.onnx": check_onnx, "model.tflite": check_tflite}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tables = random_tables({"logits": 3}, {"slot_logits": 2})
    return {"model.onnx": write_onnx(folder / "model.onnx", tables), "model.tflite": write_tflite(folder / "model.tflite", tables, [4, 9])}


@pytest.mark.parametrize("name", CHECKS)
def test_a_whole_file_passes_and_every_shorter_one_is_refused(files, tmp_path, name):
    CHECKS[name](files[name])
    data = files[name].read_bytes()
    for size in {0, 1, 7, 8, len(data) // 2, len(data) - 1, *random.Random(1).sample(range(len(data)), 60)}:
        (tmp_path / name).write_bytes(data[:size])
        with pytest.raises(IntegrityError, match=name):
            load_model(tmp_path / name)


@pytest.mark.parametrize("name", CHECKS)
def test_flipped_bits_pass_or_are_an_integrity_error(files, tmp_path, name):
    data, source, refused = files[name].read_bytes(), random.Random(2), 0
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(source.choice([1, 1, 3])):
            changed[source.randrange(len(data))] ^= 1 << source.randrange(8)
        (tmp_path / name).write_bytes(changed)
        try:
            CHECKS[name](tmp_path / name)
        except IntegrityError:
            refused += 1
    assert refused > 1500 * {"model.onnx": 0.05, "model.tflite": 0.4}[name], "most bytes of the small TFLite file are its structure"


def rebuilt(path, change):
    """The TFLite file with ``change`` made to its object."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def no_producer(model):
    graph = model.subgraphs[0]
    graph.operators = graph.operators[1:]


def wide(model):
    model.subgraphs[0].tensors[0].shape = [2**30, 2**30]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_producer, r"graph 0: operator \d+ reads tensor \d+, which nothing computes before it"),
        (lambda model: model.subgraphs[0].operators.reverse(), "which nothing computes before it"),
        (lambda model: setattr(model.subgraphs[1].operators[0], "opcodeIndex", 99), "graph 1: operator 0: code 99 of"),
        (lambda model: setattr(model.subgraphs[0].operators[0], "inputs", [-1]), "operator 0: tensor -1 of"),
        (lambda model: setattr(model.subgraphs[0].tensors[2], "buffer", 10**6), "tensor 2: buffer 1000000 of"),
        (lambda model: setattr(model.buffers[2], "data", model.buffers[2].data[:-4]), r"needs \d+ bytes and has \d+"),
        (wide, r"tensor 0 has the shape \[1073741824, 1073741824\]"),
        (lambda model: setattr(model.signatureDefs[0], "subgraphIndex", 7), "signature 0: graph 7 of 2"),
        (lambda model: setattr(model.signatureDefs[0].inputs[0], "tensorIndex", 3), "signature 0: its inputs are not those of its graph"),
        (lambda model: setattr(model.subgraphs[0], "outputs", [0, 10**5]), "signature 0|output 100000 of"),
        (lambda model: setattr(model.subgraphs[0].operators[0], "outputs", [0]), "writes tensor 0 again"),
    ],
)
def test_what_does_not_hold_together_is_named(files, tmp_path, change, says):
    (tmp_path / "x.tflite").write_bytes(rebuilt(files["model.tflite"], change))
    with pytest.raises(IntegrityError, match=rf"x\.tflite: the TFLite file is damaged or cut off: .*({says})"):
        check_tflite(tmp_path / "x.tflite")


def test_a_constant_that_lies_elsewhere_or_has_other_bytes_is_refused(files, tmp_path):
    import onnx

    for change, says in (
        (lambda constant: setattr(constant, "data_location", onnx.TensorProto.EXTERNAL), "lie in another file"),
        (lambda constant: setattr(constant, "raw_data", constant.raw_data[:-1]), "of shape .* that has"),
        (lambda constant: constant.dims.append(-1), "negative size"),
    ):
        model = onnx.load(files["model.onnx"])
        change(model.graph.initializer[1])
        (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(IntegrityError, match=rf"x\.onnx: the ONNX file is damaged or cut off: a constant .*{says}"):
            load_model(tmp_path / "x.onnx")


@pytest.mark.parametrize("threads", [0, -1, MOST_THREADS + 1, 10**6, 10**30])
def test_a_number_of_threads_that_no_machine_has_is_bad_input(files, threads):
    for path in files.values():
        with pytest.raises(BadInput, match=f"{threads} threads: 1 to {MOST_THREADS} can be asked for"):
            load_model(path, threads)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("number", [10**6, 2**31, 2**62, -(2**40)])
def test_a_token_that_the_file_does_not_have_is_an_integrity_error(files, name, number):
    model = load_model(files[name])
    if name == "model.tflite" and -(2**31) <= number < 2**31:
        return  # a runtime may give zeros for it
    with pytest.raises(IntegrityError, match=rf"{name}: .* cannot run"):
        model.run([2, number, 3])


def added(state, **fields):
    return state["added_tokens"].append(state["added_tokens"][0] | fields)


def replacing(state, times: int):
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    state["normalizer"] = {"type": "Sequence", "normalizers": [twice] * times}


BOMBS = {
    "wide id": (lambda state: state["model"]["vocab"].update(a=2**31), "token id 2147483648 is not a whole number of 0 to 2147483647"),
    "wide added id": (lambda state: added(state, content="x", id=2**32 - 1), "token id 4294967295"),
    "negative id": (lambda state: state["model"]["vocab"].update(a=-1), "token id -1"),
    "no id": (lambda state: added(state, content="x", id=None), "token id None"),
    "doubling": (lambda state: replacing(state, 40), "replacements make more than 1000 characters of one"),
    "long words": (lambda state: state["model"].update(max_input_chars_per_word=10**9), "max_input_chars_per_word: 1000000000"),
    "long template": (lambda state: state["post_processor"].update(single=state["post_processor"]["single"] * 50), "single: 150 pieces"),
    "no model": (lambda state: state.pop("model"), "it has no model"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_tokenizer_without_bounds_is_refused(tokenizer_file, tmp_path, name):
    change, says = BOMBS[name]
    state = json.loads(tokenizer_file.read_text())
    change(state)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(IntegrityError, match=rf"tokenizer\.json: .*{says}"):
        TextEncoder(tmp_path / "tokenizer.json", 16)


def test_a_tokenizer_file_that_is_too_large_or_nested_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(IntegrityError, match=r"65 MB, more than 64"):
        TextEncoder(path, 16)
    path.write_text('{"model": {}, "normalizer": ' + '{"normalizers": [' * 5000 + "]}" * 5000 + "}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: "):
        TextEncoder(path, 16)
