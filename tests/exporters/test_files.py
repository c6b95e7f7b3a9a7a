"""Exported files: same function, right shape for their consumers, small, and without what should be gone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporters.onnx_file import IR_VERSION, OPSET, export_onnx
from exporters.parity import check_parity, torch_logits
from exporters.tflite_file import export_tflite
from pipeline.checkpoint import Checkpoint
from pipeline.methods.distill.mobilebert import DistillMobilebert, make_student
from runtimes.backends import OnnxModel, load_model
from runtimes.errors import GateFailed

STATISTICS = {"ReduceMean", "Sqrt", "LayerNormalization", "Pow", "Div"}
SHAPE = {"layers": 2, "hidden_size": 32, "bottleneck_size": 16, "heads": 2, "ffn_size": 32, "embedding_size": 16}


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return Checkpoint.load(tiny_model, ["on", "off", "music"])


def student(teacher, **changes):
    torch.manual_seed(0)
    return make_student(DistillMobilebert(**SHAPE | changes), teacher.model, 16).eval()


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def id_lists(count=24):
    generator = np.random.default_rng(0)
    return [[2, *generator.integers(5, 80, generator.integers(1, 14)).tolist(), 3] for _ in range(count)]


def test_no_norm_leaves_no_statistics_in_the_graph(teacher, tmp_path):
    export_onnx(student(teacher, norm="no_norm"), tmp_path / "no_norm.onnx")
    export_onnx(student(teacher, norm="layer_norm"), tmp_path / "layer_norm.onnx")
    assert not STATISTICS & set(operators(tmp_path / "no_norm.onnx"))
    assert STATISTICS & set(operators(tmp_path / "layer_norm.onnx"))


@pytest.mark.parametrize("kind", ["bert", "no_norm"])
def test_layers_do_not_ask_for_sizes_at_run_time(teacher, tmp_path, kind):
    export_onnx(teacher.model if kind == "bert" else student(teacher), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    constant = {item.name for item in graph.initializer}
    reshapes = [node for node in graph.node if node.op_type == "Reshape" and "/attention/" in node.name]
    assert len(reshapes) == 2 * 4
    assert all(node.input[1] in constant for node in reshapes)


def test_the_onnx_file_is_what_old_and_new_consumers_read(teacher, tmp_path):
    export_onnx(teacher.model, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx")
    assert (graph.opset_import[0].version, graph.ir_version) == (OPSET, IR_VERSION)
    onnx.checker.check_model(graph)
    inputs = {i.name: i.type.tensor_type for i in graph.graph.input}
    assert list(inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    for tensor in inputs.values():
        assert tensor.elem_type == onnx.TensorProto.INT64
        assert [d.dim_param for d in tensor.shape.dim] == ["batch_size", "sequence_length"]
    assert [o.name for o in graph.graph.output] == ["logits"]
    assert "/" not in "".join(node.doc_string for node in graph.graph.node)


@pytest.mark.parametrize("kind", ["bert", "no_norm", "layer_norm"])
def test_both_files_compute_the_model(teacher, tmp_path, kind):
    model = teacher.model if kind == "bert" else student(teacher, norm=kind)
    export_onnx(model, tmp_path / "m.onnx")
    export_tflite(model, tmp_path / "m.tflite", [8, 16])
    lists = id_lists()
    expected = torch_logits(model, lists)
    for name in ("m.onnx", "m.tflite"):
        assert check_parity(expected, tmp_path / name, lists).worst < 1e-4


def test_parity_refuses_another_function(teacher, tmp_path):
    model = student(teacher)
    export_onnx(model, tmp_path / "m.onnx")
    lists = id_lists()
    expected = torch_logits(model, lists)
    expected[7, 1] += 0.5
    with pytest.raises(GateFailed, match=r"m\.onnx: run alone, text 7 of 24 .* differs from the torch model by 0\.5"):
        check_parity(expected, tmp_path / "m.onnx", lists)


def test_parity_sees_padding(teacher, tmp_path, monkeypatch):
    """A file that ignores its mask passes text by text and fails in padded batches."""
    model = student(teacher)
    export_onnx(model, tmp_path / "m.onnx")
    lists = id_lists()
    plain = OnnxModel.batch_logits

    def unmasked(self, texts, pad_id=5):
        width = max(map(len, texts))
        return plain(self, [list(t) + [pad_id] * (width - len(t)) for t in texts])

    monkeypatch.setattr(OnnxModel, "batch_logits", unmasked)
    with pytest.raises(GateFailed, match="in padded batches"):
        check_parity(torch_logits(model, lists), tmp_path / "m.onnx", lists)


def test_buckets_share_one_set_of_weights(teacher, tmp_path):
    model = student(teacher, hidden_size=128, bottleneck_size=64, ffn_size=256)
    export_tflite(model, tmp_path / "one.tflite", [16])
    export_tflite(model, tmp_path / "three.tflite", [4, 8, 16])
    one, three = ((tmp_path / f"{name}.tflite").stat().st_size for name in ("one", "three"))
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert three - one < 0.3 * weights, "two more buckets would add two more sets of weights"


def test_tflite_inputs_are_int32_by_name(teacher, tmp_path):
    export_tflite(teacher.model, tmp_path / "m.tflite", [8])
    inputs, outputs = load_model(tmp_path / "m.tflite").tensors()
    assert {i["name"]: i["dtype"] for i in inputs} == dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), "int32")
    assert [(o["name"], o["dtype"]) for o in outputs] == [("logits", "float32")]


def test_the_same_model_gives_the_same_bytes(teacher, tmp_path):
    for name in ("a", "b"):
        export_onnx(student(teacher), tmp_path / f"{name}.onnx")
        export_tflite(student(teacher), tmp_path / f"{name}.tflite", [8])
    for suffix in ("onnx", "tflite"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_int8_files_hold_their_weights_in_eight_bits(teacher, tmp_path):
    from exporters.int8 import quantize_onnx, quantize_tflite

    model = student(teacher, hidden_size=128, bottleneck_size=64, ffn_size=256, embedding_size=64)
    export_onnx(model, tmp_path / "m.onnx")
    export_tflite(model, tmp_path / "m.tflite", [16])
    quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx")
    quantize_tflite(tmp_path / "m.tflite", tmp_path / "q.tflite")
    graph = onnx.load(tmp_path / "q.onnx").graph
    assert not {"Gemm"} & set(operators(tmp_path / "q.onnx"))
    fp32 = sum(np.prod(t.dims) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert fp32 < 0.1 * sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() for p in model.parameters())
    for name in ("q.onnx", "q.tflite"):
        assert (tmp_path / name).stat().st_size < 1.0 * weights + 120_000, name
    lists = id_lists()
    expected = torch_logits(model, lists)
    for name in ("q.onnx", "q.tflite"):
        got = np.stack([load_model(tmp_path / name).logits(ids) for ids in lists])
        assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max(), name


def test_stock_optimum_and_transformers_load_the_bundle(tiny_run):
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoConfig, AutoTokenizer, pipeline

    bundle = tiny_run / "bundle"
    assert AutoConfig.from_pretrained(bundle).model_type == "mobilebert"
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    from runtimes.classifier import Classifier

    for file in ("model.onnx", "model_quantized.onnx"):
        model = ORTModelForSequenceClassification.from_pretrained(bundle, subfolder="onnx", file_name=file)
        answer = pipeline("text-classification", model=model, tokenizer=tokenizer)("turn on the light")[0]
        ours = Classifier(bundle, f"onnx/{file}").predict("turn on the light")
        assert answer["label"] == ours.label
        assert answer["score"] == pytest.approx(ours.probability, abs=1e-4)


def test_compacting_changes_no_answer_and_lets_signatures_share(teacher, tmp_path):
    import shutil

    from ai_edge_quantizer import quantizer, recipe

    from exporters.tflite_compact import compact

    model = student(teacher, hidden_size=64, bottleneck_size=32, ffn_size=64)
    sizes = {}
    for name, buckets in (("one", [16]), ("three", [4, 8, 16])):
        export_tflite(model, tmp_path / "m.tflite", buckets)
        job = quantizer.Quantizer(str(tmp_path / "m.tflite"))
        job.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        plain, made = tmp_path / f"{name}_plain.tflite", tmp_path / f"{name}.tflite"
        job.quantize().export_model(str(plain), overwrite=True)
        shutil.copyfile(plain, made)
        compact(made)
        sizes[name] = (plain.stat().st_size, made.stat().st_size)
        before, after = load_model(plain), load_model(made)
        for ids in id_lists():
            assert np.array_equal(before.logits(ids), after.logits(ids))
    assert sizes["three"][1] < sizes["three"][0]
    growth = [sizes["three"][i] - sizes["one"][i] for i in (0, 1)]
    assert growth[1] < 0.9 * growth[0], "two more buckets cost less than they did"
