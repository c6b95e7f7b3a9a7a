"""Heads of every task: one result a text or a token, pooled and normalised vectors, pairs; NumPy, ONNX and TFLite against torch."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from exporters.calibration import calibrate, smooth
from exporters.folding import fold
from exporters.forward import NumpySteps, forward
from exporters.graph import FoldedEncoder
from exporters.onnx_writer import write_onnx
from exporters.parity import check_parity, first_wrong_fold, first_wrong_tensor, torch_results
from exporters.quant_plan import FLOAT32, INT4, INT8, INT8_STATIC, QuantPlan, tensor_names
from exporters.tflite_writer import write_tflite
from pipeline.models.config import head_shape
from pipeline.models.encoder import Encoder
from runtimes.backends import OnnxModel, load_model
from runtimes.errors import BadInput, GateFailed
from runtimes.text import Encoding
from tests.exporters.encoders import HEADS, KINDS, LABELS, LONGEST, TAGS, encoder, texts
from tests.exporters.results import file_results, inputs, joined, numpy_results

FORMATS = ("onnx", "tflite")
BUCKETS = [5, 12, LONGEST]
PER_TOKEN = ("tags", "intent and slots", "span")
MEANS = ("mean", "narrow mean")
VECTORS = (*MEANS, "first vector")
STRUCTURES = (
    "bert", "albert", "electra", "mobilebert", "mobilebert, all, layer norm", "unequal student", "no norm after the sum", "low rank student",
    "empty parts", "quaternion student", "shared attention student, all", "shared ffn", "nothing but norms",
)  # fmt: skip
EACH = (*(("bert", heads) for heads in HEADS), *((kind, heads) for kind in STRUCTURES[1:] for heads in ("intent and slots", "span", "mean")))
"""Every head, and every structure under a head of each kind."""
LISTS = texts(30, (1, 2, 4, 5, 6, 12, 13, LONGEST))
SHAPES = {
    "logits": {"tags": ["N", TAGS]}, "slot_logits": {"intent and slots": ["N", TAGS]}, "start_logits": {"span": ["N"]}, "end_logits": {"span": ["N"]},
    "sentence_embedding": {"narrow mean": [12]},
}  # fmt: skip
"""Of outputs by head, without the axis of texts; where nothing is said, that of a text's classes or of the feature map."""


@cache
def with_heads(kind: str, heads: str) -> Encoder:
    return encoder(kind, heads=HEADS[heads])


def shape_of(name: str, heads: str) -> list:
    usual = {"logits": [LABELS], "slot_logits": [TAGS], "sentence_embedding": [32]}
    return SHAPES[name][heads] if heads in SHAPES[name] else usual[name]


def output_names(heads: str) -> list[str]:
    return [name for head in HEADS[heads] for name in head["outputs"]]


def write(model: FoldedEncoder, path: Path, precision: str = FLOAT32, calibrated: list[Encoding] | None = None, **options) -> Path:
    plan = QuantPlan(precision, (), calibrate(model, calibrated).ranges if precision == INT8_STATIC else {})
    if path.suffix == ".onnx":
        write_onnx(model, path, plan, **options)
    else:
        write_tflite(model, path, BUCKETS, plan, **options)
    return path


