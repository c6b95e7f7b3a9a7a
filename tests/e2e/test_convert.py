"""``pocketbert convert``: checkpoints as transformers and sentence-transformers save them become bundles that answer as they did."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from pipeline.flow.recipe import load_recipe
from runtimes.errors import BadInput
from runtimes.predictor import Predictor
from tests.conftest import RECIPE_HEAD, ROWS
from tests.pipeline.cli.test_main import pocketbert, refused

TEXTS = [text for texts in ROWS.values() for text in texts]
NAMES = {0: "off", 1: "music", 2: "on"}
"""In no order of the alphabet."""
QUICK = ("--quiet", "--set", "bench.texts=2", "--set", "bench.rounds=1", "--set", "bench.min_seconds=0.01", "--set", "bench.lengths=[8]")


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tmp_path_factory):
    """A folder as ``save_pretrained`` of a class of transformers writes it, with random weights that tell classes apart."""

    def make(kind: str, name: str = "model", **config) -> Path:
        folder = tmp_path_factory.mktemp("convert") / name
        torch.manual_seed(1)
        made = getattr(transformers, kind)(AutoConfig.from_pretrained(tiny_model, **config))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3.0)  # the usual start leaves all classes alike
            if hasattr(made, "classifier"):  # nor may one class win everywhere
                ids = [Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode(text).ids for text in TEXTS]
                logits = torch.cat([made.eval()(torch.tensor([one])).logits.reshape(-1, made.classifier.out_features) for one in ids])
                made.classifier.bias -= logits.mean(0)
        made.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((tiny_model / file).read_bytes())
        return folder

    return make


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def converted(model: Path, out: Path, cache: Path, *options: str) -> dict:
    done = pocketbert("convert", str(model), "--out", str(out), "--cache", str(cache), "--json", *QUICK, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files(ledger: dict) -> dict[str, dict]:
    return {s["name"]: s["metrics"]["validation"] for record in ledger["stages"] for s in record["subjects"] if s["file"]}


def logits_of(model: Path, kind: str, text: str) -> np.ndarray:
    """What transformers gives, [C] or [n, C]."""
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    with torch.no_grad():
        return getattr(transformers, kind).from_pretrained(model).eval()(torch.tensor([ids])).logits[0].numpy()


def test_a_classifier_keeps_its_own_order_of_classes_and_its_answers(checkpoint, cache, tmp_path):
    model = checkpoint("BertForSequenceClassification", id2label=NAMES, label2id={name: i for i, name in NAMES.items()})
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    ledger = converted(model, tmp_path / "out", cache, "--texts", str(tmp_path / "texts.txt"))
    assert [record["stage"] for record in ledger["stages"]] == ["adopt", "export", "quantize", "bench", "pack"]
    found = files(ledger)
    assert set(found) == {"ONNX fp32", "TFLite fp32", "ONNX int8", "TFLite int8"}
    for name in ("ONNX fp32", "TFLite fp32"):
        assert found[name] == {"agreement": 100.0, "divergence": pytest.approx(0, abs=1e-5)}
    bundle = tmp_path / "out" / "bundle"
    assert (bundle / "labels.txt").read_text().split() == list(NAMES.values())
    wanted = [NAMES[int(logits_of(model, "BertForSequenceClassification", text).argmax())] for text in TEXTS]
    assert len(set(wanted)) > 1, "the test must be able to tell an order of classes from another"
    assert [Predictor(bundle, "onnx/model.onnx").predict(text).answer["label"] for text in TEXTS] == wanted


def test_labels_of_data_are_the_heads_own_by_name_by_case_or_by_number(checkpoint, cache, tmp_path):
    model = checkpoint("BertForSequenceClassification", id2label={i: name.upper() for i, name in NAMES.items()})
    numbers = {name: i for i, name in NAMES.items()}
    right = {"named": lambda name: name.upper(), "lower": lambda name: name, "numbered": lambda name: numbers[name]}
    scores = {}
    for form, label in right.items():
        rows = [{"text": text, "label": label(name)} for name, texts in ROWS.items() for text in texts]
        path = tmp_path / f"{form}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ledger = converted(model, tmp_path / form, cache, "--data", str(path), "--metric-drop", "100")
        scores[form] = ledger["stages"][0]["subjects"][0]["metrics"]["test"]["accuracy"]
    labels = [name for name, texts in ROWS.items() for _ in texts]
    given = [NAMES[int(logits_of(model, "BertForSequenceClassification", text).argmax())] for text in TEXTS]
    share = 100 * np.mean([a == b for a, b in zip(labels, given, strict=True)])
    assert scores == {form: pytest.approx(share, abs=1e-3) for form in right}


def test_labels_that_the_head_does_not_have_are_refused(checkpoint, cache, tmp_path):
    model = checkpoint("BertForSequenceClassification", id2label=NAMES)
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "play music", "label": "happy"}\n{"text": "stop now", "label": "sad"}\n')
    done = pocketbert("convert", str(model), "--data", str(path), "--out", str(tmp_path / "out"), "--cache", str(cache), "--quiet")
    refused(done, 2, "happy, sad", "off, music, on", "id2label", "finetune")


def test_texts_are_made_where_none_are_given_and_it_is_said(checkpoint, cache, tmp_path):
    model = checkpoint("BertForTokenClassification", id2label={0: "O", 1: "B-DEVICE", 2: "I-DEVICE"})
    done = pocketbert("convert", str(model), "--out", str(tmp_path / "out"), "--cache", str(cache), *QUICK[1:])
    assert done.returncode == 0, done.stderr
    assert "random words of the vocabulary" in done.stderr
    recipe = tomllib.loads((tmp_path / "out" / "recipe.toml").read_text())
    assert recipe["task"]["kind"] == "token-classification" and recipe["task"]["metric"] == "agreement"
    assert (tmp_path / "out" / "recipe.toml").read_text() in done.stdout, "the recipe that ran is shown"
    assert str(model) not in (tmp_path / "out" / "recipe.toml").read_text(), "no path of this machine in what is passed on"
    again = load_recipe(str(tmp_path / "out" / "recipe.toml"), model=str(model))
    assert [stage.use for stage in again.stages] == ["adopt", "export", "quantize", "bench", "pack"]


@pytest.mark.parametrize(
    ("architecture", "config", "line", "kind", "metric"),
    [
        ("BertForSequenceClassification", {"num_labels": 1}, "{}", "text-regression", "divergence"),
        ("BertForSequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}, "{}", "text-classification", "agreement"),
        ("BertForQuestionAnswering", {}, "what light\t{}", "question-answering", "agreement"),
    ],
)
def test_the_task_is_read_from_the_head(checkpoint, cache, tmp_path, architecture, config, line, kind, metric):
    model = checkpoint(architecture, **config)
    (tmp_path / "texts.txt").write_text("".join(line.format(text) + "\n" for text in TEXTS))
    ledger = converted(model, tmp_path / "out", cache, "--texts", str(tmp_path / "texts.txt"), "--metric-drop", "50")
    assert ledger["task"]["kind"] == kind and ledger["task"]["metrics"][0]["name"] == metric
    assert files(ledger)["ONNX fp32"]["divergence"] == pytest.approx(0, abs=1e-5)
    assert files(ledger)["ONNX int8"]["divergence"] < 1
    manifest = json.loads((tmp_path / "out" / "bundle" / "bundle.json").read_text())
    assert manifest["task"]["kind"] == kind
    assert manifest["task"].get("multi_label", False) == ("problem_type" in config)


@pytest.mark.parametrize(("key", "pooling"), [("pooling_mode_mean_tokens", "mean"), ("pooling_mode_cls_token", "first")])
def test_vectors_of_a_sentence_encoder(checkpoint, cache, tmp_path, key, pooling):
    model = checkpoint("BertModel")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, key: True}))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    converted(model, tmp_path / "out", cache, "--texts", str(tmp_path / "texts.txt"))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXTS[0]).ids
    with torch.no_grad():
        hidden = transformers.BertModel.from_pretrained(model).eval()(torch.tensor([ids])).last_hidden_state[0].numpy()
    vector = hidden.mean(0) if pooling == "mean" else hidden[0]
    given = Predictor(tmp_path / "out" / "bundle", "onnx/model.onnx").predict(TEXTS[0]).answer["embedding"]
    np.testing.assert_allclose(given, vector / np.linalg.norm(vector), atol=1e-5)


def test_pairs_have_a_tab_on_their_lines(checkpoint, cache, tmp_path):
    model = checkpoint("BertForSequenceClassification", id2label=NAMES)
    (tmp_path / "texts.txt").write_text("".join(f"{one}\t{other}\n" for one, other in zip(TEXTS, reversed(TEXTS), strict=True)))
    converted(model, tmp_path / "out", cache, "--texts", str(tmp_path / "texts.txt"), "--pair")
    assert json.loads((tmp_path / "out" / "bundle" / "bundle.json").read_text())["task"]["columns"] == ["text", "text_pair"]


def test_what_cannot_be_converted_is_refused_with_the_cure(checkpoint, tmp_path):
    base = checkpoint("BertModel")
    refused(pocketbert("convert", str(base), "--out", str(tmp_path / "out")), 2, "no head for a task", "--task sentence-embedding")
    refused(pocketbert("convert", str(tmp_path / "nowhere")), 2, "neither a folder nor in the hub's local cache")
    refused(pocketbert("convert", str(base), "--task", "poetry"), 2, "--task", "text-classification")
    refused(pocketbert("convert", str(base), "--data", "a", "--texts", "b"), 2, "--data and --texts")
    embedding = ("convert", str(base), "--task", "sentence-embedding", "--out", str(tmp_path / "out"))
    refused(pocketbert(*embedding, "--texts", str(tmp_path / "none.txt")), 2, "none.txt")
    refused(pocketbert(*embedding, "--pair"), 2, "--pair")
    (tmp_path / "one.txt").write_text("play music\n")
    refused(pocketbert(*embedding, "--texts", str(tmp_path / "one.txt"), "--cache", str(tmp_path / "cache")), 2, "two at least")


def test_a_recipe_needs_no_finetune_where_the_source_has_the_head(tiny_data, checkpoint, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE_HEAD + '[[stage]]\nuse = "export"\n')
    assert [stage.use for stage in load_recipe(str(recipe)).stages] == ["adopt", "export"]
    options = ("--model", str(checkpoint("BertModel")), "--data", str(tiny_data), "--out", str(tmp_path / "out"), "--quiet")
    done = pocketbert("run", str(recipe), *options)
    refused(done, 2, "no trained classifier", "finetune")


def test_answers_that_drift_are_refused_though_every_decision_stays(checkpoint, cache, tmp_path):
    model = checkpoint("BertForSequenceClassification", id2label=NAMES)
    state = load_file(model / "model.safetensors")
    save_file(state | {"classifier.weight": 30 * state["classifier.weight"]}, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    options = ("--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out"), "--cache", str(cache), *QUICK, "--metric-drop", "100")
    done = pocketbert("convert", str(model), *options, "--set", "budget.divergence=1e-9")
    refused(done, 3, "divergence is", "the budget allows 1e-09", "No bundle is published")


def test_a_metric_without_labels_trains_nothing(tmp_path):
    recipe = tmp_path / "recipe.toml"
    for metric, stage, says in (("agreement", "finetune", "finetune trains a model"), ("divergence", "prune-heads", "prune-heads trains a model")):
        recipe.write_text(RECIPE_HEAD + f'metric = "{metric}"\n[[stage]]\nuse = "{stage}"\n')
        with pytest.raises(BadInput, match=says):
            load_recipe(str(recipe))
    recipe.write_text(RECIPE_HEAD + 'kind = "text-regression"\nmetric = "agreement"\n[[stage]]\nuse = "export"\n')
    with pytest.raises(BadInput, match="decides nothing"):
        load_recipe(str(recipe))
