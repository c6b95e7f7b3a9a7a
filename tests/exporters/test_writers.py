"""Written files: the model's own function in fp32, close to it in fewer bits, each weight once, and what their runtimes can read."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from onnx import TensorProto, numpy_helper

from exporters.calibration import calibrate
from exporters.folding import fold
from exporters.forward import NumpySteps, forward
from exporters.graph import FoldedEncoder, Linear
from exporters.onnx_writer import BLOCK, FUSED, IR_VERSION, OPSET, WATCHED, write_onnx
from exporters.parity import TOLERANCE, check_parity, first_wrong_fold, first_wrong_tensor, torch_results
from exporters.quant_plan import FLOAT32, INT4, INT8, INT8_STATIC, QuantPlan, rows_to_int8, tensor_names
from exporters.tflite_writer import PER_CHANNEL, write_tflite
from pipeline.models.config import EncoderConfig, head_shape
from pipeline.models.encoder import Encoder
from runtimes.backends import OnnxModel, load_model
from runtimes.errors import BadInput, GateFailed
from tests.exporters.encoders import BIG, BIG_LONGEST, KINDS, LABELS, LONGEST, THIN, big_encoder, big_texts, encoder, texts
from tests.exporters.results import file_logits, inputs, numpy_logits, torch_logits

FORMATS = ("onnx", "tflite")
BUCKETS = [4, 9, LONGEST]
BIG_BUCKETS = [8, 16, BIG_LONGEST]
LISTS = texts(110, (1, 2, *(edge + more for edge in BUCKETS for more in (-1, 0, 1) if edge + more <= LONGEST)))
MIDDLE, FEWER = LISTS[:60], LISTS[:32]
QUANTIZED = (INT8, INT8_STATIC, INT4)
OPERATORS = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}


def write(model: FoldedEncoder, path: Path, plan: QuantPlan | None = None, buckets: list[int] = BUCKETS, **options: bool) -> Path:
    plan = plan or QuantPlan(FLOAT32)
    if path.suffix == ".onnx":
        write_onnx(model, path, plan, **options)
    else:
        write_tflite(model, path, buckets, plan, **options)
    return path


def plan_for(model: FoldedEncoder, precision: str, lists: list = FEWER) -> QuantPlan:
    return QuantPlan(precision, (), calibrate(model, inputs(lists)).ranges if precision == INT8_STATIC else {})


def as_results(logits: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Logits [N, C] as :func:`exporters.parity.torch_results` gives them."""
    return [{"logits": row} for row in logits]


def batch_logits(model: OnnxModel, pad_id: int) -> np.ndarray:
    return np.stack([result["logits"] for result in model.run_batch(inputs(FEWER), pad_id)])


def likeness(got: np.ndarray, expected: np.ndarray) -> float:
    """Correlation of what texts change in the logits; what all texts have in common counts for nothing."""
    return float(np.corrcoef((got - got.mean(axis=0)).ravel(), (expected - expected.mean(axis=0)).ravel())[0, 1])


@lru_cache(maxsize=4)
def onnx_session(path: Path, written: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=4)
def tflite_runner(path: Path, written: int, bucket: int):
    return Interpreter(model_path=str(path)).get_signature_runner(f"serving_{bucket}")


def run_onnx(path: Path, rows: list, types: list | None = None, width: int = 0) -> dict[str, np.ndarray]:
    """Every output of one batch, padded to ``width`` or to the longest row."""
    session = onnx_session(path, path.stat().st_mtime_ns)
    width = max(width, *map(len, rows))
    feeds = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], "token_type_ids": types or [[0] * len(row) for row in rows]}
    padded = {name: np.array([row + [0] * (width - len(row)) for row in value], np.int64) for name, value in feeds.items()}
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, {item.name: padded[item.name] for item in session.get_inputs()}), strict=True))


def run_tflite(path: Path, ids: list, types: list | None = None, bucket: int = LONGEST) -> dict[str, np.ndarray]:
    runner = tflite_runner(path, path.stat().st_mtime_ns, bucket)
    feeds = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types or [0] * len(ids)}
    padded = {name: np.array([value + [0] * (bucket - len(value))], np.int32) for name, value in feeds.items()}
    return runner(**{name: padded[name] for name in runner.get_input_details()})


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


def read_tflite(path: Path) -> schema.ModelT:
    return schema.ModelT.InitFromPackedBuf(path.read_bytes())


def contents(model: schema.ModelT) -> list[bytes]:
    """Bytes of every constant."""
    return [np.asarray(buffer.data, np.uint8).tobytes() for buffer in model.buffers if buffer.data is not None]


def operators(model: schema.ModelT, graph: schema.SubGraphT) -> list[tuple[str, int, schema.OperatorT]]:
    """(name, version, operator) of a graph."""
    codes = [(OPERATORS[code.builtinCode], code.version) for code in model.operatorCodes]
    return [(*codes[operator.opcodeIndex], operator) for operator in graph.operators]


