"""Golden cases: examples that reach the corners of a bundle, with what its files gave and what was answered where it was made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.backends import load_model
from runtimes.decode.base import Decoder
from runtimes.errors import BadInput
from runtimes.session import SessionOptions
from runtimes.text import Encoding, TextEncoder

CORNERS = (
    "",
    "a",
    "?!",
    "CAPITALS and MiXeD case",
    "caf\u00e9 na\u00efve \u00fcber \u0130stanbul",
    "\u4eca\u5929\u5929\u6c14\u600e\u4e48\u6837",
    "wake me up \U0001f600 at 7:30 \u2014 \u201cplease\u201d",
    "zzyzx qwrtpsdf antidisestablishmentarianism",
    "tab\tand\nnew line   and  spaces",
    "[MASK] [CLS] [SEP]",
)
REAL_EXAMPLES = 16
INT8_TOLERANCE = 0.05
"""Share of the largest |value| by which a quantized file may differ on another processor: rounding of activations differs
with the instructions at hand."""
FP32_TOLERANCE = 1e-3
SMALLEST_SCALE = 0.1
"""A file whose outputs are all smaller has the tolerance of one with this largest |value|."""
TIPPED = 1.5
"""Sums in another order tip an activation's code now and then, and what follows is then rounded anew: two processors differ as far
as quantizing itself moves outputs."""
DECIMALS = 5
Example = Mapping[str, str]
"""What a person gives: a text for each column."""
Results = Mapping[str, np.ndarray]
"""Outputs of one input by name."""


def golden_examples(examples: Sequence[Example], decoder: Decoder, encoder: TextEncoder, buckets: Sequence[int]) -> list[dict[str, str]]:
    """Corner texts, real examples, and for every bucket inputs of one token less, as many, and one more than it holds.

    Corner texts include each special token of the tokenizer, written out between two words: what it becomes is told by
    ``special_tokens_in_text`` of the manifest, and a client's tokenizer must do the same.
    Where an example has several texts, a corner text stands in each column in turn beside real ones. An example that the decoder
    refuses is left out, and at a bucket's edge one that makes several inputs.

    Args:
        examples: real ones; may be empty for a task of one text.
    """
    needed = [column for column in decoder.columns if column not in decoder.optional]
    real = [dict(example) for example in examples[:REAL_EXAMPLES]]
    # Short ones, so that long texts do not fill the bundle.
    partners = sorted(({c: example[c] for c in needed} for example in real), key=lambda partner: sum(map(len, partner.values())))
    partners = partners[: max(1, len(partners) // 2)] or [dict.fromkeys(needed, CORNERS[1])]
    texts = [*CORNERS, *(f"a {token} b" for token in encoder.special_tokens())]
    corners = [partners[i % len(partners)] | {column: corner} for i, corner in enumerate(texts) for column in needed]
    chosen = [example for example in [*corners, *real] if _inputs(decoder, encoder, example)]
    words = [word for example in examples for word in example[needed[-1]].split()]
    for bucket in buckets:
        for wanted in (bucket - 1, bucket, bucket + 1):
            edge = _of_length(words, partners[0], needed[-1], decoder, encoder, wanted)
            if len(_inputs(decoder, encoder, edge)) == 1:
                chosen.append(edge)
    return [dict(items) for items in dict.fromkeys(tuple(example.items()) for example in chosen)]


def _inputs(decoder: Decoder, encoder: TextEncoder, example: Example) -> list[Encoding]:
    """The inputs of an example; none where the decoder refuses it, as it does with a question that fills the window."""
    try:
        return decoder.encode(encoder, example)
    except BadInput:
        return []


def _of_length(words: Sequence[str], partner: Example, column: str, decoder: Decoder, encoder: TextEncoder, tokens: int) -> dict[str, str]:
    """``partner`` with real words in a row in ``column`` that make ``tokens`` tokens; more than the tokenizer keeps if that is what is wanted."""
    taken: list[str] = []
    for word in words:
        inputs = _inputs(decoder, encoder, {**partner, column: " ".join([*taken, word])})
        length = sum(len(encoding.ids) for encoding in inputs)
        if length <= tokens:
            taken.append(word)
        if length >= min(tokens, encoder.max_length):
            break
    extra = max(0, tokens - encoder.max_length)
    return {**partner, column: " ".join(taken + list(words[:extra]))}


def largest_value(results: Iterable[Results]) -> float:
    """Largest |value| of all outputs."""
    return max((float(np.abs(value).max(initial=0.0)) for result in results for value in result.values()), default=0.0)


def golden_tolerance(file: str, largest: float, quantization_error: float = 0.0) -> float:
    """What a value in an output of ``file`` (its name in the bundle) may differ by.

    Args:
        largest: |value| of all outputs.
        quantization_error: largest |difference| from the float32 file of the same format, 0 if there is none to ask.
    """
    share = INT8_TOLERANCE if _is_quantized(file) else FP32_TOLERANCE
    return round(max(max(SMALLEST_SCALE, largest) * share, TIPPED * quantization_error), 6)


def _is_quantized(file: str) -> bool:
    return any(mark in file for mark in ("int8", "quantized", "int4", "q4"))


def write_golden(
    path: Path,
    examples: Sequence[Example],
    decoder: Decoder,
    encoder: TextEncoder,
    files: Mapping[str, Path],
    sessions: Mapping[str, SessionOptions],
) -> dict[str, float]:
    """Run every file on every example and write ``cases.jsonl``.

    Args:
        files: name in the bundle -> path.
        sessions: name in the bundle -> how to run it.

    Returns:
        For each file the tolerance that a verification is to allow.
    """
    models = {name: load_model(file, session=sessions[name]) for name, file in files.items()}
    largest, errors = dict.fromkeys(files, 0.0), dict.fromkeys(files, 0.0)
    exact = {files[name].suffix: name for name in files if not _is_quantized(name)}
    lines = []
    for example in examples:
        inputs = decoder.encode(encoder, example)
        results = {name: [model.run(encoding.ids, encoding.types) for encoding in inputs] for name, model in models.items()}
        for name, own in results.items():
            largest[name] = max(largest[name], largest_value(own))
            if _is_quantized(name) and files[name].suffix in exact:
                errors[name] = max(errors[name], largest_difference(own, results[exact[files[name].suffix]]))
        written = {name: [_rounded(result) for result in own] for name, own in results.items()}
        case = {
            "example": dict(example), "inputs": [{"ids": list(encoding.ids), "types": list(encoding.types)} for encoding in inputs],
            "outputs": written,
            # Of the outputs as they are written, or a reader could decide otherwise between two that are nearly equal.
            "answer": {name: _rounded(decoder.answer(example, inputs, [_arrays(result) for result in own])) for name, own in written.items()},
        }  # fmt: skip
        lines.append(json.dumps(case, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return {name: golden_tolerance(name, largest[name], errors[name]) for name in files}


def largest_difference(got: Sequence[Results], expected: Sequence[Results]) -> float:
    """Largest |difference| of a value, over all outputs of all inputs."""
    pairs = zip(got, expected, strict=True)
    return max((float(np.abs(mine[name] - value).max(initial=0.0)) for mine, wanted in pairs for name, value in wanted.items()), default=0.0)


def _arrays(result: Mapping[str, list]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, np.float32) for name, values in result.items()}


def _rounded(value: Any) -> Any:
    """``value`` as JSON holds it, with ``DECIMALS`` places."""
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return round(value, DECIMALS) if isinstance(value, float) else value
