"""Bundles of every kind of task: golden cases reach the corners, and a reader finds what the writer put in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.bundle import BundleParts, ModelFile, in_order_of_preference, write_bundle
from exporters.folding import fold
from exporters.golden import CORNERS, REAL_EXAMPLES, golden_examples, golden_tolerance, largest_value
from exporters.onnx_writer import write_onnx
from exporters.quant_plan import FLOAT32, INT8, QuantPlan
from exporters.tflite_writer import write_tflite
from pipeline.models.config import head_shape
from runtimes.bundle import open_bundle
from runtimes.decode import decoder
from runtimes.decode.base import Decoder
from runtimes.errors import BadInput
from runtimes.predictor import Predictor
from runtimes.text import TextEncoder
from runtimes.verify import verify
from tests.exporters.encoders import encoder

LONGEST, BUCKETS, VOCABULARY = 32, [12, 32], 79
SENTENCES = ["turn on the light", "play some music please", "the lamp in the kitchen is off now", "stop", "put my lights on in the bedroom please"]
CLASSES, TAGS = ["on", "off", "music"], ["O", "B-thing", "I-thing", "B-place"]
PAIR = ("text", "text_pair")
KINDS: dict[str, tuple[dict[str, Any], dict[str, list[str]], list[dict[str, Any]]]] = {
    "text-classification": (
        {"columns": ["text"], "decode": "softmax", "multi_label": False}, {"logits": CLASSES},
        [head_shape("classifier", ["logits"], "first", 3, pooler=True)],
    ),
    "text-regression": (
        {"columns": list(PAIR), "decode": "none"}, {}, [head_shape("classifier", ["logits"], "first", 1, pooler=True)],
    ),
    "token-classification": ({"columns": ["text"], "decode": "softmax"}, {"logits": TAGS}, [head_shape("classifier", ["logits"], "all", 4)]),
    "intent-and-slots": (
        {"columns": ["text"], "decode": "softmax", "multi_label": False}, {"logits": CLASSES, "slot_logits": TAGS},
        [head_shape("classifier", ["logits"], "first", 3, pooler=True), head_shape("slots", ["slot_logits"], "all", 4)],
    ),
    "question-answering": (
        {"columns": ["question", "context"], "decode": "softmax", "stride": 4, "longest_answer": 8, "no_answer": True, "null_threshold": 0.0}, {},
        [head_shape("span", ["start_logits", "end_logits"], "all", 2)],
    ),
    "sentence-embedding": (
        {"columns": list(PAIR), "decode": "none"}, {}, [head_shape("embedding", ["sentence_embedding"], "mean", None, normalized=True)],
    ),
}  # fmt: skip
"""Options of the decoder, names of classes, heads."""
PAIRED = ("text-regression", "question-answering")


def options_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, "segments": 2 if kind in PAIRED else 1} | KINDS[kind][0]


def decoder_of(kind: str) -> Decoder:
    return decoder(kind)(options_of(kind), KINDS[kind][1])


def examples_of(kind: str) -> list[dict[str, str]]:
    texts = [f"{a} {b}" for a in SENTENCES for b in SENTENCES]
    if kind == "question-answering":
        return [{"question": SENTENCES[i % 5], "context": " ".join(texts[i : i + 1 + i % 9])} for i in range(20)]
    columns = KINDS[kind][0]["columns"]
    return [{column: texts[(i + shift) % len(texts)] for shift, column in enumerate(columns)} for i in range(20)]


@pytest.fixture(scope="module")
def text_encoder(tiny_model) -> TextEncoder:
    return TextEncoder(tiny_model / "tokenizer.json", LONGEST)


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def bundle(kind, tiny_model, tmp_path_factory) -> Path:
    options, labels, heads = options_of(kind), KINDS[kind][1], KINDS[kind][2]
    folder = tmp_path_factory.mktemp("bundle")
    folded = fold(encoder("bert", heads=heads, vocab_size=VOCABULARY, max_position_embeddings=LONGEST), LONGEST, options["segments"])
    models = []
    for name, precision in (
        ("onnx/model.onnx", FLOAT32), ("onnx/model_quantized.onnx", INT8), ("tflite/model_fp32.tflite", FLOAT32), ("tflite/model_int8.tflite", INT8),
    ):  # fmt: skip
        path = folder / "files" / name
        if path.suffix == ".onnx":
            write_onnx(folded, path, QuantPlan(precision))
        else:
            write_tflite(folded, path, BUCKETS, QuantPlan(precision))
        models.append(ModelFile(name, path, precision, 1, {}))
    (folder / "bundle").mkdir()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
    write_bundle(folder / "bundle", BundleParts(
        name=kind, version="0", task=options, decoder=decoder_of(kind), models=models, labels=labels, tokenizer_folder=folder / "tokenizer",
        pad_id=0, max_length=LONGEST, hub_config={}, recipe_lock="", examples=examples_of(kind), provenance={},
    ))  # fmt: skip
    return folder / "bundle"


def test_a_written_bundle_verifies(kind, bundle):
    files, checks = verify(bundle)
    assert [check.file for check in checks] == [
        "tflite/model_int8.tflite", "onnx/model_quantized.onnx", "tflite/model_fp32.tflite", "onnx/model.onnx"
    ]  # fmt: skip
    assert files > 5 and all(check.worst <= 1e-4 for check in checks), "on this very machine"
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["task"] == options_of(kind)
    assert manifest["labels"] == {output: {"logits": "labels.txt", "slot_logits": "slots.txt"}[output] for output in KINDS[kind][1]}
    for output, names in KINDS[kind][1].items():
        assert (bundle / manifest["labels"][output]).read_text() == "".join(name + "\n" for name in names)
    names = {item["name"] for entry in manifest["models"] for item in entry["inputs"]}
    assert ("token_type_ids" in names) == (kind in PAIRED)


def test_golden_answers_are_those_of_predict(bundle):
    cases = list(open_bundle(bundle).golden_cases())
    for file in ("onnx/model.onnx", "tflite/model_fp32.tflite"):
        predictor = Predictor(bundle, file)
        for case in cases[:: max(1, len(cases) // 8)]:
            answer, expected = predictor.predict(case["example"]).answer, case["answer"][file]
            assert answer.keys() == expected.keys()
            if "embedding" in answer:
                assert np.allclose(answer["embedding"], expected["embedding"], atol=1e-4)


def test_golden_cases_reach_the_corners(kind, text_encoder):
    made = decoder_of(kind)
    examples = golden_examples(examples_of(kind), made, text_encoder, BUCKETS)
    assert len({tuple(example.items()) for example in examples}) == len(examples)
    needed = [column for column in made.columns if column not in made.optional]
    for column in needed:
        kept = [corner for corner in CORNERS if kind != "question-answering" or column == "context" or len(corner) < 40]
        assert {example[column] for example in examples} >= set(kept), "a question that fills the window is refused"
    for example in examples_of(kind)[:REAL_EXAMPLES]:
        assert example in examples
    lengths = [len(one.ids) for example in examples for inputs in [made.encode(text_encoder, example)] if len(inputs) == 1 for one in inputs]
    assert {12, 32} <= set(lengths) and max(lengths) <= LONGEST
    if kind == "question-answering":
        assert max(len(made.encode(text_encoder, example)) for example in examples) > 1, "a context in windows"


def test_examples_that_the_decoder_refuses_are_left_out(text_encoder):
    long_question = {"question": " ".join(SENTENCES * 3), "context": "the light"}
    made = decoder_of("question-answering")
    with pytest.raises(BadInput):
        made.encode(text_encoder, {**long_question, "context": " ".join(SENTENCES)})
    examples = golden_examples([{**long_question, "context": " ".join(SENTENCES)}, *examples_of("question-answering")], made, text_encoder, [12])
    assert not any(example["question"] == long_question["question"] for example in examples)


def test_a_task_without_examples_has_its_corners(text_encoder):
    examples = golden_examples([], decoder_of("text-classification"), text_encoder, BUCKETS)
    special = [f"a {token} b" for token in text_encoder.special_tokens()]
    assert [example["text"] for example in examples] == [*CORNERS, *special] and len(special) == 5
    assert len(golden_examples([], decoder_of("text-regression"), text_encoder, BUCKETS)) >= 2 * len(CORNERS) - 2


@pytest.mark.parametrize(
    ("file", "largest", "error", "tolerance"),
    [
        ("onnx/model.onnx", 8.0, 0.0, 0.008), ("onnx/model_quantized.onnx", 8.0, 0.0, 0.4), ("tflite/model_int8.tflite", 8.0, 0.5, 0.75),
        ("tflite/model_int4.tflite", 0.2, 0.0, 0.01), ("tflite/model_int8.tflite", 0.2, 0.02, 0.03), ("onnx/model.onnx", 0.01, 0.0, 1e-4),
    ],
)  # fmt: skip
def test_tolerances_follow_the_values_of_the_file(file, largest, error, tolerance):
    """A unit vector has small components: a file that gives zeros must not pass for one."""
    assert golden_tolerance(file, largest, error) == pytest.approx(tolerance)


def test_the_largest_value_is_over_all_outputs():
    results: Sequence[Mapping[str, np.ndarray]] = [{"a": np.array([1.0, -3.0]), "b": np.zeros((0, 2))}, {"a": np.array([2.0]), "b": np.ones((1, 2))}]
    assert largest_value(results) == 3.0
    assert largest_value([]) == 0.0


def test_small_and_fast_files_come_first():
    names = ["other/x.onnx", "onnx/model.onnx", "tflite/model_int8.tflite", "onnx/model_quantized.onnx"]
    files = [ModelFile(name, Path(name), "int8", 1, {}) for name in names]
    assert [file.name for file in in_order_of_preference(files)] == [names[2], names[3], names[1], names[0]]
