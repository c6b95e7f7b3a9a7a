"""Export, quantize and pack together: what was kept and why is in the bundle, every scheme ships, a wrong file does not.

The data's labels are the answers of the model itself, so that every answer that quantization changes is a wrong one.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema

from device_bench.measurement import Candidate, measure
from device_bench.targets import LocalTarget
from exporters.folding import FoldedEncoder, fold
from exporters.onnx_writer import write_onnx
from exporters.tflite_writer import write_tflite
from pipeline.flow.cache import Artifact, Cache
from pipeline.flow.engine import run
from pipeline.flow.ledger import Ledger
from pipeline.flow.progress import Progress
from pipeline.flow.recipe import load_recipe
from pipeline.flow.stage import Context, Stage
from pipeline.learning.evaluation import subject
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import Encoder
from pipeline.reports.run_report import write_report
from pipeline.stages.export import prove
from pipeline.stages.old_runtime import check_on_old_runtime, old_python
from pipeline.tasks import load_data
from runtimes.backends import load_model
from runtimes.bundle import open_bundle, write_sums
from runtimes.decode.classes import softmax
from runtimes.errors import BadInput, GateFailed, IntegrityError
from runtimes.predictor import Predictor
from runtimes.text import Encoding
from runtimes.verify import verify
from tests.conftest import RECIPE_HEAD, WORDS
from tests.exporters.small_models import LONGEST, break_ffn, one_thread, small_encoder  # noqa: F401 - a fixture

LABELS = ["first", "second", "third"]
ROWS = {"train": 60, "validation": 100, "test": 10}
DROP = 12
"""Points: the broken model loses more than 30 of them, the others in 8 bits less than 6."""
BUCKETS = [8, LONGEST]
RECIPE = f"""
name = "quantized"
{RECIPE_HEAD}
[[stage]]
use = "finetune"
[[stage]]
use = "export"
buckets = [8]
[[stage]]
use = "quantize"
metric_drop = 12
[[stage]]
use = "pack"
"""
OLD_FILE = "tflite/model_int8_tflite214.tflite"


class HandMade(Stage):
    """In place of training: the source is the model, and the baseline as well."""

    use: ClassVar[str] = "finetune"
    needs: ClassVar[tuple[str, ...]] = ("source",)
    gives: ClassVar[tuple[str, ...]] = ("model", "baseline")

    def run(self, context: Context) -> None:
        for role in self.gives:
            shutil.copytree(context.folder("source"), context.output / role)
        context.subjects.append(subject(context, Checkpoint.load(context.output / "model"), "teacher"))


def save(folder: Path, tokenizer_json: str, encoder: Encoder) -> None:
    """The model's folder ``model`` and the data ``data`` with its own answers as labels."""
    encoder.config.id2label, encoder.config.label2id = dict(enumerate(LABELS)), {label: i for i, label in enumerate(LABELS)}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    checkpoint = Checkpoint(encoder, tokenizer_json, special)
    checkpoint.save(folder / "model", LONGEST)
    (folder / "data").mkdir()
    generator = np.random.default_rng(0)
    for split, count in ROWS.items():
        lines = [json.dumps({"text": "now", "label": label}) + "\n" for label in LABELS] if split == "train" else []
        for _ in range(count):
            text = " ".join(generator.choice(WORDS, generator.integers(1, LONGEST - 2)))
            with torch.no_grad():
                answer = encoder(torch.tensor([checkpoint.tokenizer.encode(text).ids])).logits.argmax()
            lines.append(json.dumps({"text": text, "label": LABELS[int(answer)]}) + "\n")
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """``sound``, and ``broken``: the same function in float32 as another that is sound, in 8 bits nothing of it is left."""
    tokenizer_json = (tiny_model / "tokenizer.json").read_text()
    size = len(json.loads(tokenizer_json)["model"]["vocab"])
    folders = {}
    for name in ("sound", "broken"):
        encoder = small_encoder("relu bert", vocab_size=size)
        if name == "broken":
            encoder.layers[0].ffns[0].down.weight.data *= 3  # so that much is lost with it
            assert break_ffn(encoder, 0) == "layers.0.ffns.0.down"
        folders[name] = tmp_path_factory.mktemp(name)
        save(folders[name], tokenizer_json, encoder)
    return folders


