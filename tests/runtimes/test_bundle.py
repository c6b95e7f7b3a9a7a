"""A bundle proves itself, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtimes import backends, predictor
from runtimes.bundle import CHECKSUMS, check_sums, file_sha256, is_safe_name, open_bundle, write_sums
from runtimes.errors import BadInput, IntegrityError
from runtimes.predictor import Predictor, choose_model
from runtimes.session import SessionOptions
from runtimes.verify import verify
from tests.conftest import ROWS

FILES = {"onnx/model.onnx", "onnx/model_quantized.onnx", "tflite/model_fp32.tflite", "tflite/model_int8.tflite"}


@pytest.fixture
def bundle(tiny_run, tmp_path) -> Path:
    shutil.copytree(tiny_run / "bundle", tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite(bundle: Path, change) -> None:
    """Change the manifest and make the checksums match again."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))
    write_sums(bundle, exclude=("report",))


def test_a_whole_bundle_verifies_on_both_runtimes(bundle):
    files, checks = verify(bundle)
    assert files == sum(1 for p in bundle.rglob("*") if p.is_file())
    assert {check.file for check in checks} == FILES
    assert all(check.runtime and check.cases >= 20 and check.worst <= check.tolerance for check in checks)


def test_the_checksums_are_those_of_sha256sum(bundle):
    for folder in (bundle, bundle / "report"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", CHECKSUMS], cwd=folder, check=True)


def test_one_flipped_byte_anywhere_is_found(bundle):
    for file in sorted(p for p in bundle.rglob("*") if p.is_file()):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        original = file.read_bytes()
        file.write_bytes(bytes(data))
        with pytest.raises(IntegrityError):
            verify(bundle)
        file.write_bytes(original)
    verify(bundle)


def test_missing_and_foreign_files_are_found(bundle):
    (bundle / "extra.txt").write_text("x")
    with pytest.raises(IntegrityError, match=r"extra\.txt: not listed"):
        check_sums(bundle)
    (bundle / "extra.txt").unlink()
    (bundle / "vocab.txt").unlink()
    with pytest.raises(IntegrityError, match=r"vocab\.txt: listed in SHA256SUMS but missing"):
        check_sums(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "C:/x", ""])
def test_paths_that_leave_the_bundle_are_refused(bundle, name):
    assert not is_safe_name(name)
    rewrite(bundle, lambda m: m["models"][0].update(file=name))
    with pytest.raises(IntegrityError, match="would leave the bundle; refused"):
        open_bundle(bundle)


def test_a_checksum_line_that_leaves_the_bundle_is_refused(bundle):
    with (bundle / CHECKSUMS).open("a") as file:
        file.write(f"{'0' * 64}  ../secret\n")
    with pytest.raises(IntegrityError, match="would leave the bundle"):
        check_sums(bundle)


def test_a_newer_schema_is_refused_and_unknown_keys_are_ignored(bundle):
    rewrite(bundle, lambda m: m.update(future={"x": 1}))
    verify(bundle)
    rewrite(bundle, lambda m: m.update(schema=3))
    with pytest.raises(IntegrityError, match="schema 3; this version reads schema 2"):
        open_bundle(bundle)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"schema": 2}', '{"schema": 2, "models": 3}'])
