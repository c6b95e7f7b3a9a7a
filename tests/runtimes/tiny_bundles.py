"""A whole bundle of each task, made of tiny files with tables in place of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtimes.backends import load_model
from runtimes.bundle import MANIFEST, SCHEMA, open_bundle, write_sums
from runtimes.text import TextEncoder
from tests.runtimes.tiny_files import random_tables, write_onnx, write_tflite

MAX_LENGTH = 20
BUCKETS = [8, MAX_LENGTH]
FILES = ("onnx/model.onnx", "tflite/model_fp32.tflite")
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
LONG = "Anna lives in Köln, the city of light. " * 3
ONE = [{"text": text} for text in ("Anna lives in Köln.", "", "今天 \U0001f600 a\u2028b\x85", LONG)]
TWO = [{"text": "anna", "text_pair": "berlin"}, {"text": LONG, "text_pair": LONG}, {"text": "", "text_pair": ""}]
PAIR = {"columns": ["text", "text_pair"], "segments": 2}

TASKS: dict[str, dict[str, Any]] = {
    "text-classification": {
        "outputs": ({"logits": 3}, {}), "labels": {"logits": ["on\x85", "off", "music"]}, "examples": ONE, "options": {"threshold": 0.5},
    },
    "pairs": {"outputs": ({"logits": 2}, {"slot_logits": 2}), "labels": {"logits": ["same", "other"]}, "examples": TWO, "options": PAIR},
    "multi-label": {
        "outputs": ({"probabilities": 2}, {}), "labels": {"logits": ["a", "b"]}, "examples": ONE,
        "options": {"decode": "none", "multi_label": True, "threshold": 0.2},
    },
    "text-regression": {"outputs": ({"logits": 1}, {}), "labels": {}, "examples": TWO, "options": PAIR | {"decode": "none"}},
    "token-classification": {"outputs": ({}, {"logits": 5}), "labels": {"logits": TAGS}, "examples": ONE, "options": {}},
    "intent-and-slots": {
        "outputs": ({"logits": 2}, {"slot_logits": 5}), "labels": {"logits": ["go", "stop"], "slot_logits": TAGS}, "examples": ONE, "options": {},
    },
    "question-answering": {
        "outputs": ({}, {"start_logits": None, "end_logits": None}), "labels": {},
        "examples": [{"question": "who lives in?", "context": context} for context in (LONG, "anna", "")],
        "options": {"columns": ["question", "context"], "segments": 2, "decode": "none", "stride": 4, "longest_answer": 5, "no_answer": True},
    },
    "sentence-embedding": {"outputs": ({"sentence_embedding": 6}, {}), "labels": {}, "examples": [*ONE, *TWO], "options": {"decode": "none"}},
}  # fmt: skip
KINDS = {"pairs": "text-classification", "multi-label": "text-classification"}


def write_bundle(folder: Path, task: str, tokenizer_file: Path, pieces: int) -> Path:
    """Write a bundle whose golden cases are what its files give here."""
    given = TASKS[task]
    options = {"kind": KINDS.get(task, task), "columns": ["text"], "segments": 1, "decode": "softmax"} | given["options"]
    tables = random_tables(*given["outputs"], types=options["segments"] == 2, pieces=pieces)
    write_onnx(folder / FILES[0], tables)
    write_tflite(folder / FILES[1], tables, BUCKETS)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    labels = {output: f"{output}.txt" for output in given["labels"]}
    for output, names in given["labels"].items():
        (folder / labels[output]).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    (folder / "golden").mkdir()
    (folder / "golden" / "cases.jsonl").touch()
    entries = [
        {"file": file, "format": file.rpartition(".")[2], "precision": "fp32", "buckets": [], "tolerance": 1e-3, "metrics": {}} for file in FILES
    ]
    manifest = {
        "schema": SCHEMA, "name": task, "task": options, "tokenizer": {"file": "tokenizer.json", "max_length": MAX_LENGTH}, "labels": labels,
        "models": entries, "golden": {"file": "golden/cases.jsonl", "count": len(given["examples"])},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "golden" / "cases.jsonl").write_text("".join(_cases(folder, given["examples"])), encoding="utf-8")
    write_sums(folder)
    return folder


def _cases(folder: Path, examples: list[dict[str, str]]) -> list[str]:
    bundle = open_bundle(folder)
    decoder, encoder = bundle.decoder(), TextEncoder(bundle.tokenizer_file, bundle.max_length)
    models, lines = {file: load_model(folder / file) for file in FILES}, []
    for example in examples:
        inputs = decoder.encode(encoder, example)
        outputs = {file: [model.run(one.ids, one.types) for one in inputs] for file, model in models.items()}
        case = {
            "example": example, "inputs": [{"ids": one.ids, "types": one.types} for one in inputs],
            "outputs": {file: [{name: values.tolist() for name, values in one.items()} for one in of_file] for file, of_file in outputs.items()},
            "answer": {file: decoder.answer(example, inputs, of_file) for file, of_file in outputs.items()},
        }  # fmt: skip
        lines.append(json.dumps(case, ensure_ascii=False) + "\n")
    return lines
