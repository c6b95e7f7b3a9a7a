"""Every kind of task from data to an answer: the bundle proves itself, answers, and loads in the hub's own classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from optimum.onnxruntime import (
    ORTModelForFeatureExtraction,
    ORTModelForQuestionAnswering,
    ORTModelForSequenceClassification,
    ORTModelForTokenClassification,
)

from runtimes.predictor import Predictor
from runtimes.verify import verify
from tests.pipeline.small_tasks import TASKS, run_task, write_data

STAGES = """
[[stage]]
use = "finetune"
epochs = 12
batch_size = 8
learning_rate = 3e-3
[[stage]]
use = "prune-vocab"
[[stage]]
use = "export"
buckets = [8]
[[stage]]
use = "quantize"
metric_drop = 100
[[stage]]
use = "pack"
"""
TEXT = "turn on the light in the bedroom"
EXAMPLES = {
    "text-classification": TEXT,
    "text-classification of pairs": (TEXT, "play some music"),
    "text-classification with several labels": TEXT,
    "text-regression": TEXT,
    "token-classification": TEXT,
    "intent-and-slots": TEXT,
    "question-answering": ("what light", TEXT),
    "sentence-embedding": (TEXT, "switch the lamp on"),
}
KEYS = {
    "text-classification": {"label", "probability", "labels"}, "text-regression": {"value"}, "token-classification": {"spans"},
    "intent-and-slots": {"label", "probability", "labels", "spans"}, "question-answering": {"answer", "start", "end", "score"},
    "sentence-embedding": {"similarity"},
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tiny_model):
    """Bundle of a task, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("tasks")
    made: dict[str, Path] = {}

    def bundle(task: str) -> Path:
        if task not in made:
            place = folder / task.replace(" ", "-")
            run_task(task, STAGES, place, tiny_model, folder / "cache")
            made[task] = place / "out" / "bundle"
        return made[task]

    return bundle


@pytest.mark.parametrize("task", TASKS)
def test_the_bundle_verifies_and_answers_with_every_file(bundles, task):
    bundle = bundles(task)
    _, checks = verify(bundle)
    assert len(checks) == 4 and all(check.runtime and check.cases >= 10 and check.worst <= check.tolerance for check in checks)
    answers = [Predictor(bundle, check.file).predict(EXAMPLES[task]).answer for check in checks]
    for answer in answers:
        assert KEYS[task.split()[0]] & set(answer), answer
        json.dumps(answer)
    exact = [answer for check, answer in zip(checks, answers, strict=True) if "fp32" in check.file or check.file == "onnx/model.onnx"]
    assert [set(answer) for answer in exact] == [set(exact[0])] * 2, "both formats answer alike"


@pytest.mark.parametrize("task", ["token-classification", "intent-and-slots"])
def test_spans_stand_where_the_text_says(bundles, task):
    """Words that the trimmed vocabulary does not have, and letters whose accents are taken off, move no offset."""
    text = "turn on  the Ünsèén light, please"
    for span in Predictor(bundles(task)).predict(text).answer["spans"]:
        assert text[span["start"] : span["end"]] == span["text"]
    spans = Predictor(bundles(task)).predict("turn on the light").answer["spans"]
    assert [(span["type"], span["text"]) for span in spans] == [("DEVICE", "light")]


HUB = {
    "text-classification": (ORTModelForSequenceClassification, ["logits"]),
    "text-classification of pairs": (ORTModelForSequenceClassification, ["logits"]),
    "text-regression": (ORTModelForSequenceClassification, ["logits"]),
    "token-classification": (ORTModelForTokenClassification, ["logits"]),
    "question-answering": (ORTModelForQuestionAnswering, ["start_logits", "end_logits"]),
}


@pytest.mark.filterwarnings("ignore")  # the libraries warn of their own successors
@pytest.mark.parametrize("task", HUB)
def test_stock_optimum_classes_give_what_the_bundle_gives(bundles, task):
    bundle, (kind, outputs) = bundles(task), HUB[task]
    model = kind.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundle)
    example = EXAMPLES[task]
    encoded = tokenizer(*([example] if isinstance(example, str) else example), return_tensors="pt")
    theirs = model(**encoded)
    ours = Predictor(bundle, "onnx/model.onnx")
    own = ours.model.run(encoded["input_ids"][0].tolist(), encoded.get("token_type_ids", [[0] * encoded["input_ids"].shape[1]])[0].tolist())
    for name in outputs:
        assert np.abs(getattr(theirs, name)[0].detach().numpy() - own[name]).max() < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_stock_pipelines_answer(bundles):
    def stock(name: str, task: str):
        bundle = bundles(task)
        model = HUB[task][0].from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
        return transformers.pipeline(name, model=model, tokenizer=transformers.AutoTokenizer.from_pretrained(bundle))

    label = Predictor(bundles("text-classification"), "onnx/model.onnx").predict(TEXT).answer["label"]
    assert stock("text-classification", "text-classification")(TEXT)[0]["label"] == label
    found = stock("token-classification", "token-classification")("turn on the light")
    assert [(one["entity"], one["word"]) for one in found] == [("B-DEVICE", "light")]
    answer = stock("question-answering", "question-answering")(question="what light", context=TEXT)
    assert answer["answer"] in TEXT


@pytest.mark.filterwarnings("ignore")
def test_an_embedding_loads_as_feature_extraction(bundles):
    bundle = bundles("sentence-embedding")
    model = ORTModelForFeatureExtraction.from_pretrained(bundle, subfolder="onnx", file_name="model.onnx")
    assert "sentence_embedding" in model.output_names
    vector = np.array(Predictor(bundle, "onnx/model.onnx").predict(TEXT).answer["embedding"])
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-4)


def test_a_threshold_is_chosen_by_texts_of_no_class_and_ships(tmp_path, tiny_model):
    """It is chosen on validation rows by the file that clients run first; below it the answer is none of the classes."""
    data = write_data("text-classification", tmp_path / "data")
    for split in ("validation", "test"):
        rows = [{"text": text} for text in ("now now now", "my my in please", "some in now", "please please")]
        (data / f"oos_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = 'threshold = "auto"\nout_of_scope = "oos"\n'
    ledger = run_task("text-classification", STAGES, tmp_path, tiny_model, tmp_path / "cache", keys)
    assert ledger.rows == {"train": 60, "validation": 19, "test": 19, "unlabeled": 0}
    assert "out_of_scope_auroc" in ledger.records[0]["subjects"][0]["metrics"]["test"]
    manifest = json.loads((tmp_path / "out" / "bundle" / "bundle.json").read_text())
    assert 0 < manifest["task"]["threshold"] <= 1
    assert any("are none of the classes" in note for note in ledger.records[-1]["notes"])
    verify(tmp_path / "out" / "bundle")
    predictor = Predictor(tmp_path / "out" / "bundle")
    for text in ("now now now", "please please", "turn music on", "turn it off"):
        answer = predictor.predict(text).answer
        assert (answer["label"] is None) == (answer["probability"] < manifest["task"]["threshold"])
