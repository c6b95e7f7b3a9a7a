"""Write the bundle: the folder that ships. :mod:`runtimes.bundle` specifies and reads it.

No clock, no host name and no absolute path goes in: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.golden import golden_examples, write_golden
from exporters.tokenizer_contract import tokenizer_contract
from runtimes.backends import load_model
from runtimes.bundle import CHECKSUMS, MANIFEST, SCHEMA, file_sha256, write_sums
from runtimes.decode.base import Decoder
from runtimes.session import SessionOptions
from runtimes.text import TextEncoder

PREFERENCE = (
    "tflite/model_int8.tflite", "onnx/model_quantized.onnx", "tflite/model_int4.tflite", "onnx/model_q4.onnx",
    "tflite/model_int8_tflite214.tflite", "tflite/model_fp32.tflite", "onnx/model.onnx",
)  # fmt: skip
"""Small and fast first."""
REFUSED_BY = {"tflite/model_int8.tflite": ["tflite-runtime"], "tflite/model_int4.tflite": ["tflite-runtime"]}
"""Files with scales per channel, which the last tflite-runtime (2.14) does not know."""
LABEL_FILES = {"logits": "labels.txt", "slot_logits": "slots.txt"}
"""Where the names of an output's classes lie; those of another output in a file of its name."""


@dataclass(frozen=True)
class ModelFile:
    """A file to ship: its name in the bundle, where it lies, what is known of it, how to run it, and how it was quantized."""

    name: str
    path: Path
    precision: str
    unique_params: int
    metrics: dict[str, float]
    session: SessionOptions = field(default_factory=SessionOptions)
    quantization: dict[str, Any] | None = None


@dataclass(frozen=True)
class BundleParts:
    """Everything a bundle is made of.

    ``task`` is the manifest's section of that name, which ``decoder`` was made with; ``labels`` are names of classes by output;
    ``tokenizer_folder`` holds the tokenizer files; ``hub_config`` is the config.json that stock transformers reads;
    ``examples`` are real ones to make golden cases of; ``provenance`` goes into the manifest as it is; ``special_tokens`` says what a special
    token that is written in a text becomes (:data:`runtimes.text.SPECIAL_TOKENS`).
    """

    name: str
    version: str
    task: dict[str, Any]
    decoder: Decoder
    models: Sequence[ModelFile]
    labels: Mapping[str, Sequence[str]]
    tokenizer_folder: Path
    pad_id: int
    max_length: int
    hub_config: dict[str, Any]
    recipe_lock: str
    examples: Sequence[Mapping[str, str]]
    provenance: dict[str, Any]
    special_tokens: str = "special"


def in_order_of_preference(models: Sequence[ModelFile]) -> list[ModelFile]:
    """As the manifest lists them; the first is what a client without a wish of its own runs."""
    return sorted(models, key=lambda m: (PREFERENCE.index(m.name) if m.name in PREFERENCE else len(PREFERENCE), m.name))


def write_bundle(folder: Path, parts: BundleParts) -> None:
    """Write all of the bundle but its ``report/`` into the empty ``folder``."""
    models = in_order_of_preference(parts.models)
    for model in models:
        target = folder / model.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.path, target)
    for file in sorted(parts.tokenizer_folder.iterdir()):
        shutil.copyfile(file, folder / file.name)
    _write_json(folder / "config.json", parts.hub_config)
    label_files = {output: LABEL_FILES.get(output, f"{output}.txt") for output in parts.labels}
    for output, names in parts.labels.items():
        (folder / label_files[output]).write_text("".join(name + "\n" for name in names), encoding="utf-8")
    (folder / "recipe.lock.toml").write_text(parts.recipe_lock, encoding="utf-8")

    encoder = TextEncoder(folder / "tokenizer.json", parts.max_length, parts.special_tokens)
    sessions = {m.name: m.session for m in models}
    files = {m.name: folder / m.name for m in models}
    loaded = {name: load_model(path, session=sessions[name]) for name, path in files.items()}
    buckets = {name: list(getattr(model, "buckets", ())) for name, model in loaded.items()}
    edges = sorted({length for lengths in buckets.values() for length in lengths}) or [parts.max_length]
    examples = golden_examples(parts.examples, parts.decoder, encoder, edges)
    tolerances = write_golden(folder / "golden" / "cases.jsonl", examples, parts.decoder, encoder, files, sessions)

    entries = []
    for model in models:
        inputs, outputs = loaded[model.name].tensors()
        path = files[model.name]
        file_format = path.suffix.removeprefix(".")
        entries.append({
            "file": model.name, "format": file_format, "precision": model.precision,
            "buckets": buckets[model.name], "inputs": inputs, "outputs": outputs, "sha256": file_sha256(path),
            "size_bytes": path.stat().st_size, "unique_params": model.unique_params, "metrics": model.metrics,
            "tolerance": tolerances[model.name], "session": model.session.as_manifest(file_format), "refused_by": REFUSED_BY.get(model.name, []),
        } | ({} if model.quantization is None else {"quantization": model.quantization}))  # fmt: skip
    _write_json(folder / MANIFEST, {
        "schema": SCHEMA, "name": parts.name, "generator": {"name": "pocketbert", "version": parts.version},
        "task": parts.task,
        "tokenizer": {"file": "tokenizer.json", "max_length": parts.max_length}
        | tokenizer_contract(folder / "tokenizer.json", parts.pad_id, parts.special_tokens),
        "labels": label_files, "models": entries, "golden": {"file": "golden/cases.jsonl", "count": len(examples)},
        "provenance": parts.provenance, "checksums": CHECKSUMS,
    })  # fmt: skip
    write_sums(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