def stored(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray:
    """A constant's values; codes of 4 bits with their sign."""
    kinds = {
        schema.TensorType.FLOAT32: np.float32, schema.TensorType.INT32: np.int32, schema.TensorType.INT8: np.int8, schema.TensorType.INT4: np.uint8,
    }  # fmt: skip
    values = np.frombuffer(np.asarray(model.buffers[tensor.buffer].data, np.uint8).tobytes(), kinds[tensor.type])
    if tensor.type == schema.TensorType.INT4:
        values = np.stack([values & 0xF, values >> 4], axis=1).reshape(-1)[: int(np.prod(tensor.shape))].astype(np.int8)
        values = np.where(values > 7, values - 16, values)
    return values.reshape(tensor.shape)


@cache
def big_folded(kind: str) -> FoldedEncoder:
    return fold(big_encoder(kind), BIG_LONGEST)


@cache
def big_plan(kind: str, precision: str) -> QuantPlan:
    return plan_for(big_folded(kind), precision, big_texts()[:32])


@cache
def big_results(kind: str) -> np.ndarray:
    return torch_logits(big_encoder(kind), big_texts())


# --- fp32: the same function -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_both_files_compute_the_model(kind, tmp_path):
    model = encoder(kind)
    folded, expected = fold(model, LONGEST), torch_logits(model, LISTS)
    assert len(LISTS) >= 100 and {len(ids) for ids in LISTS} >= set(range(1, LONGEST + 1))
    for format_ in FORMATS:
        assert check_parity(as_results(expected), write(folded, tmp_path / f"m.{format_}"), inputs(LISTS)).worst < 1e-5


def test_a_pretrained_model_on_real_texts(minilm, tmp_path):
    model, lists = minilm
    folded, expected = fold(model, 32), torch_logits(model, lists)
    for format_ in FORMATS:
        assert check_parity(as_results(expected), write(folded, tmp_path / f"m.{format_}", buckets=[8, 16, 32]), inputs(lists)).worst < 1e-4
        got = file_logits(write(folded, tmp_path / f"q.{format_}", QuantPlan(INT8), buckets=[8, 16, 32]), lists)
        assert likeness(got, expected) > 0.98
        assert (got.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9


@pytest.mark.parametrize("kind", ["bert", "electra", "albert", "mobilebert", "mobilebert, word", "no norm after the sum", "factorized"])
def test_files_for_two_segments_read_token_types(kind, tmp_path):
    model = encoder(kind)
    folded = fold(model, LONGEST, segments=2)
    types = [[0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2) for ids in FEWER]
    with torch.no_grad():
        expected = np.concatenate([model(torch.tensor([ids]), None, torch.tensor([own])).logits for ids, own in zip(FEWER, types, strict=True)])
    assert np.abs(expected - torch_logits(model, FEWER)).max() > 0.01, "types must matter, or this test sees nothing"
    onnx_file, tflite_file = write(folded, tmp_path / "m.onnx"), write(folded, tmp_path / "m.tflite")
    assert np.abs(run_onnx(onnx_file, FEWER, types)["logits"] - expected).max() < 1e-4
    for number, (ids, own) in enumerate(zip(FEWER[:16], types, strict=False)):
        assert np.abs(run_onnx(onnx_file, [ids], [own])["logits"] - expected[number]).max() < 1e-4
        for bucket in (bucket for bucket in BUCKETS if bucket >= len(ids)):
            assert np.abs(run_tflite(tflite_file, ids, own, bucket)["logits"] - expected[number]).max() < 1e-4
    for path in (onnx_file, tflite_file):  # and without types a text is one segment
        check_parity(as_results(torch_logits(model, FEWER)), path, inputs(FEWER))
        quantized = write(folded, path.with_stem("int8"), QuantPlan(INT8))
        got = run_onnx(quantized, FEWER, types)["logits"] if path is onnx_file else None
        got = np.concatenate([run_tflite(quantized, ids, own)["logits"] for ids, own in zip(FEWER, types, strict=True)]) if got is None else got
        assert likeness(got, expected) > 0.98


@pytest.mark.parametrize("kind", ["bert", "mobilebert", "albert"])
def test_probabilities_are_the_softmax_of_the_logits(kind, tmp_path):
    model = encoder(kind)
    folded = fold(model, LONGEST, activation="softmax")
    expected = np.stack([result["probabilities"] for result in torch_results(model, inputs(FEWER), "softmax")])
    for plan, within in ((QuantPlan(FLOAT32), 1e-5), (QuantPlan(INT8), 0.1), (plan_for(folded, INT8_STATIC), 0.1)):
        got = {
            "onnx": run_onnx(write(folded, tmp_path / "m.onnx", plan), FEWER),
            "tflite": {"probabilities": np.concatenate([
                run_tflite(path, ids)["probabilities"] for path in [write(folded, tmp_path / "m.tflite", plan)] for ids in FEWER
            ])},
        }  # fmt: skip
        for format_ in FORMATS:
            assert list(got[format_]) == ["probabilities"]
            assert np.abs(got[format_]["probabilities"] - expected).max() < within, format_
            assert np.abs(got[format_]["probabilities"].sum(axis=1) - 1).max() < 1e-5, format_


def test_parity_refuses_another_function(tmp_path):
    model = encoder("mobilebert")
    expected = torch_logits(model, LISTS)
    expected[7, 1] += 0.5
    for format_ in FORMATS:
        path = write(fold(model, LONGEST), tmp_path / f"m.{format_}")
        with pytest.raises(GateFailed, match=rf"m\.{format_}: run alone, text 7 of 110 .* differs from the torch model by 0\.5 in logits"):
            check_parity(as_results(expected), path, inputs(LISTS))


def test_the_word_of_the_padding_reaches_no_text(tmp_path):
    """A trigram reaches one token beyond the text: there lie zeros, whatever the checkpoint's row for padding holds."""
    model = encoder("mobilebert")
    model.embeddings.word.weight.data[0] = 3.0
    lists = [ids for ids in LISTS if 0 not in ids]
    expected = torch_logits(model, lists)
    for format_ in FORMATS:
        check_parity(as_results(expected), write(fold(model, LONGEST), tmp_path / f"m.{format_}"), inputs(lists))


@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_the_word_of_number_0_reaches_no_text_where_padding_has_another_number(precision, tmp_path):
    """Clients fill up with 0, which is <s> to a RoBERTa."""
    drawn = encoder("mobilebert")
    model = Encoder(EncoderConfig(**drawn.config.to_dict() | {"pad_token_id": 1})).eval()
    model.load_state_dict(drawn.state_dict())
    model.embeddings.word.weight.data[0], model.embeddings.word.weight.data[1] = 3.0, 0.0
    folded, plan = fold(model, LONGEST), QuantPlan(precision)
    lists = [[0, *(number for number in ids if number > 1)][:LONGEST] for ids in LISTS[:20]]
    within = 1e-4 if precision == FLOAT32 else 0.05
    for format_ in FORMATS:
        got = file_logits(write(folded, tmp_path / f"m.{format_}", plan), lists)
        if precision == FLOAT32:
            assert np.abs(got - torch_logits(model, lists)).max() < within
    loaded = load_model(write(folded, tmp_path / "m.onnx", plan))
    alone = file_logits(tmp_path / "m.onnx", lists)
    together = np.stack([result["logits"] for result in loaded.run_batch(inputs(lists), 0)])
    assert np.abs(together - alone).max() < within * np.abs(alone).max()
    for ids in lists[:4]:
        exact = file_logits(write(folded, tmp_path / "exact.tflite", plan, [len(ids)]), [ids])
        padded = file_logits(write(folded, tmp_path / "padded.tflite", plan, [LONGEST]), [ids])
        assert np.abs(exact - padded).max() < within * np.abs(exact).max()


# --- what consumers find -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_onnx_file_is_what_old_and_new_consumers_read(kind, tmp_path):
    path = write(fold(encoder(kind), LONGEST), tmp_path / "m.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(item.domain, item.version) for item in model.opset_import] == [("", OPSET)]
    assert (OPSET, model.ir_version) == (17, IR_VERSION) and IR_VERSION <= 9, "what onnxruntime 1.17 reads"
    assert {node.domain for node in model.graph.node} == {""}
    inputs = {item.name: item.type.tensor_type for item in model.graph.input}
    assert list(inputs) == ["attention_mask", "input_ids"]
    for tensor in inputs.values():
        assert tensor.elem_type == TensorProto.INT64
        assert [dim.dim_param for dim in tensor.shape.dim] == ["batch_size", "sequence_length"]
    (output,) = model.graph.output
    dims = output.type.tensor_type.shape.dim
    assert (output.name, output.type.tensor_type.elem_type) == ("logits", TensorProto.FLOAT)
    assert (dims[0].dim_param, dims[1].dim_value) == ("batch_size", LABELS)
    used = {name for node in model.graph.node for name in node.input}
    assert {item.name for item in model.graph.initializer} <= used, "constants that nobody reads"
    produced = {name for node in model.graph.node for name in node.output} - {output.name}
    assert produced <= used, "results that nobody reads"
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_two_segments_add_one_input(tmp_path):
    folded = fold(encoder("bert"), LONGEST, segments=2)
    graph = onnx.load(write(folded, tmp_path / "m.onnx")).graph
    assert [item.name for item in graph.input] == ["attention_mask", "input_ids", "token_type_ids"]
    inputs, _ = load_model(write(folded, tmp_path / "m.tflite")).tensors()
    assert {item["name"]: item["dtype"] for item in inputs} == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), "int32")


@pytest.mark.parametrize("precision", [FLOAT32, INT8, INT8_STATIC, INT4])
@pytest.mark.parametrize(
    "kind",
    [
        "bert", "albert", "mobilebert", "mobilebert, all, layer norm", "low rank student", "empty parts", "empty student, all", "quaternion student",
        "shared attention", "shared ffn student",
    ],
)  # fmt: skip
def test_one_onnx_file_takes_any_batch_and_length(kind, precision, tmp_path):
    """A text's result does not depend on its neighbours in the batch, nor on the width it is padded to."""
    folded = fold(encoder(kind), LONGEST)
    path = write(folded, tmp_path / "m.onnx", plan_for(folded, precision))
    if precision in (FLOAT32, INT8_STATIC):  # ranges of activations that come with the batch do depend on it
        alone, within = file_logits(path, FEWER), 1e-5 if precision == FLOAT32 else 0.02
        for first, count in ((0, 1), (1, 2), (3, 8), (0, len(FEWER))):
            for width in (0, LONGEST):
                rows = FEWER[first : first + count]
                assert np.abs(run_onnx(path, rows, width=width)["logits"] - alone[first : first + count]).max() < within
    got = run_onnx(path, FEWER)["logits"]
    assert got.shape == (len(FEWER), LABELS)
    expected = numpy_logits(folded, FEWER)
    assert likeness(got, expected) > (0.85 if precision == INT4 else 0.98)


@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_what_the_padding_holds_changes_nothing(precision, tmp_path):
    path = write(fold(encoder("bert"), LONGEST), tmp_path / "m.onnx", QuantPlan(precision))
    model = OnnxModel(path)
    if precision == FLOAT32:
        assert np.abs(batch_logits(model, 0) - batch_logits(model, 50)).max() < 1e-5
    else:
        assert likeness(batch_logits(model, 0), batch_logits(model, 50)) > 0.99


@pytest.mark.parametrize("kind", ["bert", "albert", "mobilebert"])
def test_a_tflite_file_has_one_signature_for_each_bucket(kind, tmp_path):
    path = write(fold(encoder(kind), LONGEST), tmp_path / "m.tflite", buckets=[LONGEST, 9, 4])
    interpreter = Interpreter(model_path=str(path))
    signatures = interpreter.get_signature_list()
    assert set(signatures) == {"serving_4", "serving_9", f"serving_{LONGEST}"}
    for name, signature in signatures.items():
        length = int(name.removeprefix("serving_"))
        assert {key: set(value) for key, value in signature.items()} == {"inputs": {"input_ids", "attention_mask"}, "outputs": {"logits"}}
        runner = interpreter.get_signature_runner(name)
        for details in runner.get_input_details().values():
            assert (details["dtype"], list(details["shape"])) == (np.int32, [1, length])
        (details,) = runner.get_output_details().values()
        assert (details["dtype"], list(details["shape"])) == (np.float32, [1, LABELS])
    assert load_model(path).buckets == [4, 9, LONGEST]
    for signature, graph in zip(read_tflite(path).signatureDefs, read_tflite(path).subgraphs, strict=True):
        assert [entry.name for entry in signature.inputs] == [b"attention_mask", b"input_ids"]
        assert [entry.tensorIndex for entry in signature.inputs] == list(graph.inputs)
    assert path.read_bytes()[4:8] == b"TFL3"


@pytest.mark.parametrize("heads", ["classifier", "answer"])
def test_inputs_and_outputs_stand_in_one_order_everywhere(heads, tmp_path):
    """Two clients that feed and read by place, by the order of the manifest and by that of the interpreter, get what feeding by name gives."""
    classifier, answer = head_shape("classifier", ["logits"], "first", LABELS), head_shape("answer", ["start_logits", "end_logits"], "all", 2)
    folded = fold(encoder("bert", heads=[{"classifier": classifier, "answer": answer}[heads]]), LONGEST, segments=2)
    path = write(folded, tmp_path / "m.tflite", buckets=[LONGEST])
    ids, types = list(range(5, 5 + LONGEST)), [0] * 9 + [1] * (LONGEST - 9)
    values = {"input_ids": ids, "attention_mask": [1] * LONGEST, "token_type_ids": types}
    inputs, outputs = ([tensor["name"] for tensor in tensors] for tensors in load_model(path).tensors())
    assert inputs == ["attention_mask", "input_ids", "token_type_ids"] and outputs == sorted(outputs)
    expected = run_tflite(path, ids, types)

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    ((name, signature),) = interpreter.get_signature_list().items()
    assert (signature["inputs"], signature["outputs"]) == (inputs, outputs)
    for place, details in enumerate(interpreter.get_input_details()):
        interpreter.set_tensor(details["index"], np.array([values[inputs[place]]], np.int32))
    interpreter.invoke()
    for place, details in enumerate(interpreter.get_output_details()):
        np.testing.assert_allclose(interpreter.get_tensor(details["index"]), expected[outputs[place]], atol=1e-5, err_msg=outputs[place])
    runner = interpreter.get_signature_runner(name)
    assert (list(runner.get_input_details()), list(runner.get_output_details())) == (inputs, outputs)

    compiled = load_model(path)._model
    assert type(compiled).__name__ == "CompiledModel" and compiled.get_signature_list() == {name: {"inputs": inputs, "outputs": outputs}}
    session = OnnxModel(write(folded, tmp_path / "m.onnx"))._session
    assert ([tensor.name for tensor in session.get_inputs()], [tensor.name for tensor in session.get_outputs()]) == (inputs, outputs)


def test_an_8_bit_table_keeps_a_scale_for_each_row(tmp_path):
    """Rows of very different sizes: one scale for all would leave nothing of the small ones."""
    model = encoder("bert")
    table = model.embeddings.word.weight.data
    table *= torch.logspace(-3, 0, len(table))[:, None]
    folded = pickle.loads(pickle.dumps(fold(model, LONGEST)))
    held = initializers(write(folded, tmp_path / "m.onnx", QuantPlan(INT8)))
    rows = held["embeddings.words"] * held["embeddings.words.scales"]
    assert (np.square(rows - folded.words.rows).sum(axis=1) <= 1e-4 * np.square(folded.words.rows).sum(axis=1)).all()
    gathers = [node for node in onnx.load(tmp_path / "m.onnx").graph.node if "embeddings.words" in node.input]
    assert [node.op_type for node in gathers] == ["Gather"], "the table is never dequantized whole"
    exact = file_logits(write(folded, tmp_path / "e.onnx", QuantPlan(INT8, (("embeddings.words", FLOAT32),))), FEWER)
    assert likeness(file_logits(tmp_path / "m.onnx", FEWER), exact) > 0.99


# --- fewer bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_files_of_every_kind_stay_near_the_model(kind, tmp_path):
    model = encoder(kind)
    folded, expected = fold(model, LONGEST), torch_logits(model, MIDDLE)
    for precision, least in ((INT8, 0.99), (INT8_STATIC, 0.985), (INT4, 0.85)):
        plan = plan_for(folded, precision, MIDDLE)
        if "low rank" in kind:  # rounded twice, and in 4 bits that is the rounding of the weights, see below
            least = {INT8: 0.99, INT8_STATIC: 0.975, INT4: 0.65}[precision]
        for format_ in FORMATS:
            got = file_logits(write(folded, tmp_path / f"q.{format_}", plan, [LONGEST]), MIDDLE)
            assert likeness(got, expected) > least, (precision, format_)
            if precision != INT4:
                assert np.abs(got - expected).max() < 0.2 * np.abs(expected).max(), (precision, format_)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_few_bits_are_the_model_with_rounded_weights(kind, tmp_path):
    """What is left is the rounding of activations to 8 bits. The matrices are narrower than a block, but for those of FFNs."""
    folded = pickle.loads(pickle.dumps(fold(encoder(kind), LONGEST)))
    exact = file_logits(write(folded, tmp_path / "m.onnx"), MIDDLE)
    words = (("embeddings.words", FLOAT32),)
    files = {f"{precision}.{format_}": (precision, format_) for precision in (INT8, INT4) for format_ in FORMATS}
    got = {
        name: file_logits(write(folded, tmp_path / f"{precision}.{format_}", QuantPlan(precision, words), [LONGEST]), MIDDLE)
        for name, (precision, format_) in files.items()
    }  # fmt: skip
    for name, (precision, format_) in files.items():
        rounded = pickle.loads(pickle.dumps(folded))
        for linear, _ in rounded.linears():
            columns = linear.weight.shape[1]
            size = BLOCK if (precision, format_) == (INT4, "onnx") else columns
            for begin in range(0, columns, size):
                codes, scales = rows_to_int8(linear.weight[:, begin : begin + size], 4 if precision == INT4 else 8)
                linear.weight[:, begin : begin + size] = codes * scales[:, None]
        reference = numpy_logits(rounded, MIDDLE)
        assert likeness(got[name], reference) > 0.99, name
        if precision == INT4:
            assert likeness(got[name], reference) > likeness(got[name], exact), name


@pytest.mark.parametrize(("kind", "least"), [("bert", 0.9), ("student", 0.9), ("albert", 0.8), *((kind, 0.8) for kind in THIN)])
def test_quantized_files_stay_near_a_larger_model(kind, least, tmp_path):
    folded, expected = big_folded(kind), big_results(kind)
    for precision, least in ((INT8, 0.99), (INT8_STATIC, 0.985), (INT4, least)):  # noqa: B020
        plan = big_plan(kind, precision)
        for format_ in FORMATS:
            got = file_logits(write(folded, tmp_path / f"q.{format_}", plan, BIG_BUCKETS), big_texts())
            assert likeness(got, expected) > least, (precision, format_)


def assert_nearest_codes(codes: np.ndarray, scales: np.ndarray, weight: np.ndarray, largest: int, name: str) -> None:
    """``codes`` [rows, columns] times ``scales`` [rows, 1] is ``weight`` to half a step, and the whole range is used."""
    assert codes.min() >= -largest and codes.max() <= largest, name
    assert np.all(np.abs(codes * scales - weight) <= scales * 0.501), name
    assert np.all((np.abs(codes).max(axis=1) == largest) | ~weight.any(axis=1)), name


def linears_by_name(model: FoldedEncoder) -> dict[str, Linear]:
    return {linear.name: linear for linear, _ in model.linears()}


def in_pieces(held: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [in, out] and scales [out] of a matrix, which QAttention and its neighbour may hold in two pieces."""
    if name in held:
        assert not any(re.fullmatch(rf"{re.escape(name)}\.\d+", other) for other in held), f"{name} is stored twice"
        return held[name], held[f"{name}.scales"]
    pieces = sorted((other for other in held if re.fullmatch(rf"{re.escape(name)}\.\d+", other)), key=lambda other: int(other.rsplit(".", 1)[1]))
    return np.concatenate([held[piece] for piece in pieces], axis=1), np.concatenate([held[f"{piece}.scales"] for piece in pieces])


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("kind", BIG)
def test_onnx_matrices_are_stored_in_few_bits_and_in_no_other_form(kind, precision, tmp_path):
    folded = big_folded(kind)
    path = write(folded, tmp_path / "m.onnx", big_plan(kind, precision))
    held = initializers(path)
    assert held["embeddings.words"].dtype == np.int8
    assert_nearest_codes(held["embeddings.words"], held["embeddings.words.scales"], folded.words.rows, 127, "embeddings.words")
    for name, linear in linears_by_name(folded).items():
        rows, columns = linear.weight.shape
        if precision == INT4:
            assert held[name].dtype == np.uint8 and held[name].size == rows * -(-columns // BLOCK) * BLOCK // 2
            codes = np.stack([held[name] & 0xF, held[name] >> 4], axis=-1).astype(np.int8).reshape(rows, -1)[:, :columns] - 8
            scales = np.repeat(held[f"{name}.scales"].reshape(rows, -1), BLOCK, axis=1)[:, :columns]
            assert np.all(np.abs(codes * scales - linear.weight) <= scales * 0.501), name
        else:
            codes, scales = in_pieces(held, name)
            assert (codes.dtype, codes.shape) == (np.int8, (columns, rows))
            assert_nearest_codes(codes.T, scales[:, None], linear.weight, 127, name)
    floats = {name: value for name, value in held.items() if value.dtype == np.float32}
    assert {name for name, value in floats.items() if value.ndim > 1} == {"embeddings.positions", "embeddings.words.scales"}
    of_model = onnx.load(path)
    kinds = Counter(node.op_type for node in of_model.graph.node)
    assert not {"MatMul", "Gemm"} & set(kinds) and kinds["MultiHeadAttention"] + kinds["QAttention"] == len(folded.layers)
    assert kinds["QAttention"] == (0 if precision == INT4 else len(folded.layers) - 1)
    products = {INT8: {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}, INT8_STATIC: {"MatMulIntegerToFloat"}, INT4: {"MatMulNBits"}}[precision]
    assert set(kinds) & {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits"} <= products
    assert {item.domain for item in of_model.opset_import} == {"", FUSED}
    assert (of_model.ir_version, of_model.opset_import[0].version) == (IR_VERSION, OPSET)
    onnx.checker.check_model(of_model)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("kind", BIG)
def test_tflite_matrices_are_stored_in_few_bits_and_in_no_other_form(kind, precision, tmp_path):
    folded = big_folded(kind)
    model = read_tflite(write(folded, tmp_path / "m.tflite", big_plan(kind, precision), BIG_BUCKETS))
    for graph in model.subgraphs:
        held = {tensor.name.decode(): tensor for tensor in graph.tensors if tensor.buffer}
        assert len(held) == sum(bool(tensor.buffer) for tensor in graph.tensors), "two constants of one name"
        words, scales = stored(model, held["embeddings.words"]), stored(model, held["embeddings.words.scales"])
        assert held["embeddings.words"].type == schema.TensorType.INT8
        assert not words[0].any(), "the row of the padding"
        assert_nearest_codes(words[1:], scales[1:], folded.words.rows[1:], 127, "words")
        for name, linear in linears_by_name(folded).items():
            tensor = held[name]
            assert tensor.type == (schema.TensorType.INT4 if precision == INT4 else schema.TensorType.INT8), name
            assert tuple(tensor.shape) == linear.weight.shape
            scales = np.asarray(tensor.quantization.scale)[:, None]
            assert scales.shape == (len(linear.weight), 1) and not np.any(tensor.quantization.zeroPoint)
            assert_nearest_codes(stored(model, tensor), scales, linear.weight, 7 if precision == INT4 else 127, name)
        floats = {name for name, tensor in held.items() if tensor.type == schema.TensorType.FLOAT32 and len(tensor.shape) > 1}
        assert floats == {"embeddings.words.scales", f"embeddings.positions.{graph.name.decode().removeprefix('serving_')}"}
        assert {version for name, version, _ in operators(model, graph) if name == "FULLY_CONNECTED"} == {PER_CHANNEL}
    assert PER_CHANNEL >= 12


@pytest.mark.parametrize("kind", ["bert", "mobilebert", "albert", "mobilebert, all"])
def test_static_files_hold_fixed_ranges(kind, tmp_path):
    """No range is taken from the text at hand: what calibration saw stands in the file."""
    folded = fold(encoder(kind), LONGEST)
    plan = plan_for(folded, INT8_STATIC)
    held = initializers(write(folded, tmp_path / "m.onnx", plan))
    for name in linears_by_name(folded):
        seen = plan.range(name)
        if name != "embeddings.projection" or folded.projection is None:
            assert held[f"{name}.input_scale"] == pytest.approx((max(seen.input_max, 0) - min(seen.input_min, 0)) / 255, rel=1e-5)
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"} & kinds
    model = read_tflite(write(folded, tmp_path / "m.tflite", plan))
    for graph in model.subgraphs:
        for name, _, operator in operators(model, graph):
            if name != "FULLY_CONNECTED":
                continue
            source, weight, bias = (graph.tensors[i] for i in operator.inputs)
            linear = linears_by_name(folded)[weight.name.decode()]
            if linear.activation in (None, "relu"):
                assert source.type == schema.TensorType.INT8, linear.name
                units = np.float64(source.quantization.scale[0]) * np.asarray(weight.quantization.scale)
                assert np.allclose(bias.quantization.scale, units, rtol=1e-5), linear.name
                wanted = 0 if linear.bias is None else linear.bias
                assert np.all(np.abs(stored(model, bias) * units - wanted) <= units * 0.51 + 1e-6), linear.name


def test_rules_decide_matrix_by_matrix(tmp_path):
    model = encoder("mobilebert")
    folded, expected = fold(model, LONGEST), torch_logits(model, FEWER)
    rules = ((r"layers\.0\..*", FLOAT32), ("classifier", INT4), ("embeddings.words", FLOAT32))
    plan = QuantPlan(INT8, rules)
    held = {re.sub(r"\.\d+$", "", name): value for name, value in initializers(write(folded, tmp_path / "m.onnx", plan)).items()}
    graph = read_tflite(write(folded, tmp_path / "m.tflite", plan)).subgraphs[0]
    tensors = {tensor.name.decode(): tensor.type for tensor in graph.tensors}
    kinds = {FLOAT32: (np.float32, schema.TensorType.FLOAT32), INT8: (np.int8, schema.TensorType.INT8), INT4: (np.uint8, schema.TensorType.INT4)}
    for name in tensor_names(folded):
        wanted = FLOAT32 if name.startswith("layers.0.") or name == "embeddings.words" else INT4 if name == "classifier" else INT8
        assert (held[name].dtype, tensors[name]) == kinds[wanted], name
    for format_ in FORMATS:
        assert likeness(file_logits(tmp_path / f"m.{format_}", FEWER), expected) > 0.95


@pytest.mark.parametrize("format_", FORMATS)
def test_rules_decide_factor_by_factor(format_, tmp_path):
    model = encoder("low rank")
    folded = fold(model, LONGEST)
    plan = QuantPlan(FLOAT32, ((r"layers\.1\.output\.inner", INT8), (r"layers\.1\.query", INT4)))
    path = write(folded, tmp_path / f"m.{format_}", plan)
    if format_ == "onnx":
        held = {name: value.dtype.name for name, value in initializers(path).items()}
        codes = {INT8: "int8", INT4: "uint8", FLOAT32: "float32"}
    else:
        held = {tensor.name.decode(): tensor.type for tensor in read_tflite(path).subgraphs[0].tensors}
        codes = {INT8: schema.TensorType.INT8, INT4: schema.TensorType.INT4, FLOAT32: schema.TensorType.FLOAT32}
    assert {name: held[name] for name in tensor_names(folded)} == {name: codes[plan.precision(name)] for name in tensor_names(folded)}
    assert likeness(file_logits(path, FEWER), torch_logits(model, FEWER)) > 0.98


@pytest.mark.parametrize(("kind", "ranged"), [("quaternion", False), ("quaternion student", False), ("low rank student", True)])
def test_static_files_of_thin_matrices(kind, ranged, tmp_path):
    """ONNX quantizes in ranges of calibration; so does TFLite, but for the products within a quaternion matrix, which no calibration sees."""
    folded = fold(encoder(kind), LONGEST)
    plan = plan_for(folded, INT8_STATIC)
    kinds = {node.op_type for node in onnx.load(write(folded, tmp_path / "m.onnx", plan)).graph.node}
    assert not {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"} & kinds
    model = read_tflite(write(folded, tmp_path / "m.tflite", plan))
    for name, linear in linears_by_name(folded).items():
        for graph in model.subgraphs:
            sources = [
                graph.tensors[operator.inputs[0]].type
                for kind, _, operator in operators(model, graph)
                if kind == "FULLY_CONNECTED" and graph.tensors[operator.inputs[1]].name.decode() == name
            ]
            quantized = ranged or not linear.quaternion
            if linear.activation in (None, "relu"):
                assert set(sources) == {schema.TensorType.INT8 if quantized else schema.TensorType.FLOAT32}, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_in_8_bits_alone(kind, tmp_path):
    """With every matrix in float32 nothing but the table's rounding is left; the ONNX file needs no operators of ONNX Runtime."""
    model = encoder(kind)
    folded = fold(model, LONGEST)
    plan = QuantPlan(INT8).only("embeddings.words")
    for format_ in FORMATS:
        got = file_logits(write(folded, tmp_path / f"m.{format_}", plan), FEWER)
        scales = np.abs(folded.words.rows).max(axis=1, keepdims=True) / 127
        rows = np.round(folded.words.rows / np.where(scales > 0, scales, 1)) * scales
        rounded = replace(folded, words=replace(folded.words, rows=rows.astype(np.float32)))
        assert np.abs(got - numpy_logits(rounded, FEWER)).max() < 1e-3
    assert {item.domain for item in onnx.load(tmp_path / "m.onnx").opset_import} == {""}


# --- size --------------------------------------------------------------------------------------------------------------


def least_bytes(model: FoldedEncoder, precision: str, format_: str, buckets: list[int]) -> float:
    """What has to be stored: every array of the model once, in its precision."""
    per_weight = {FLOAT32: 4, INT8: 1, INT8_STATIC: 1, INT4: 0.5}[precision]
    total = model.words.rows.size * (4 if precision == FLOAT32 else 1)
    total += sum(buckets) * model.positions.rows.shape[1] * 4 if format_ == "tflite" else model.positions.rows.nbytes
    if precision != FLOAT32:
        total += len(model.words.rows) * 4
    for linear in linears_by_name(model).values():
        total += linear.weight.size * per_weight + len(linear.weight) * 4
        if precision != FLOAT32:
            total += 4 * (linear.weight.size // BLOCK if precision == INT4 and format_ == "onnx" else len(linear.weight))
    norms = [norm for layer in model.layers for norm in (layer.attention_norm, layer.out_norm, *(ffn.norm for ffn in layer.ffns))]
    by_name = {norm.name: norm for norm in [*norms, model.embedding_norm] if norm is not None}
    return total + sum(norm.weight.nbytes + norm.bias.nbytes for norm in by_name.values())


@pytest.mark.parametrize("precision", [FLOAT32, *QUANTIZED])
@pytest.mark.parametrize("kind", [*BIG, *THIN])
@pytest.mark.parametrize("format_", FORMATS)
def test_every_constant_is_stored_once(kind, precision, format_, tmp_path):
    """Six layers that share one set of weights, or none, in two signatures: no constant twice, and next to nothing besides them."""
    folded, buckets = big_folded(kind), [16, BIG_LONGEST]
    path = write(folded, tmp_path / f"m.{format_}", big_plan(kind, precision), buckets)
    if format_ == "onnx":
        proto = onnx.load(path)
        assert len({item.name for item in proto.graph.initializer}) == len(proto.graph.initializer)
        constants = [item.raw_data for item in proto.graph.initializer]
    else:
        constants = contents(read_tflite(path))
    large = [content for content in constants if len(content) >= 64]
    assert len(set(large)) == len(large)
    if format_ == "tflite":
        assert len(set(constants)) == len(constants)
    unique = sum(map(len, set(constants)))
    assert path.stat().st_size <= 1.1 * unique
    assert unique <= 1.01 * least_bytes(folded, precision, format_, buckets), "a matrix is there in a second form"


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("precision", [FLOAT32, INT8, INT4])
def test_a_file_of_quaternions_is_smaller_by_three_quarters_of_its_matrices(precision, format_, tmp_path):
    dense, quaternion = (write(big_folded(k), tmp_path / f"{k}.{format_}", QuantPlan(precision), [LONGEST]) for k in ("dense", "quaternion"))
    weights = 3 * (4 * 256 * 256 + 2 * 256 * 1024)
    stored_weights = sum(linear.weight.size for name, linear in linears_by_name(big_folded("quaternion")).items() if name.startswith("layers."))
    assert stored_weights == weights / 4
    least = 0.75 * weights * {FLOAT32: 4, INT8: 1, INT4: 0.5}[precision]
    saved = dense.stat().st_size - quaternion.stat().st_size
    assert 0.97 * least < saved < (1.3 if (precision, format_) == (INT4, "onnx") else 1.03) * least, "4 bits save scales per block too"


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("part", "weights"), [("attention", 4 * 256 * 256), ("ffn", 2 * 256 * 1024)])
def test_a_shared_part_is_stored_once(part, weights, format_, tmp_path):
    apart, shared = (write(big_folded(k), tmp_path / f"{k}.{format_}", buckets=[16, BIG_LONGEST]) for k in ("dense", f"shared {part}"))
    assert 0.99 * 2 * 4 * weights < apart.stat().st_size - shared.stat().st_size < 1.01 * 2 * 4 * (weights + 1024)


@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_one_more_bucket_costs_less_than_two_per_cent(precision, tmp_path):
    folded = big_folded("student")
    three, four = (write(folded, tmp_path / f"{len(b)}.tflite", QuantPlan(precision), b) for b in ([8, 16, 32], [8, 16, 24, 32]))
    assert four.stat().st_size < 1.02 * three.stat().st_size


# --- old runtimes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "bert", "albert", "mobilebert", "mobilebert, all", "mobilebert, layer norm", "low rank", "empty student", "quaternion", "shared attention",
        "shared ffn student",
    ],
)  # fmt: skip
def test_a_file_for_old_runtimes_has_one_scale_per_tensor(kind, tmp_path):
    model = encoder(kind)
    folded, expected = fold(model, LONGEST), torch_logits(model, FEWER)
    path = write(folded, tmp_path / "old.tflite", QuantPlan(INT8), old_runtimes=True)
    file = read_tflite(path)
    for graph in file.subgraphs:
        seen = Counter()
        for name, version, operator in operators(file, graph):
            if name in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP"):
                seen[name] += 1
                assert version == 1
                weight = graph.tensors[operator.inputs[1]]
                if not weight.name.endswith(b"scales"):
                    assert weight.type == schema.TensorType.INT8
                for tensor in (graph.tensors[i] for i in (*operator.inputs, *operator.outputs) if i >= 0):
                    scales = None if tensor.quantization is None else tensor.quantization.scale
                    assert scales is None or np.size(scales) <= 1, tensor.name
        assert seen == {"FULLY_CONNECTED": sum(1 for _ in folded.linears()), "EMBEDDING_LOOKUP": 2}
    got = file_logits(path, FEWER)
    assert likeness(got, expected) > 0.99
    new = file_logits(write(folded, tmp_path / "new.tflite", QuantPlan(INT8)), FEWER)
    assert np.abs(got - new).max() < 0.05 * np.abs(expected).max(), "the same codes in another order of steps"


