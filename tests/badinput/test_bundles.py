"""Whatever stands in a bundle, the command line ends with 0, 2 or 5 and one line that names the place; never in a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from runtimes.bundle import MANIFEST
from tests.badinput.bundles import (
    DAMAGES,
    MAX_LENGTH,
    ONNX,
    REMOVED,
    TFLITE,
    changed,
    first_case,
    mutations,
    places,
    replaced,
    whole_bundle,
    write_manifest,
)
from tests.runtimes.conftest import pieces, tokenizer_file  # noqa: F401

SEED = 11
EACH = 6
SAMPLE = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer_file, pieces) -> Path:  # noqa: F811
    return whole_bundle(tmp_path_factory.mktemp("whole"), tokenizer_file, len(pieces))


@pytest.fixture
def bundle(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "bundle")


@pytest.fixture
def ends(capfd):
    """(exit code, standard error) of a command; an exception that the command line does not know goes through, and fails the test."""
    from pipeline.cli.main import app

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            app(list(arguments))
        return ended.value.code or 0, capfd.readouterr().err

    return run


def test_the_whole_bundle_is_right(bundle, ends):
    assert ends("verify", str(bundle)) == (0, "")
    assert ends("predict", str(bundle), "anna") == (0, "")


def test_every_leaf_of_the_manifest(bundle, ends):
    document = json.loads((bundle / MANIFEST).read_text())
    tried, refused = 0, 0
    for mutation in mutations(document, SEED, EACH):
        (bundle / MANIFEST).write_text(json.dumps(mutation.document))
        code, said = ends("predict", str(bundle), "anna lives", "--file", ONNX)
        tried, refused = tried + 1, refused + (code == 5)
        assert code in (0, 2, 5), f"{mutation}: {said}"
        assert (said == "") if code == 0 else (said.startswith("error: ") and len(said) < 1000), f"{mutation}: {said}"
        if code == 5:
            assert "bundle" in said, f"{mutation}: {said}"
    assert tried == EACH * len(list(places(document))) > 500
    assert refused > tried / 2


WRONG_TYPE = {str: 3, int: "x", float: "x", bool: "x", list: 3, dict: 3, type(None): []}


def test_a_wrong_type_of_every_leaf_is_an_integrity_error_with_its_place(bundle, ends):
    document = json.loads((bundle / MANIFEST).read_text())
    for place in places(document):
        value = document
        for key in place:
            value = value[key]
        if "quantization" in place or place[-2:-1] == ("shape",):
            continue  # free values, which have no type of their own
        if "metrics" in place[:-1] and isinstance(value, dict):
            continue  # a number may stand for a table of numbers
        (bundle / MANIFEST).write_text(json.dumps(changed(document, place, WRONG_TYPE[type(value)])))
        code, said = ends("predict", str(bundle), "anna")
        last = next(key for key in reversed(place) if isinstance(key, str))
        assert code == 5 and (last in said or "session" in said), f"{place}: {said}"


@pytest.mark.parametrize("place", ["schema", "task", "tokenizer", "labels", "models", "golden"])
def test_what_a_bundle_cannot_do_without(bundle, ends, place):
    document = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(changed(document, (place,), REMOVED)))
    code, said = ends("predict", str(bundle), "anna")
    assert code == 5 and re.search(rf"bundle\.json: {place} is missing", said)


def test_a_sample_of_changed_manifests_by_verify(bundle, ends):
    document = json.loads((bundle / MANIFEST).read_text())
    every = list(mutations(document, SEED + 1, 2))
    for mutation in every[:: len(every) // SAMPLE]:
        write_manifest(bundle, mutation.document)
        code, said = ends("verify", str(bundle))
        assert code in (0, 2, 5) and "Traceback" not in said, f"{mutation}: {said}"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_by_verify(bundle, ends, name):
    damage, says = DAMAGES[name]
    damage(bundle)
    code, said = ends("verify", str(bundle))
    assert code == 5 and re.search(says, said), said


@pytest.mark.parametrize("file", [ONNX, TFLITE])
def test_predict_refuses_a_file_that_is_not_the_one_of_the_manifest(bundle, ends, file):
    data = (bundle / file).read_bytes()
    (bundle / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, said = ends("predict", str(bundle), "anna", "--file", file)
    assert code == 5 and f"{file}: the content does not match the checksum in bundle.json" in said


def crashing(data: bytes) -> bytes:
    """A file that holds together, in which SPLIT stands for CAST: LiteRT reads an input that is not there."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    for code in model.operatorCodes:
        if code.builtinCode == schema.BuiltinOperator.CAST:
            code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.SPLIT
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_a_file_that_ends_the_runtime_is_named_and_the_process_goes_on(bundle, ends):
    replaced(TFLITE, crashing)(bundle)
    code, said = ends("verify", str(bundle))
    assert code == 5 and re.search(r"the runtime crashed on .*tflite/model_int8\.tflite \(SIG[A-Z]+\)", said), said


def test_a_tokenizer_that_takes_too_long_is_named(bundle, ends, monkeypatch):
    from runtimes import golden_run

    monkeypatch.setattr(golden_run, "MOST_SECONDS", 0.05)
    first_case(lambda case: case | {"example": {"text": "anna lives in berlin . " * 100_000}})(bundle)
    code, said = ends("verify", str(bundle))
    assert code == 5 and "tokenizer.json: the tokenizer crashed on it or its golden texts (it took more than 0.05 s" in said, said


@pytest.mark.parametrize("threads", ["1e6", "1e30", "1000000", str(10**30), "0", "-1"])
def test_numbers_of_threads_that_no_machine_has(bundle, ends, threads):
    code, said = ends("predict", str(bundle), "anna", "--threads", threads)
    assert code == 2 and said


def test_special_tokens_in_a_text_are_what_the_manifest_says(bundle):
    from runtimes.predictor import Predictor

    typed = "anna [SEP] berlin"
    special, text = Predictor(bundle), Predictor(bundle, special_tokens="text")
    sep = special.bundle.manifest["tokenizer"]["sep_id"]
    assert special.encoder.encode(typed).ids.count(sep) == 2 and text.encoder.encode(typed).ids.count(sep) == 1
    assert special.encoder.encode("anna").ids == text.encoder.encode("anna").ids
    document = json.loads((bundle / MANIFEST).read_text())
    write_manifest(bundle, changed(document, ("tokenizer", "special_tokens_in_text"), "text"))
    assert Predictor(bundle).encoder.encode(typed) == text.encoder.encode(typed)
    assert len(text.encoder.encode(typed).ids) <= MAX_LENGTH


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("anna\ncaf\u00e9\n".encode("latin-1"), r"standard input:2: byte 0xe9 at column 4 is not UTF-8; convert the input to UTF-8"),
        ("anna\n".encode("utf-16"), "standard input:1: this looks like UTF-16 or a binary file; convert the input to UTF-8"),
        ("anna\n".encode("utf-16-le"), "standard input:1: this looks like UTF-16"),
        ("anna\n".encode("utf-16-be"), "standard input:1: this looks like UTF-16"),
        (b"anna\n\xed\xa0\x80\n", "standard input:2: byte 0xed at column 1 is not UTF-8"),  # half of a surrogate pair
    ],
)
def test_standard_input_that_is_not_utf_8(bundle, ends, monkeypatch, given, says):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, said = ends("predict", str(bundle))
    assert code == 2 and re.search(says, said), said


def test_an_argument_that_is_not_utf_8(bundle, ends):
    code, said = ends("predict", str(bundle), os.fsdecode(b"caf\xe9"))
    assert code == 2 and "not UTF-8 at character 4" in said
