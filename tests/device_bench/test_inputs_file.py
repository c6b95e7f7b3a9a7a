"""Inputs files as ``agent/agent.py`` specifies them: byte for byte, there and back, and what is refused. The C reader has the same cases."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from device_bench.agent.agent import AgentError, read_inputs, write_inputs
from tests.device_bench.conftest import INPUTS, assert_outputs, pairs, reference_outputs


def name(text: str) -> bytes:
    return text.encode().ljust(64, b"\0")


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


PLAIN = b"PBI3" + words(2, 0) + words(0, 2, 5) + words(1, 2, 3, 4, 5) + words(0, 1, 0, 0, 1)
WITH_OUTPUTS = (
    b"PBI3" + words(2, 2) + PLAIN[12:]
    + name("logits") + words(0) + words(0, 1, 2) + floats(0.5, -0.5)
    + name("tags") + words(2) + words(0, 4, 10) + floats(*range(10))
)  # fmt: skip
DAMAGES = {
    "empty": lambda b: b"",
    "a part of its head": lambda b: b[:8],
    "a byte short": lambda b: b[:-1],
    "a word short": lambda b: b[:-4],
    "a word long": lambda b: b + b"0000",
    "of version 2": lambda b: b[4:],
    "no inputs": lambda b: b[:4] + words(0) + b[8:],
    "fewer than no inputs": lambda b: b[:4] + words(-1) + b[8:],
    "more inputs than there is room for": lambda b: b[:4] + words(0x7FFFFFFF) + b[8:],
    "fewer than no outputs": lambda b: b[:8] + words(-1) + b[12:],
    "more outputs than there is room for": lambda b: b[:8] + words(0x7FFFFFFF) + b[12:],
    "offsets from 1": lambda b: b[:12] + words(1) + b[16:],
    "an empty input": lambda b: b[:16] + words(0) + b[20:],
    "offsets that fall": lambda b: b[:20] + words(1) + b[24:],
    "offsets that wrap around": lambda b: b[:16] + words(0x7FFFFFFF, -0x80000000) + b[24:],
    "more ids than there is room for": lambda b: b[:20] + words(0x7FFFFFFF) + b[24:],
}
OUTPUT_DAMAGES = {
    "no name": lambda b: b.replace(name("logits"), bytes(64)),
    "a name without an end": lambda b: b.replace(name("logits"), b"x" * 64),
    "something behind a name": lambda b: b.replace(name("logits"), name("logits")[:-1] + b"x"),
    "names out of order": lambda b: b.replace(name("logits"), name("zlogits")),
    "a name twice": lambda b: b.replace(name("logits"), name("tags")),
    "a width below 0": lambda b: b.replace(name("tags") + words(2), name("tags") + words(-2)),
    "rows that are cut": lambda b: b.replace(name("tags") + words(2), name("tags") + words(3)),
    "an output of nothing": lambda b: b.replace(words(0, 1, 2) + floats(0.5), words(0, 0, 2) + floats(0.5)),
    "more values than there is room for": lambda b: b.replace(words(0, 4, 10), words(0, 4, 0x7FFFFFFE)),
}


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (None, PLAIN),
        ([{"tags": [[0, 1], [2, 3]], "logits": [0.5]}, {"logits": [-0.5], "tags": np.arange(4, 10).reshape(3, 2)}], WITH_OUTPUTS),
    ],
)
def test_bytes(outputs, expected, tmp_path):
    write_inputs(tmp_path / "f", [([1, 2], [0, 1]), (np.array([3, 4, 5]), [0, 0, 1])], outputs)
    assert (tmp_path / "f").read_bytes() == expected


def test_there_and_back(tmp_path):
    write_inputs(tmp_path / "f", pairs(INPUTS), reference_outputs())
    inputs, outputs = read_inputs(str(tmp_path / "f"))
    assert [(ids.tolist(), types.tolist()) for ids, types in inputs] == pairs(INPUTS)
    assert_outputs(outputs, reference_outputs(), atol=0)
    write_inputs(tmp_path / "again", inputs, outputs)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "f").read_bytes()


def test_names_of_any_letters_in_the_order_of_their_bytes(tmp_path):
    names = ["ö", "z", "Z", "a" * 63, "𐀀", "\uffff"]
    write_inputs(tmp_path / "f", [([1], [0])], [{one: [1.0] for one in names}])
    assert list(read_inputs(str(tmp_path / "f"))[1][0]) == sorted(names, key=str.encode)


def test_without_outputs_every_input_has_none(tmp_path):
    write_inputs(tmp_path / "f", pairs(INPUTS))
    assert read_inputs(str(tmp_path / "f"))[1] == [{}] * len(INPUTS)


@pytest.mark.parametrize(("content", "damage"), [(PLAIN, one) for one in DAMAGES] + [(WITH_OUTPUTS, one) for one in (*DAMAGES, *OUTPUT_DAMAGES)])
def test_damaged_files(content, damage, tmp_path):
    damaged = (DAMAGES | OUTPUT_DAMAGES)[damage](content)
    assert damaged != content
    (tmp_path / "f").write_bytes(damaged)
    with pytest.raises(AgentError, match="bytes that are no inputs file") as caught:
        read_inputs(str(tmp_path / "f"))
    assert caught.value.kind == "bad_job"


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([], None),
        ([([], [])], None),
        ([([1, 2], [0])], None),
        ([([1], [0])], []),
        ([([1], [0]), ([2], [0])], [{"a": [1]}, {"b": [1]}]),
        ([([1], [0])], [{"a" * 64: [1]}]),
        ([([1], [0])], [{"": [1]}]),
        ([([1], [0])], [{"a": 1.0}]),
        ([([1], [0])], [{"a": []}]),
        ([([1], [0])], [{"a": [[[1]]]}]),
        ([([1], [0]), ([2], [0])], [{"a": [[1, 2]]}, {"a": [[1]]}]),
    ],
)
def test_what_no_file_can_hold(inputs, outputs, tmp_path):
    with pytest.raises(ValueError):
        write_inputs(tmp_path / "f", inputs, outputs)
    assert not (tmp_path / "f").exists()