@pytest.mark.parametrize("kind", ["bert", "mobilebert"])
def test_a_file_for_litert_is_refused_by_runtimes_without_scales_per_channel(kind, tmp_path):
    folded = fold(encoder(kind), LONGEST)
    for precision in QUANTIZED:
        file = read_tflite(write(folded, tmp_path / "m.tflite", plan_for(folded, precision)))
        versions = {code.version for code in file.operatorCodes if code.builtinCode == schema.BuiltinOperator.FULLY_CONNECTED}
        assert min(versions) >= 12
    file = read_tflite(write(folded, tmp_path / "m.tflite"))
    assert {code.version for code in file.operatorCodes} == {1}, "a float32 file runs everywhere"


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [FLOAT32, INT8, INT4])
@pytest.mark.parametrize("format_", FORMATS)
def test_an_activation_without_operator_is_refused_by_name(format_, precision, tmp_path):
    folded = fold(encoder("bert", activation="silu"), LONGEST)
    path = tmp_path / f"m.{format_}"
    with pytest.raises(BadInput, match=r"^layers\.0\.ffns\.0\.up: .*'silu'"):
        write(folded, path, QuantPlan(precision))
    assert not path.exists()


def test_static_precision_for_old_runtimes_is_refused_by_name(tmp_path):
    folded = fold(encoder("mobilebert"), LONGEST)
    plan = plan_for(folded, INT8_STATIC)
    mixed = QuantPlan(INT8, ((r"layers\.2\.ffns\.1\.down", INT8_STATIC),), plan.ranges)
    for asked, name in ((plan, r"embeddings\.projection"), (mixed, r"layers\.2\.ffns\.1\.down")):
        with pytest.raises(BadInput, match=rf"^{name}: old TFLite runtimes have no int8-static"):
            write(folded, tmp_path / "m.tflite", asked, old_runtimes=True)
        assert not (tmp_path / "m.tflite").exists()


