"""Write the bundle: the folder that ships. :mod:`runtimes.bundle` specifies and reads it.

No clock, no host name and no absolute path goes in: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.golden import golden_texts, write_golden
from runtimes.backends import load_model
from runtimes.bundle import CHECKSUMS, MANIFEST, SCHEMA, file_sha256, write_sums
from runtimes.session import SessionOptions
from runtimes.text import TextEncoder

PREFERENCE = (
    "tflite/model_int8.tflite", "onnx/model_quantized.onnx", "tflite/model_int4.tflite", "onnx/model_q4.onnx",
    "tflite/model_int8_tflite214.tflite", "tflite/model_fp32.tflite", "onnx/model.onnx",
)  # fmt: skip
"""Small and fast first: what a client without a wish of its own runs."""
REFUSED_BY = {"tflite/model_int8.tflite": ["tflite-runtime"], "tflite/model_int4.tflite": ["tflite-runtime"]}
"""Files with scales per channel, which the last tflite-runtime (2.14) does not know."""


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

    ``tokenizer_folder`` holds the tokenizer files; ``hub_config`` is the config.json that stock transformers reads;
    ``texts`` are real texts to make golden cases of; ``provenance`` goes into the manifest as it is.
    """

    name: str
    version: str
    task: str
    models: Sequence[ModelFile]
    labels: Sequence[str]
    tokenizer_folder: Path
    tokenizer_info: dict[str, Any]
    max_length: int
    hub_config: dict[str, Any]
    recipe_lock: str
    texts: Sequence[str]
    provenance: dict[str, Any]


def write_bundle(folder: Path, parts: BundleParts) -> None:
    """Write all of the bundle but its ``report/`` into the empty ``folder``."""
    models = sorted(parts.models, key=lambda m: (PREFERENCE.index(m.name) if m.name in PREFERENCE else len(PREFERENCE), m.name))
    for model in models:
        target = folder / model.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.path, target)
    for file in sorted(parts.tokenizer_folder.iterdir()):
        shutil.copyfile(file, folder / file.name)
    _write_json(folder / "config.json", parts.hub_config)
    (folder / "labels.txt").write_text("".join(label + "\n" for label in parts.labels), encoding="utf-8")
    (folder / "recipe.lock.toml").write_text(parts.recipe_lock, encoding="utf-8")

    encoder = TextEncoder(folder / "tokenizer.json", parts.max_length)
    sessions = {m.name: m.session for m in models}
    files = {m.name: folder / m.name for m in models}
    loaded = {name: load_model(path, session=sessions[name]) for name, path in files.items()}
    buckets = {name: list(getattr(model, "buckets", ())) for name, model in loaded.items()}
    edges = sorted({length for lengths in buckets.values() for length in lengths}) or [parts.max_length]
    texts = golden_texts(parts.texts, encoder, edges)
    tolerances = write_golden(folder / "golden" / "cases.jsonl", texts, encoder, files, parts.labels, sessions)

    entries, results = [], set()
    for model in models:
        inputs, outputs = loaded[model.name].tensors()
        results |= {item["name"] for item in outputs}
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
        "task": {"kind": parts.task, "decode": "none" if results == {"probabilities"} else "softmax"},
        "tokenizer": {"file": "tokenizer.json", "max_length": parts.max_length} | parts.tokenizer_info,
        "labels": "labels.txt", "models": entries, "golden": {"file": "golden/cases.jsonl", "count": len(texts)},
        "provenance": parts.provenance, "checksums": CHECKSUMS,
    })  # fmt: skip
    write_sums(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
