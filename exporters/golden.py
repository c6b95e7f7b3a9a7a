"""Golden cases: texts that reach the corners of a bundle, with the answers that its files gave where it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from runtimes.backends import load_model
from runtimes.session import SessionOptions
from runtimes.text import TextEncoder

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
REAL_TEXTS = 16
INT8_TOLERANCE = 0.05
"""Share of the largest |logit| by which a quantized file may differ on another processor: rounding of activations differs
with the instructions at hand."""
FP32_TOLERANCE = 1e-3
TIPPED = 1.5
"""Sums in another order tip an activation's code now and then, and what follows is then rounded anew: two processors differ as far
as quantizing itself moves logits."""


def golden_texts(texts: Sequence[str], encoder: TextEncoder, buckets: Sequence[int]) -> list[str]:
    """Corner texts, real ones, and for every bucket texts of one token less, as many, and one more than it holds."""
    chosen = [*CORNERS, *texts[:REAL_TEXTS]]
    words = [word for text in texts for word in text.split()]
    for bucket in buckets:
        for wanted in (bucket - 1, bucket, bucket + 1):
            chosen.append(_of_length(words, encoder, wanted))
    return list(dict.fromkeys(chosen))


def _of_length(words: Sequence[str], encoder: TextEncoder, tokens: int) -> str:
    """Real words in a row that make ``tokens`` tokens; more than the tokenizer keeps if that is what is wanted."""
    taken: list[str] = []
    for word in words:
        length = len(encoder.encode(" ".join([*taken, word])))
        if length <= tokens:
            taken.append(word)
        if length >= min(tokens, encoder.max_length):
            break
    extra = max(0, tokens - encoder.max_length)
    return " ".join(taken + list(words[:extra]))


def golden_tolerance(file: str, largest_logit: float, quantization_error: float = 0.0) -> float:
    """What a logit of ``file`` (its name in the bundle) may differ by.

    Args:
        largest_logit: of all |logits|.
        quantization_error: largest |difference| from the float32 file of the same format, 0 if there is none to ask.
    """
    share = INT8_TOLERANCE if _is_quantized(file) else FP32_TOLERANCE
    return round(max(max(1.0, largest_logit) * share, TIPPED * quantization_error), 6)


def _is_quantized(file: str) -> bool:
    return any(mark in file for mark in ("int8", "quantized", "int4", "q4"))


def write_golden(
    path: Path, texts: Sequence[str], encoder: TextEncoder, files: dict[str, Path], labels: Sequence[str], sessions: Mapping[str, SessionOptions]
) -> dict[str, float]:
    """Run every file on every text and write ``cases.jsonl``.

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
    for text in texts:
        ids = encoder.encode(text)
        logits = {name: np.asarray(model.logits(ids), dtype=np.float32) for name, model in models.items()}
        for name, row in logits.items():
            largest[name] = max(largest[name], float(np.abs(row).max()))
            if _is_quantized(name) and files[name].suffix in exact:
                errors[name] = max(errors[name], float(np.abs(row - logits[exact[files[name].suffix]]).max()))
        case = {
            "text": text, "ids": ids, "label": {name: labels[int(row.argmax())] for name, row in logits.items()},
            "logits": {name: [round(float(x), 5) for x in row] for name, row in logits.items()},
        }  # fmt: skip
        lines.append(json.dumps(case, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return {name: golden_tolerance(name, largest[name], errors[name]) for name in files}