@pytest.mark.parametrize("format_", FORMATS)
def test_static_precision_without_its_range_is_refused_by_name(format_, tmp_path):
    with pytest.raises(BadInput, match=r"^layers\.0\.query_key_value: int8-static needs a range"):
        write(fold(encoder("bert"), LONGEST), tmp_path / f"m.{format_}", QuantPlan(INT8_STATIC))


# --- the same bytes ----------------------------------------------------------------------------------------------------

WRITE_AGAIN = """
import pickle, sys
from pathlib import Path
from exporters.onnx_writer import write_onnx
from exporters.tflite_writer import write_tflite
for name, (model, plan, buckets) in pickle.loads(Path(sys.argv[1]).read_bytes()).items():
    write_onnx(model, Path(sys.argv[2]) / f"{name}.onnx", plan)
    write_tflite(model, Path(sys.argv[2]) / f"{name}.tflite", buckets, plan)
"""


def test_the_same_model_gives_the_same_bytes(tmp_path):
    """In this process, and in others that order sets of strings in other ways."""
    jobs = {}
    for kind in ("bert", "albert", "mobilebert, all", "shared student", "mobilebert, layer norm"):
        for precision in (FLOAT32, INT8_STATIC):
            folded = fold(encoder(kind), LONGEST)
            jobs[f"{kind} {precision}"] = (folded, plan_for(folded, precision), BUCKETS)
    for name, (folded, plan, buckets) in jobs.items():
        for format_ in FORMATS:
            first = write(folded, tmp_path / f"{name}.{format_}", plan, buckets).read_bytes()
            assert write(folded, tmp_path / "again" / f"{name}.{format_}", plan, buckets).read_bytes() == first
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run([sys.executable, "-c", WRITE_AGAIN, str(tmp_path / "jobs"), str(tmp_path / seed)], check=True, env=environment)
        for name in jobs:
            for format_ in FORMATS:
                assert (tmp_path / seed / f"{name}.{format_}").read_bytes() == (tmp_path / f"{name}.{format_}").read_bytes(), name


