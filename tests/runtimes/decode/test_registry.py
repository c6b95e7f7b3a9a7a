"""Decoders are found by kind, built in or by plug-in, imported when asked for; what a person gives becomes an example by column."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoints

import pytest

from runtimes import decode
from runtimes.decode import DECODERS, decoder
from runtimes.decode.base import Decoder
from runtimes.errors import BadInput


@pytest.mark.parametrize("kind", DECODERS.built_in)
def test_a_kind_names_its_class(kind):
    found = decoder(kind)
    assert issubclass(found, Decoder) and found.kind == kind
    assert found.answer is not Decoder.answer and found.line is not Decoder.line
    assert found.answer.__doc__ or found.__doc__


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(BadInput, match=r"task kind 'text-generation': no decoder for it .*text-classification, .*pocketbert\.decoders"):
        decoder("text-generation")


PLUG_IN = """
import numpy as np
from runtimes.decode.base import Decoder, output

class Length(Decoder):
    kind = "text-length"
    def answer(self, example, encodings, outputs):
        return {"tokens": len(encodings[0].ids)}
    def line(self, answer):
        return str(answer["tokens"])
"""


def test_a_package_adds_a_kind_by_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "length_plug_in.py").write_text(PLUG_IN)
    described = tmp_path / "length_plug_in-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: length-plug-in\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[pocketbert.decoders]\ntext-length = length_plug_in:Length\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = decoder("text-length")({"kind": "text-length", "columns": ["text"], "segments": 1, "decode": "none"}, {})
    assert found.example("a") == {"text": "a"}
    with pytest.raises(BadInput, match="sentence-embedding, text-length"):
        decoder("other")


IMPORTS = """
import sys
kinds = set(sys.argv[1:])
import runtimes.bundle, runtimes.predictor, runtimes.verify
from runtimes.decode import decoder
print(sorted(kinds & set(sys.modules)), [m for m in ("importlib.metadata", "onnxruntime", "ai_edge_litert") if m in sys.modules])
decoder("text-regression")
print(sorted(kinds & set(sys.modules)))
"""


def test_importing_stays_cheap():
    """No decoder, no runtime and no package metadata before one is asked for; then only that one."""
    kinds = [place.partition(":")[0] for place in DECODERS.built_in.values()]
    # Without site: files that editable installs leave there import package metadata themselves.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-S", "-c", IMPORTS, *kinds], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["[] []", "['runtimes.decode.text_regression']"]


def made(kind: str, columns: list[str]) -> Decoder:
    options = {"kind": kind, "columns": columns, "segments": len(columns), "decode": "softmax", "stride": 1, "longest_answer": 1}
    return decoder(kind)(options, {"logits": ["a"], "slot_logits": ["O"]})


def test_an_example_is_a_text_a_tuple_or_a_mapping():
    single, pair = made("text-classification", ["text"]), made("text-classification", ["text", "text_pair"])
    assert single.example("a") == single.example(["a"]) == single.example({"text": "a"}) == {"text": "a"}
    assert pair.example(("a", "b")) == pair.example({"text_pair": "b", "text": "a"}) == {"text": "a", "text_pair": "b"}
    assert list(pair.example({"text_pair": "b", "text": "a"})) == ["text", "text_pair"], "in the order of the columns"


@pytest.mark.parametrize(
    ("kind", "columns", "given", "says"),
    [
        ("text-classification", ["text"], ("a", "b"), "2 texts given; text-classification takes text$"),
        ("text-classification", ["text", "text_pair"], "a", "1 text given; text-classification takes text, text_pair$"),
        ("question-answering", ["question", "context"], {"question": "a"}, "context missing; question-answering takes question, context"),
        ("text-classification", ["text"], {"text": "a", "label": "b"}, "label unknown"),
        ("text-classification", ["text"], {}, "text missing"),
        ("text-classification", ["text"], (), "0 texts given"),
        ("text-classification", ["text"], {"text": 3}, "text: 3 is not a text"),
        ("text-classification", ["text"], [None], "text: None is not a text"),
        ("text-classification", ["text"], None, "None is no example"),
        ("text-classification", ["text"], 7, "7 is no example"),
        ("sentence-embedding", ["text"], ("a", "b", "c"), r"takes text, text_pair \(may be left out\)"),
        ("sentence-embedding", ["text"], {"text_pair": "b"}, "text missing"),
    ],
)
def test_examples_of_other_columns_are_refused(kind, columns, given, says):
    with pytest.raises(BadInput, match=says):
        made(kind, columns).example(given)


def test_entry_points_are_not_asked_for_what_is_built_in(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: EntryPoints([]))
    assert decode.decoder("text-regression").kind == "text-regression"
    with pytest.raises(BadInput):
        decode.decoder("x")