def worst(got: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> float:
    """Largest |difference| in any output; names and shapes must be the same."""
    for mine, wanted in zip(got, expected, strict=True):
        assert {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in wanted.items()}
    return max(float(np.abs(mine[name] - value).max()) for mine, wanted in zip(got, expected, strict=True) for name, value in wanted.items())


def likeness(got: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> float:
    """Least correlation of an output over texts and tokens; what all have in common counts for nothing."""
    found = []
    for name in expected[0]:
        mine, wanted = joined(got, name), joined(expected, name)
        found.append(np.corrcoef((mine - mine.mean(axis=0)).ravel(), (wanted - wanted.mean(axis=0)).ravel())[0, 1])
    return float(min(found))


# --- the same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "heads"), [*EACH, *((kind, "intent and slots") for kind in KINDS if kind not in STRUCTURES)])
def test_a_folded_encoder_is_the_torch_module(kind, heads):
    model = with_heads(kind, heads)
    for segments in (1, 2):
        pairs = inputs(LISTS, segments)
        folded = fold(model, LONGEST, segments)
        got = numpy_results(folded, pairs)
        assert list(got[0]) == output_names(heads)
        assert worst(got, torch_results(model, pairs)) < 1e-4
        for alone in pairs[:3]:
            assert worst(numpy_results(folded, [alone]), torch_results(model, [alone])) < 1e-4


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize(("kind", "heads"), EACH)
def test_both_files_compute_the_model(kind, heads, segments, tmp_path):
    """Alone, in padded batches (ONNX), and padded to buckets (TFLite)."""
    model, pairs = with_heads(kind, heads), inputs(LISTS, segments)
    folded, expected = fold(model, LONGEST, segments), torch_results(model, pairs)
    for format_ in FORMATS:
        assert check_parity(expected, write(folded, tmp_path / f"m.{format_}"), pairs).worst < 2e-5


@pytest.mark.parametrize("kind", ["bert", "no norm after the sum"])
@pytest.mark.parametrize("heads", HEADS)
def test_token_types_matter_and_reach_every_head(kind, heads, tmp_path):
    model, plain, pairs = with_heads(kind, heads), inputs(LISTS), inputs(LISTS, 2)
    folded = fold(model, LONGEST, segments=2)
    assert folded.segments == 2
    for format_ in FORMATS:
        path = write(folded, tmp_path / f"m.{format_}")
        assert worst(file_results(path, pairs), file_results(path, plain)) > 0.01
        names = {item["name"] for item in load_model(path).tensors()[0]}
        assert names == {"input_ids", "attention_mask", "token_type_ids"}
    file = schema.ModelT.InitFromPackedBuf((tmp_path / "m.tflite").read_bytes())
    for signature, graph in zip(file.signatureDefs, file.subgraphs, strict=True):
        assert [entry.name for entry in signature.inputs] == [b"attention_mask", b"input_ids", b"token_type_ids"]
        assert [entry.tensorIndex for entry in signature.inputs] == list(graph.inputs)
        assert [entry.name.decode() for entry in signature.outputs] == sorted(output_names(heads))
        assert [entry.tensorIndex for entry in signature.outputs] == list(graph.outputs)


@pytest.mark.parametrize("precision", [INT8, INT8_STATIC, INT4])
@pytest.mark.parametrize(("kind", "heads"), EACH)
def test_quantized_files_stay_near_the_model(kind, heads, precision, tmp_path):
    model, pairs = with_heads(kind, heads), inputs(LISTS, 2)
    folded, expected = fold(model, LONGEST, segments=2), torch_results(model, pairs)
    least = {INT8: 0.985, INT8_STATIC: 0.975, INT4: 0.75}[precision]
    if precision == INT4 and "low rank" in kind:
        least = 0.6  # rounded twice
    for format_ in FORMATS:
        got = file_results(write(folded, tmp_path / f"q.{format_}", precision, pairs), pairs)
        assert likeness(got, expected) > least, format_


# --- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("precision", [FLOAT32, INT8_STATIC])
def test_padding_has_no_weight_in_an_onnx_file(heads, precision, tmp_path):
    """Whatever it holds, and however much of it there is; int8-static has no range that would depend on it."""
    folded, pairs = fold(with_heads("bert", heads), LONGEST, segments=2), inputs(LISTS, 2)
    model = OnnxModel(write(folded, tmp_path / "m.onnx", precision, pairs))
    alone = [model.run(pair.ids, pair.types) for pair in pairs]
    within = 1e-5 if precision == FLOAT32 else 0.05  # a sum in another order may tip a code
    for pad_id in (0, 50):
        assert worst(model.run_batch(pairs, pad_id), alone) < within


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["bert", "mobilebert, all"])
def test_padding_has_no_weight_in_a_tflite_file(kind, heads, tmp_path):
    folded = fold(with_heads(kind, heads), LONGEST)
    path = write(folded, tmp_path / "m.tflite")
    ids = LISTS[2][:4]
    got = []
    for bucket in BUCKETS:
        runner = Interpreter(model_path=str(path)).get_signature_runner(f"serving_{bucket}")
        for filler in (0, 50):
            padded = np.array([ids + [filler] * (bucket - len(ids))], np.int32)
            mask = np.array([[1] * len(ids) + [0] * (bucket - len(ids))], np.int32)
            if filler and folded.trigram:
                continue  # a trigram reads one token beyond the text, which has to be padding
            results = runner(input_ids=padded, attention_mask=mask)
            got.append({name: value[0, : len(ids)] if shape_of(name, heads)[0] == "N" else value[0] for name, value in results.items()})
    expected = numpy_results(folded, inputs([ids]))
    assert len(got) >= 3
    for one in got:
        assert worst([one], expected) < 2e-5


@pytest.mark.parametrize("precision", [INT8, INT8_STATIC, INT4])
@pytest.mark.parametrize("heads", VECTORS)
def test_vectors_of_quantized_files_have_length_1(heads, precision, tmp_path):
    """Mean and normalisation are computed in float32."""
    folded, plain = fold(with_heads("bert", heads), LONGEST), inputs(LISTS)
    for format_ in FORMATS:
        path = write(folded, tmp_path / f"q.{format_}", precision, plain)
        for result in file_results(path, plain):
            assert abs(float(np.linalg.norm(result["sentence_embedding"])) - 1) < 1e-5
    nodes = {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert "ReduceL2" in nodes and ("ReduceSum" in nodes) == (heads in MEANS)


@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_a_vector_without_length_stays_0(precision, tmp_path):
    model = encoder("bert", heads=HEADS["narrow mean"])
    for parameter in model.heads["embedding"].parameters():
        parameter.data.zero_()
    folded = fold(model, LONGEST)
    assert not np.any(forward(folded, NumpySteps(inputs(LISTS)))["sentence_embedding"])
    for format_ in FORMATS:
        path = write(folded, tmp_path / f"m.{format_}", precision)
        assert not any(np.any(result["sentence_embedding"]) for result in file_results(path, inputs(LISTS)[:5]))


# --- the structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
def test_the_last_layer_computes_what_is_read(heads, tmp_path):
    """The first token alone where all heads read it; else queries, keys and values stay one product, and QAttention one operator."""
    folded = fold(with_heads("bert", heads), LONGEST)
    first_only = heads in ("first vector", "two of a text")
    assert folded.first_only == first_only
    assert [layer.first_only for layer in folded.layers] == [False, False, first_only]
    assert len(folded.layers[-1].reads) == (2 if first_only else 1)
    kinds = Counter(node.op_type for node in onnx.load(write(folded, tmp_path / "m.onnx", INT8)).graph.node)
    assert (kinds["QAttention"], kinds["MultiHeadAttention"]) == ((2, 1) if first_only else (3, 0))


@pytest.mark.parametrize("heads", HEADS)
def test_work_is_counted_once_a_text_or_once_a_token(heads):
    folded, tokens = fold(with_heads("bert", heads), LONGEST), 11
    layer = 4 * 32 * 32 * tokens + 2 * 32 * 40 * tokens + 2 * tokens * tokens * 32
    first = (2 * tokens + 2) * 32 * 32 + 2 * 32 * 40 + 2 * tokens * 32
    after = {
        "tags": 32 * TAGS * tokens, "intent and slots": 32 * 32 + 32 * LABELS + 32 * TAGS * tokens, "span": 32 * 2 * tokens, "mean": 0,
        "narrow mean": 32 * 12, "first vector": 0, "two of a text": 32 * 32 + 32 * LABELS + 32 * TAGS,
    }  # fmt: skip
    assert folded.multiply_adds(tokens) == 2 * layer + (first if folded.first_only else layer) + after[heads]


def test_two_heads_share_the_pooler(tmp_path):
    folded = fold(with_heads("bert", "two of a text"), LONGEST)
    assert tensor_names(folded)[-3:] == ["pooler", "classifier", "slots"] and not folded.shares
    assert sum(node.op_type == "Tanh" for node in onnx.load(write(folded, tmp_path / "m.onnx")).graph.node) == 1


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("precision", [FLOAT32, INT8])
def test_files_declare_their_outputs(heads, precision, tmp_path):
    folded = fold(with_heads("bert", heads), LONGEST)
    proto = onnx.load(write(folded, tmp_path / "m.onnx", precision))
    onnx.checker.check_model(proto, full_check=precision == FLOAT32)
    shapes = {item.name: [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim] for item in proto.graph.output}
    wanted = {name: ["sequence_length" if size == "N" else size for size in shape_of(name, heads)] for name in output_names(heads)}
    assert shapes == {name: ["batch_size", *shape] for name, shape in wanted.items()}
    got = OnnxModel(tmp_path / "m.onnx").run(LISTS[7])
    assert {name: list(value.shape) for name, value in got.items()} == {
        name: [LONGEST if size == "N" else size for size in shape_of(name, heads)] for name in output_names(heads)
    }  # fmt: skip
    used = {name for node in proto.graph.node for name in node.input}
    assert {name for node in proto.graph.node for name in node.output} - set(shapes) <= used | {""}, "results that nobody reads"
    interpreter = Interpreter(model_path=str(write(folded, tmp_path / "m.tflite", precision)))
    for bucket in BUCKETS:
        details = interpreter.get_signature_runner(f"serving_{bucket}").get_output_details()
        assert {name: [int(size) for size in detail["shape"]] for name, detail in details.items()} == {
            name: [1, *(bucket if size == "N" else size for size in shape_of(name, heads))] for name in output_names(heads)
        }  # fmt: skip


def test_several_outputs_of_a_whole_text_are_refused():
    model = encoder("bert", heads=[head_shape("span", ["start_logits", "end_logits"], "first", 2)])
    with pytest.raises(ValueError, match=r"^head span: several outputs are for heads that read all tokens"):
        fold(model, LONGEST)


# --- probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("heads", ["tags", "intent and slots"])
def test_probabilities_of_texts_and_tokens(heads, activation, tmp_path):
    model, pairs = with_heads("bert", heads), inputs(LISTS, 2)
    folded, expected = fold(model, LONGEST, 2, activation), torch_results(model, pairs, activation)
    logits = torch_results(model, pairs)
    for name, value in logits[5].items():
        by_hand = torch.sigmoid(torch.tensor(value)) if activation == "sigmoid" else torch.softmax(torch.tensor(value), dim=-1)
        assert np.allclose(expected[5][name.replace("logits", "probabilities")], by_hand, atol=1e-6)
    assert set(expected[0]) == {"tags": {"probabilities"}, "intent and slots": {"probabilities", "slot_probabilities"}}[heads]
    assert worst(numpy_results(folded, pairs), expected) < 1e-5
    for format_ in FORMATS:
        check_parity(expected, write(folded, tmp_path / f"m.{format_}"), pairs)
        assert worst(file_results(write(folded, tmp_path / f"q.{format_}", INT8), pairs), expected) < 0.25


@pytest.mark.parametrize(
    ("heads", "activation", "named"),
    [("span", "softmax", "start_logits"), ("mean", "sigmoid", "sentence_embedding"), ("tags", "none", "'none'")],
)  # fmt: skip
def test_what_has_no_probabilities_is_refused(heads, activation, named):
    with pytest.raises(BadInput, match=named):
        fold(with_heads("bert", heads), LONGEST, activation=activation)


# --- calibration, and finding what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["bert", "unequal student", "low rank student, all", "no norm after the sum", "quaternion student"])
def test_smoothing_leaves_the_function_and_calibration_sees_every_matrix(kind, heads):
    model, pairs = with_heads(kind, heads), inputs(LISTS, 2)
    folded = fold(model, LONGEST, segments=2)
    seen = calibrate(folded, pairs)
    assert set(seen.ranges) == {linear.name for linear, _ in folded.linears()}
    even = smooth(folded, seen.channels, 0.7)
    assert worst(numpy_results(even, pairs), torch_results(model, pairs)) < 2e-4
    if kind == "unequal student":
        before, after = (np.concatenate([head.linear.weight.ravel() for head in m.heads if head.linear is not None] or [[]]) for m in (folded, even))
        moved = not np.array_equal(before, after)
        assert moved == (heads not in ("mean", "first vector")), "a feature map that is itself a result has no free scale"


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("heads", HEADS)
def test_files_and_folds_that_are_right_have_no_wrong_tensor(heads, format_, tmp_path):
    model = with_heads("mobilebert", heads)
    folded = fold(model, LONGEST, segments=2)
    for pair in (inputs(LISTS, 2)[0], inputs(LISTS, 2)[7]):
        assert first_wrong_tensor(folded, tmp_path / f"m.{format_}", pair, BUCKETS) is None
        assert first_wrong_fold(model, folded, pair) is None


@pytest.mark.parametrize("heads", [heads for heads in HEADS if heads not in ("mean", "first vector")])
def test_a_wrong_head_is_named(heads, tmp_path):
    model = encoder("bert", heads=HEADS[heads])
    folded = fold(model, LONGEST)
    text = inputs(LISTS)[7]
    changed = HEADS[heads][-1]["name"]
    model.heads[changed].weight.data[0] *= -2
    assert first_wrong_fold(model, folded, text) == changed
    path, expected = write(folded, tmp_path / "m.onnx"), torch_results(model, inputs(LISTS))
    with pytest.raises(GateFailed, match=rf"^m\.onnx: run alone, text \d+ of 30 .* in {HEADS[heads][-1]['outputs'][0]}, at most"):
        check_parity(expected, path, inputs(LISTS))


def test_a_file_with_other_outputs_is_refused(tmp_path):
    path = write(fold(with_heads("bert", "tags"), LONGEST), tmp_path / "m.onnx")
    with pytest.raises(GateFailed, match=r"^m\.onnx: its outputs are logits; those of the torch model are end_logits, start_logits"):
        check_parity(torch_results(with_heads("bert", "span"), inputs(LISTS)), path, inputs(LISTS))