# --- finding what is wrong ---------------------------------------------------------------------------------------------


def altered(model: FoldedEncoder, name: str, by: float = 1.5) -> FoldedEncoder:
    """A copy of ``model`` in which one row of the matrix ``name`` is multiplied, one that ReLU lets through for some text."""
    model = pickle.loads(pickle.dumps(model))
    linear = linears_by_name(model)[name]
    at_work: list[np.ndarray] = []
    forward(model, NumpySteps(inputs([LISTS[-1]]), lambda seen, x, y, starts: at_work.append(np.abs(y).min(axis=0)) if seen == name else None))
    linear.weight[int(at_work[0].argmax())] *= by
    return model


def watched_results(path: Path, ids: list) -> dict[str, np.ndarray]:
    """Results by the name of the matrix."""
    if path.suffix == ".tflite":
        return run_tflite(path, ids)
    return {name.removesuffix(WATCHED): value for name, value in run_onnx(path, [ids]).items()}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_watched_files_show_the_result_of_every_matrix(kind, format_, tmp_path):
    folded = fold(encoder(kind), LONGEST)
    ids = LISTS[-1]
    path = write(folded, tmp_path / f"m.{format_}", buckets=[LONGEST], watch=True)
    got = watched_results(path, ids)
    expected: dict[str, np.ndarray] = {}
    result = forward(folded, NumpySteps(inputs([ids]), lambda name, x, y, starts: expected.__setitem__(name, y)))
    assert set(got) == {"logits", *linears_by_name(folded)}
    assert np.abs(got["logits"] - result["logits"]).max() < 1e-4
    for name, value in expected.items():
        found = got[name].reshape(-1, value.shape[1])[: len(value)]
        assert np.abs(found - value).max() < TOLERANCE * max(1.0, np.abs(value).max()), name


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("bert", "layers.0.query_key_value"), ("bert", "layers.1.ffns.0.down"), ("mobilebert", "embeddings.projection"), ("mobilebert", "layers.2.out")],
)
def test_a_watched_file_with_a_changed_weight_differs_first_at_that_matrix(kind, name, format_, tmp_path):
    folded = fold(encoder(kind), LONGEST)
    ids = LISTS[-1]
    got = watched_results(write(altered(folded, name), tmp_path / f"m.{format_}", buckets=[LONGEST], watch=True), ids)
    seen: dict[str, np.ndarray] = {}
    forward(folded, NumpySteps(inputs([ids]), lambda name, x, y, starts: seen.__setitem__(name, y)))
    wrong = [n for n, y in seen.items() if np.abs(got[n].reshape(-1, y.shape[1])[: len(y)] - y).max() > TOLERANCE * max(1.0, np.abs(y).max())]
    assert wrong[0] == name


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    "kind",
    [
        "bert", "albert", "mobilebert", "mobilebert, all, layer norm", "unequal student", "shared student", "low rank", "empty student", "quaternion",
        "shared attention student",
    ],
)  # fmt: skip
def test_the_first_wrong_tensor_is_named(kind, format_, tmp_path):
    folded = fold(encoder(kind), LONGEST)
    for ids in (LISTS[0], LISTS[-1]):
        assert first_wrong_tensor(folded, tmp_path / f"m.{format_}", *inputs([ids]), BUCKETS) is None
    for name in (list(linears_by_name(folded))[1], "classifier"):
        broken = altered(folded, name, float("nan"))
        assert first_wrong_tensor(broken, tmp_path / f"m.{format_}", *inputs([LISTS[-1]]), BUCKETS) == name


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_fold_has_no_wrong_tensor(kind):
    model = encoder(kind)
    folded = fold(model, LONGEST)
    for ids in (LISTS[0], LISTS[-1]):
        assert first_wrong_fold(model, folded, *inputs([ids])) is None