@pytest.fixture(scope="module")
def go(models, tmp_path_factory):
    """Run the recipe on a model, with changes to its stages; what was made before comes from the cache."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.toml").write_text(RECIPE)

    def start(name: str, *overrides: str, text: str = RECIPE) -> tuple[Path, Ledger]:
        (folder / "recipe.toml").write_text(text)
        model, data = models[name] / "model", models[name] / "data"
        recipe = load_recipe(str(folder / "recipe.toml"), overrides, str(model), str(data))
        recipe.stages[0] = HandMade()
        out = folder / str(len(list(folder.iterdir())))
        return out / "bundle", run(recipe, out, Cache(folder / "cache"), Progress(quiet=True), write_report)

    return start


def context_of(models: dict[str, Path], name: str, folder: Path) -> Context:
    (folder / "recipe.toml").write_text(RECIPE)
    recipe = load_recipe(str(folder / "recipe.toml"), (), str(models[name] / "model"), str(models[name] / "data"))
    inputs = {"model": Artifact(models[name] / "model", "")}
    (folder / "output").mkdir()
    return Context(
        recipe.name, recipe.seed, recipe.task, load_data(recipe.task, None), recipe.model.source, "", inputs, folder / "output",
        folder / "work", Progress(quiet=True), [], Cache(folder / "cache"),
    )  # fmt: skip


def with_tokenizer(bundle: Path, folder: Path) -> Path:
    """A folder with the tokenizer of a bundle, as stages have it."""
    (folder / "made" / "tokenizer").mkdir(parents=True)
    shutil.copyfile(bundle / "tokenizer.json", folder / "made" / "tokenizer" / "tokenizer.json")
    return folder / "made"


def entries(bundle: Path) -> dict[str, dict]:
    return {entry["file"]: entry for entry in json.loads((bundle / "bundle.json").read_text())["models"]}


def tensor_types(path: Path) -> dict[str, int]:
    graph = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0).subgraphs[0]
    return {tensor.name.decode(): tensor.type for tensor in graph.tensors}


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def notes(ledger: Ledger, stage: str) -> list[str]:
    return next(record["notes"] for record in ledger.records if record["stage"] == stage)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_broken_tensor_is_kept_in_float32_and_the_bundle_says_which_and_why(go):
    bundle, ledger = go("broken")
    found = entries(bundle)
    assert set(found) == {"onnx/model.onnx", "tflite/model_fp32.tflite", "onnx/model_quantized.onnx", "tflite/model_int8.tflite"}
    for file in ("onnx/model_quantized.onnx", "tflite/model_int8.tflite"):
        told = found[file]["quantization"]
        (kept,) = told["kept_float32"]
        assert kept["name"] == "layers.0.ffns.0.down"
        assert kept["squared_change"] > 0.1 and kept["decided_otherwise"] > 20
        why = told["validation"]
        assert why["needed"] == 100 - DROP
        assert why["all_quantized"] < 70, "this file was never shipped"
        assert found[file]["metrics"]["validation"]["accuracy"] == why["shipped"] >= why["needed"]
        assert told["scheme"] == "int8-dynamic"
        assert told["rules"] == [[r"layers\.0\.ffns\.0\.down", "float32"]]
    for file in ("onnx/model.onnx", "tflite/model_fp32.tflite"):
        assert "quantization" not in found[file]
    assert initializers(bundle / "onnx/model_quantized.onnx")["layers.0.ffns.0.down"].dtype == np.float32
    assert initializers(bundle / "onnx/model_quantized.onnx")["layers.0.ffns.0.up"].dtype == np.int8
    assert tensor_types(bundle / "tflite/model_int8.tflite")["layers.0.ffns.0.down"] == schema.TensorType.FLOAT32
    assert tensor_types(bundle / "tflite/model_int8.tflite")["layers.0.ffns.0.up"] == schema.TensorType.INT8
    said = [note for note in notes(ledger, "quantize") if "kept in float32: layers.0.ffns.0.down; " in note]
    assert [note.split(":")[0] for note in said] == ["ONNX int8", "TFLite int8"]
    assert not list((bundle / "onnx").glob("probe*")) and not list((bundle / "tflite").glob("probe*"))
    verify(bundle)


def test_a_sound_model_keeps_nothing(go):
    bundle, ledger = go("sound")
    for file in ("onnx/model_quantized.onnx", "tflite/model_int8.tflite"):
        told = entries(bundle)[file]["quantization"]
        assert (told["kept_float32"], told["rules"]) == ([], [])
        assert told["validation"]["all_quantized"] == told["validation"]["shipped"]
    assert not any("float32" in note for note in notes(ledger, "quantize"))


# --- schemes and rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "changes", "files"),
    [
        ("int8-static", ["quantize.smooth=0.5"], ("onnx/model_quantized.onnx", "tflite/model_int8.tflite")),
        ("int4", ["quantize.metric_drop=30"], ("onnx/model_q4.onnx", "tflite/model_int4.tflite")),
    ],
)
def test_every_scheme_ships_under_its_own_names(go, scheme, changes, files):
    bundle, ledger = go("sound", f"quantize.scheme={scheme}", *changes)
    found = entries(bundle)
    assert set(found) == {"onnx/model.onnx", "tflite/model_fp32.tflite", *files}
    for file in files:
        assert found[file]["precision"] == scheme.split("-")[0]
        assert found[file]["quantization"]["scheme"] == scheme
        assert found[file]["tolerance"] > 10 * found["onnx/model.onnx"]["tolerance"], "other processors round activations otherwise"
        assert found[file]["quantization"]["smooth"] == (0.5 if scheme == "int8-static" else None)
        assert found[file]["metrics"]["validation"]["accuracy"] >= found[file]["quantization"]["validation"]["needed"]
        predictor = Predictor(bundle, file)
        assert {predictor.predict(text).answer["label"] for text in ("play music", "now", "lights off in my bedroom")} <= set(LABELS)
    operators = {node.op_type for node in onnx.load(bundle / files[0]).graph.node}
    types = tensor_types(bundle / files[1])
    if scheme == "int4":
        assert "MatMulNBits" in operators
        assert types["layers.1.ffns.0.up"] == schema.TensorType.INT4 and types["embeddings.words"] == schema.TensorType.INT8
    else:
        assert {"QuantizeLinear", "MatMulIntegerToFloat"} <= operators and "DynamicQuantizeMatMul" not in operators
        assert "quantize" in {name.split("_")[0] for name in types}
    _, checks = verify(bundle)
    assert {check.file for check in checks} == set(found) and all(check.runtime for check in checks)
    titles = {"int4": ["ONNX int4", "TFLite int4"], "int8-static": ["ONNX int8", "TFLite int8"]}[scheme]
    assert [s["name"] for r in ledger.records if r["stage"] == "quantize" for s in r["subjects"]] == titles


def test_what_is_not_asked_for_is_not_shipped(go):
    bundle, _ = go("sound", 'pack.precisions=["int8"]')
    assert set(entries(bundle)) == {"onnx/model_quantized.onnx", "tflite/model_int8.tflite"}


def test_rules_of_the_recipe_decide_and_one_that_matches_nothing_is_told(go):
    rules = r'rules = [["layers\\.0\\..*", "float32"], ["layers\\.1\\.output", "int4"], ["clasifier", "int8"]]'
    bundle, ledger = go("sound", text=RECIPE.replace("metric_drop = 12", f"metric_drop = 30\n{rules}"))
    weights, types = initializers(bundle / "onnx/model_quantized.onnx"), tensor_types(bundle / "tflite/model_int8.tflite")
    matrices = [name for name in weights if name.startswith(("layers", "classifier")) and weights[name].ndim > 1]
    assert len(matrices) == 10
    for name in matrices:
        kept, four_bits = name.startswith("layers.0."), name == "layers.1.output"
        assert weights[name].dtype == (np.float32 if kept else np.uint8 if four_bits else np.int8), name
        assert types[name] == getattr(schema.TensorType, "FLOAT32" if kept else "INT4" if four_bits else "INT8"), name
    assert "warning: quantization rule 'clasifier' matches no tensor; near it are classifier, pooler" in notes(ledger, "quantize")
    told = entries(bundle)["onnx/model_quantized.onnx"]["quantization"]["rules"]
    assert told == [[r"layers\.0\..*", "float32"], [r"layers\.1\.output", "int4"], ["clasifier", "int8"]]
    again = load_recipe(str(bundle / "recipe.lock.toml"), model="x", data="x")
    assert [list(rule) for rule in again.stages[2].rules] == told, "the lock holds them as they were"
    verify(bundle)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ('["layers.(0", "int8"]', r"stage\[3\]\.quantize\.rules: 'layers\.\(0' is not a regular expression: missing \)"),
        ('["layers", "int7"]', r"stage\[3\]\.quantize\.rules\.0\.1: unknown 'int7'; did you mean 'int8'\?"),
        ('["layers"]', r"stage\[3\]\.quantize\.rules\.0"),
    ],
)
def test_a_faulty_rule_is_refused_before_any_work(tmp_path, rule, told):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("metric_drop = 12", f"rules = [{rule}]"))
    with pytest.raises(BadInput, match=told):
        load_recipe(str(tmp_path / "recipe.toml"), (), "x", "x")


def test_too_few_calibration_texts_are_refused(go):
    with pytest.raises(BadInput, match="calibration: 7 texts; at least 8"):
        go("sound", "quantize.scheme=int8-static", "quantize.calibration_texts=7")


# --- probabilities ----------------------------------------------------------------------------------------------------


def test_files_that_give_probabilities_are_not_decoded_again(go, models, tmp_path):
    bundle, _ = go("sound", "export.output=probabilities")
    plain, _ = go("sound")
    assert json.loads((plain / "bundle.json").read_text())["task"]["decode"] == "softmax"
    assert json.loads((bundle / "bundle.json").read_text())["task"]["decode"] == "none"
    checkpoint = Checkpoint.load(models["sound"] / "model")
    text = "switch the bedroom lamp off please"
    with torch.no_grad():
        expected = softmax(checkpoint.model(torch.tensor([checkpoint.tokenizer.encode(text).ids])).logits[0].numpy())
    assert expected.max() < 0.95, "a second softmax would show"
    for file, entry in entries(bundle).items():
        assert [item["name"] for item in entry["outputs"]] == ["probabilities"]
        tolerance = 1e-4 if entry["precision"] == "fp32" else 0.1
        for made in (bundle, plain):
            answer = Predictor(made, file).predict(text).answer
            assert answer["probability"] == pytest.approx(float(expected.max()), abs=tolerance), (made, file)
            assert answer["label"] == LABELS[int(expected.argmax())]
        given = load_model(bundle / file).run(checkpoint.tokenizer.encode(text).ids)
        assert given["probabilities"].sum() == pytest.approx(1, abs=1e-4)
    verify(bundle)
    cases = list(open_bundle(bundle).golden_cases())
    candidates = [
        Candidate(file, bundle / file, entry["format"], file, [Encoding(**one) for case in cases for one in case["inputs"]],
                  [{name: np.array(value, np.float32) for name, value in one.items()} for case in cases for one in case["outputs"][file]],
                  entry["tolerance"])
        for file, entry in entries(bundle).items() if entry["precision"] == "fp32"
    ]  # fmt: skip
    measured = measure(candidates, LocalTarget("here"), [1], [], rounds=1, min_seconds=0.001, say=lambda _: None, memory=False)
    assert [m["count"] >= len(cases) for m in measured] == [True, True], "the agent runs them, and proves their golden results"
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["task"]["decode"] = "softplus"
    (copy / "bundle.json").write_text(json.dumps(manifest))
    write_sums(copy, exclude=("report",))
    with pytest.raises(IntegrityError, match=r"task.*decode.*softplus"):
        Predictor(copy)


# --- old runtimes -----------------------------------------------------------------------------------------------------


def test_old_runtimes_without_an_interpreter_are_told_how_to_make_one(go, tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETBERT_OLD_PYTHON", str(tmp_path / "old" / "bin" / "python"))
    with pytest.raises(BadInput) as error:
        go("sound", "quantize.old_runtimes=true")
    message = str(error.value)
    assert f"no interpreter with tflite-runtime 2.14 at {tmp_path}/old/bin/python" in message
    assert f"python3.11 -m venv {tmp_path}/old && {tmp_path}/old/bin/pip install tflite-runtime==2.14.0 'numpy<2'" in message
    assert "POCKETBERT_OLD_PYTHON" in message


def test_old_runtimes_need_a_tflite_export(go, monkeypatch):
    monkeypatch.setenv("POCKETBERT_OLD_PYTHON", sys.executable)
    with pytest.raises(BadInput, match=r"add tflite to export\.formats"):
        go("sound", "quantize.old_runtimes=true", 'export.formats=["onnx"]')


def test_another_runtime_is_not_taken_for_the_old_one(go, models, tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETBERT_OLD_PYTHON", sys.executable)
    bundle, _ = go("sound")
    context = context_of(models, "sound", tmp_path)
    with pytest.raises(BadInput, match=r"runs ai-edge-litert .*, tflite-runtime 2\.14 is needed"):
        check_on_old_runtime(context, bundle / "tflite/model_int8.tflite", with_tokenizer(bundle, tmp_path))
    assert context.notes == []


@pytest.fixture
def old_interpreter() -> Path:
    try:
        return old_python()
    except BadInput as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "int4"])
def test_a_file_for_old_runtimes_is_gated_and_run_there(go, old_interpreter, scheme):
    name = "broken" if scheme == "int8-dynamic" else "sound"
    bundle, ledger = go(name, "quantize.old_runtimes=true", f"quantize.scheme={scheme}", "quantize.metric_drop=30")
    entry = entries(bundle)[OLD_FILE]
    assert entry["precision"] == "int8" and entry["quantization"]["scheme"] == "int8-dynamic"
    assert entry["metrics"]["validation"]["accuracy"] >= 70
    assert [kept["name"] for kept in entry["quantization"]["kept_float32"]] == (["layers.0.ffns.0.down"] if name == "broken" else [])
    types = tensor_types(bundle / OLD_FILE)
    assert types["layers.1.ffns.0.up"] == schema.TensorType.INT8
    assert any(note.startswith(f"{Path(OLD_FILE).name}: 100 inputs right on tflite-runtime 2.14") for note in notes(ledger, "quantize"))
    verify(bundle)


def test_a_file_for_litert_is_refused_by_the_check_on_the_old_runtime(go, models, old_interpreter, tmp_path):
    bundle, _ = go("sound")
    context = context_of(models, "sound", tmp_path)
    with pytest.raises(GateFailed, match=r"^model_int8\.tflite: tflite-runtime 2\.14 does not compute it: "):
        check_on_old_runtime(context, bundle / "tflite/model_int8.tflite", with_tokenizer(bundle, tmp_path))


# --- parity -----------------------------------------------------------------------------------------------------------


def write(model: FoldedEncoder, folder: Path, suffix: str) -> Path:
    path = folder / "exported" / f"model.{suffix}"
    if suffix == "onnx":
        write_onnx(model, path)
    else:
        write_tflite(model, path, BUCKETS)
    return path


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_a_file_of_the_model_is_proven(models, tmp_path, suffix):
    context = context_of(models, "sound", tmp_path)
    checkpoint = Checkpoint.load(models["sound"] / "model")
    model = fold(checkpoint.model, LONGEST)
    prove(context, "a file", checkpoint, write(model, tmp_path, suffix), model, BUCKETS)
    assert context.notes[0].startswith("a file: 100 inputs within ")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
@pytest.mark.parametrize(
    ("altered", "named"),
    [
        ("layers.0.attention.value", "layers.0.query_key_value"),
        ("layers.0.attention.query", "layers.0.query_key_value"),
        ("layers.1.attention.query", "layers.1.query"),
        ("layers.1.ffns.0.up", "layers.1.ffns.0.up"),
        ("layers.0.ffns.0.down", "layers.1.key_value"),
        ("heads.classifier", "classifier"),
    ],
)
def test_a_fold_that_is_another_function_is_refused_named_and_kept_aside(models, tmp_path, suffix, altered, named):
    """The file is exactly what was folded, but what was folded is not the checkpoint."""
    context = context_of(models, "sound", tmp_path)
    folder = models["sound"] / "model"
    other = Checkpoint.load(folder).model
    other.get_submodule(altered).weight.data *= 1.5
    model = fold(other, LONGEST)
    path = write(model, tmp_path, suffix)
    with pytest.raises(GateFailed) as error:
        prove(context, "a file", Checkpoint.load(folder), path, model, BUCKETS)
    aside = tmp_path / "work" / "rejected" / path.name
    assert error.value.exit_code == 3
    assert str(error.value).startswith(f"model.{suffix}: run alone, ")
    assert str(error.value).endswith(f". First wrong tensor: {named}; the file is kept at {aside}")
    assert aside.read_bytes() == path.read_bytes()
    assert context.notes == []


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_a_file_that_holds_another_matrix_is_refused_and_named(models, tmp_path, suffix):
    """Two matrices of one name: the file stores the first for both, which is what a mistake of the writer would look like."""
    context = context_of(models, "sound", tmp_path)
    checkpoint = Checkpoint.load(models["sound"] / "model")
    model = fold(checkpoint.model, LONGEST)
    first, last = model.layers
    clash = replace(model, layers=(first, replace(last, output=replace(last.output, name=first.output.name))))
    with pytest.raises(GateFailed, match=r"First wrong tensor: layers\.0\.output; the file is kept at "):
        prove(context, "a file", checkpoint, write(clash, tmp_path, suffix), clash, BUCKETS)
