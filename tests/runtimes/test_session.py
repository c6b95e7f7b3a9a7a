"""Options of a runtime as a manifest carries them: read, refused, and obeyed."""

from __future__ import annotations

import pytest

from runtimes.errors import IntegrityError
from runtimes.session import SessionOptions


def test_what_is_left_out_has_its_default():
    assert SessionOptions.read(None, "m") == SessionOptions.read({}, "m") == SessionOptions()
    assert SessionOptions.read({"threads": 2}, "m") == SessionOptions(threads=2)


def test_unknown_keys_and_entries_are_ignored():
    raw = {"future": [1], "config": {"session.set_denormal_as_zero": "1", "ep.context_enable": "1", "session.future": 7}}
    assert SessionOptions.read(raw, "m") == SessionOptions(config={"session.set_denormal_as_zero": "1"})


@pytest.mark.parametrize("file_format", ["onnx", "tflite"])
def test_a_manifest_gives_back_what_was_written(file_format):
    options = {
        "onnx": SessionOptions(2, "basic", False, False, {"session.set_denormal_as_zero": "1", "session.intra_op.allow_spinning": "0"}),
        "tflite": SessionOptions(threads=4, weight_cache="none"),
    }[file_format]
    assert SessionOptions.read(options.as_manifest(file_format), "m") == options


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ([], r"session: \[\] is not a table"),
        ({"threads": 0}, r"session\.threads: 0 "),
        ({"threads": True}, r"session\.threads: True "),
        ({"threads": 1.5}, r"session\.threads: 1\.5 "),
        ({"threads": 10**9}, r"session\.threads: 1000000000 "),
        ({"graph_optimization_level": "most"}, r"session\.graph_optimization_level: 'most' "),
        ({"graph_optimization_level": ["all"]}, r"session\.graph_optimization_level: \['all'\] "),
        ({"memory_pattern": "yes"}, r"session\.memory_pattern: 'yes' "),
        ({"memory_arena": 1}, r"session\.memory_arena: 1 "),
        ({"weight_cache": "/tmp/cache"}, r"session\.weight_cache: '/tmp/cache' "),
        ({"config": "x"}, r"session\.config: 'x' is not a table"),
        ({"config": {"session.set_denormal_as_zero": True}}, r"session\.config\.session\.set_denormal_as_zero: True "),
    ],
)
def test_nonsense_is_refused_with_its_place(raw, says):
    with pytest.raises(IntegrityError, match=r"^bundle\.json: model\.onnx: " + says):
        SessionOptions.read(raw, "bundle.json: model.onnx")