def test_a_broken_manifest_is_an_integrity_error(bundle, content):
    (bundle / "bundle.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"bundle\.json"):
        open_bundle(bundle)


def test_no_bundle_there(tmp_path):
    with pytest.raises(BadInput, match=r"no bundle there"):
        open_bundle(tmp_path)


def test_a_model_that_answers_differently_is_found(bundle):
    """Checksums in order, but the file is another model: only the golden cases can tell."""
    shutil.copyfile(bundle / "tflite" / "model_int8.tflite", bundle / "tflite" / "model_fp32.tflite")
    write_sums(bundle, exclude=("report",))
    with pytest.raises(IntegrityError, match=r"tflite/model_fp32\.tflite: the content does not match the checksum in bundle\.json"):
        verify(bundle)
    rewrite(bundle, lambda m: [entry.update(sha256=file_sha256(bundle / entry["file"])) for entry in m["models"]])
    with pytest.raises(IntegrityError, match=r"tflite/model_fp32\.tflite: golden case \d+ differs by"):
        verify(bundle)


def test_another_tokenizer_is_found(bundle):
    text = (bundle / "tokenizer.json").read_text()
    (bundle / "tokenizer.json").write_text(text.replace('"lowercase":true', '"lowercase":false'))
    write_sums(bundle, exclude=("report",))
    with pytest.raises(IntegrityError, match="the tokenizer gives"):
        verify(bundle)


def test_every_file_gives_the_same_label_for_the_texts_it_learned(bundle):
    for file in FILES:
        model = Predictor(bundle, file)
        answers = [model.predict(text).answer["label"] == label for label, texts in ROWS.items() for text in texts]
        assert np.mean(answers) > 0.6, file


def test_onnx_and_tflite_agree_with_each_other(bundle):
    models = [Predictor(bundle, file) for file in ("onnx/model.onnx", "tflite/model_fp32.tflite")]
    for text in ["turn on the light", "a", "", "play " * 40]:
        ids = models[0].encoder.encode(text).ids
        assert np.abs(models[0].model.run(ids)["logits"] - models[1].model.run(ids)["logits"]).max() < 1e-3


def test_long_texts_are_cut_and_told(bundle):
    model = Predictor(bundle)
    assert model.predict("light " * 100).truncated
    assert not model.predict("light").truncated
    assert model.encoder.truncated == 1


def test_the_bucket_is_the_smallest_that_holds_the_text(bundle):
    model = backends.TfliteModel(bundle / "tflite" / "model_fp32.tflite")
    assert model.buckets == [8, 16]
    used = []
    for bucket, signature in model._signatures.items():
        signature.run = lambda *given, bucket=bucket, plain=signature.run: used.append(bucket) or plain(*given)
    for tokens in (1, 7, 8, 9, 16):
        model.run([2] * tokens)
    assert used == [8, 8, 8, 16, 16]
    with pytest.raises(BadInput, match="17 tokens do not fit the largest bucket of 16"):
        model.run([2] * 17)


def test_a_runtime_that_would_refuse_a_file_gets_the_next(bundle, monkeypatch):
    """tflite-runtime 2.14 does not know the scales of the int8 file; the float32 file it runs."""
    monkeypatch.setattr(predictor, "installed_formats", lambda: {"tflite": "tflite-runtime 2.14.0"})
    assert choose_model(open_bundle(bundle)).file == "tflite/model_fp32.tflite"
    monkeypatch.setattr(predictor, "installed_formats", lambda: {"tflite": "ai-edge-litert 2.3.0"})
    assert choose_model(open_bundle(bundle)).file == "tflite/model_int8.tflite"


def test_a_missing_runtime_is_named_and_the_other_one_is_used(bundle, monkeypatch):
    def absent():
        raise BadInput("no TFLite runtime is installed")

    monkeypatch.setattr(backends, "_interpreter_class", absent)
    assert Predictor(bundle).entry.format == "onnx"
    _, checks = verify(bundle)
    assert {check.file: check.runtime is None for check in checks}["tflite/model_int8.tflite"] is True
    monkeypatch.setattr(predictor, "installed_formats", dict)
    with pytest.raises(BadInput, match=r"no runtime for its files \(tflite/model_int8\.tflite, "):
        Predictor(bundle)
    with pytest.raises(BadInput, match="no model file 'x'; it has tflite/"):
        Predictor(bundle, "x")


def test_a_file_no_runtime_can_read_is_an_integrity_error(tmp_path):
    for name in ("x.onnx", "x.tflite"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(IntegrityError, match=rf"{name}: (not a|the) \w+ file"):
            backends.load_model(tmp_path / name)
    with pytest.raises(BadInput, match=r"no runtime for '\.pt'"):
        backends.load_model(tmp_path / "x.pt")


def test_a_manifest_without_session_options_means_the_defaults(bundle):
    rewrite(bundle, lambda m: [entry.pop("session") for entry in m["models"]])
    assert all(entry.session == SessionOptions() for entry in open_bundle(bundle).models)
    verify(bundle)


def test_session_options_of_the_manifest_are_obeyed(bundle):
    options = {"graph_optimization_level": "basic", "memory_pattern": False, "memory_arena": False, "threads": 2}
    rewrite(bundle, lambda m: [entry.update(session=options | {"weight_cache": "none"}) for entry in m["models"]])
    verify(bundle)
    session = Predictor(bundle, "onnx/model.onnx").model._session.get_session_options()
    assert session.graph_optimization_level.name == "ORT_ENABLE_BASIC"
    assert (session.enable_mem_pattern, session.enable_cpu_mem_arena, session.intra_op_num_threads) == (False, False, 2)
    assert Predictor(bundle, "onnx/model.onnx", threads=1).model._session.get_session_options().intra_op_num_threads == 1
    assert type(Predictor(bundle, "tflite/model_int8.tflite").model._model).__name__ == "Interpreter"


def test_session_options_that_are_nonsense_are_named(bundle):
    rewrite(bundle, lambda m: m["models"][0].update(session={"threads": "all"}))
    with pytest.raises(IntegrityError, match=r"bundle\.json: tflite/model_int8\.tflite: session\.threads: 'all'"):
        open_bundle(bundle)


@pytest.mark.parametrize("file", ["tflite/model_fp32.tflite", "tflite/model_int8.tflite"])
def test_shared_packed_weights_change_nothing_but_speed(bundle, file, monkeypatch):
    shared = backends.load_model(bundle / file)
    own = backends.load_model(bundle / file, session=SessionOptions(weight_cache="none"))
    monkeypatch.setattr(backends, "_can_share_packed_weights", lambda: False)
    older = backends.load_model(bundle / file)
    assert [type(m._model).__name__ for m in (shared, own, older)] == ["CompiledModel", "Interpreter", "Interpreter"]
    assert shared.buckets == own.buckets and shared.tensors() == own.tensors()
    for tokens in (16, 3, 9, 8, 1, 16):  # shorter texts after longer ones: nothing of a text before may be left
        ids = [2, *range(5, 3 + tokens), 3][:tokens]
        np.testing.assert_allclose(shared.run(ids)["logits"], own.run(ids)["logits"], atol=1e-5)
        np.testing.assert_array_equal(older.run(ids)["logits"], own.run(ids)["logits"])


SEVERAL_MODELS = """
import sys
from pathlib import Path
from runtimes.backends import load_model
models = [load_model(Path(file), threads) for file in sys.argv[1:] for threads in (1, 2)]
before = [model.run([2, 5, 3])["logits"] for model in models]
del models[0]
assert all((model.run([2, 5, 3])["logits"] == logits).all() for model, logits in zip(models, before[1:]))
print("still heard", file=sys.stderr)
"""


def test_several_models_in_one_process_say_nothing_and_leave_nothing(bundle, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    command = [sys.executable, "-c", SEVERAL_MODELS, *(str(bundle / file) for file in sorted(FILES))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "still heard\n")
    assert list(folder.iterdir()) == [], "packed weights are kept in memory, not in a file"


def test_tolerances_allow_what_quantizing_itself_moves(tiny_run):
    """Where an activation's code tips on another processor, logits differ as far as those of the float32 file do."""
    bundle = open_bundle(tiny_run / "bundle")
    cases = [{file: one[0]["logits"] for file, one in case["outputs"].items()} for case in bundle.golden_cases()]
    exact = {entry.format: entry.file for entry in bundle.models if entry.precision == "fp32"}
    for entry in bundle.models:
        logits, reference = (np.array([case[file] for case in cases]) for file in (entry.file, exact[entry.format]))
        share = 1e-3 if entry.precision == "fp32" else 5e-2
        expected = max(share * max(1.0, np.abs(logits).max()), 1.5 * np.abs(logits - reference).max())
        assert entry.tolerance == pytest.approx(expected, abs=1e-4), entry.file