@pytest.mark.parametrize(
    "kind",
    [
        "bert", "electra", "mobilebert", "mobilebert, narrow", "mobilebert, all, layer norm", "shared student", "low rank", "low rank student",
        "empty parts", "empty student, all", "quaternion", "shared ffn of quaternions", "shared attention student", "shared ffn",
    ],
)  # fmt: skip
def test_the_first_wrong_fold_is_named(kind):
    model = encoder(kind)
    folded = fold(model, LONGEST)
    names = list(linears_by_name(folded))
    compared = [n for n in names if re.search(r"(pooler|classifier|\.up|\.up\.inner|\.(query|key|value)[^.]*(\.inner)?)$", n)]
    for name in compared:
        parts = next((read.parts for layer in folded.layers for read in layer.reads if read.linear.name == name), ())
        if {"inner", "shared"} & {part for part, _ in parts}:
            continue  # the row that changes may be one of a bottleneck, which shows later
        assert first_wrong_fold(model, altered(folded, name, -2), *inputs([LISTS[-1]])) == name
    if not folded.shares:
        for name in (name for name in names if name.endswith((".output", ".down"))):  # shows in the next that is compared
            expected = next(n for n in names[names.index(name) + 1 :] if n in compared)
            assert first_wrong_fold(model, altered(folded, name, -2), *inputs([LISTS[-1]])) == expected
