"""Bundles with something wrong in them: every leaf of a manifest changed in turn, damaged golden cases, tokenizers and files.

A whole bundle is written by the exporter itself, of files with tables in place of a model, so that its manifest has every key.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.bundle import BundleParts, ModelFile, write_bundle
from runtimes.bundle import MANIFEST, write_sums
from runtimes.decode import decoder
from tests.runtimes.tiny_files import random_tables, write_onnx, write_tflite

REMOVED = object()
VALUES: dict[str, Any] = {
    "removed": REMOVED, "null": None, "true": True, "negative": -1, "zero": 0, "fraction": 1.5, "2^31": 2**31, "10^30": 10**30, "1e308": 1e308,
    "nan": float("nan"), "empty": "", "text": "x", "long": "x" * 100_000, "surrogate": "\ud800", "NUL": "a\0b", "up": "../x", "list": [],
    "list of null": [None], "list of huge": [10**30], "table": {}, "table of null": {"x": None}, "deep": [[[[[[[[[[[[]]]]]]]]]]]],
}  # fmt: skip
"""What every leaf becomes in turn."""
LABELS = ["on", "off", "music"]
MAX_LENGTH = 12


@dataclass(frozen=True)
class Mutation:
    """A manifest with one place changed; ``place`` is the path to it."""

    place: tuple[str | int, ...]
    value: str
    document: dict[str, Any]

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.place))} = {self.value}"


def whole_bundle(folder: Path, tokenizer_file: Path, pieces: int) -> Path:
    """Write a bundle of a classifier with an ONNX and a TFLite file."""
    tables = random_tables({"logits": len(LABELS)}, {}, types=False, pieces=pieces)
    source, bundle = folder / "source", folder / "bundle"
    for made in (source / "tokenizer", bundle):
        made.mkdir(parents=True)
    (source / "tokenizer" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    how = {"scheme": "int8-dynamic", "smooth": None, "rules": [["x", "int8"]], "kept_float32": ["x"], "validation": {"needed": 1.0}}
    metrics = {"validation": {"accuracy": 66.667}}
    files = [
        ModelFile("tflite/model_int8.tflite", write_tflite(source / "m.tflite", tables, [8, MAX_LENGTH]), "int8", 12, metrics, quantization=how),
        ModelFile("onnx/model.onnx", write_onnx(source / "m.onnx", tables), "fp32", 12, metrics),
    ]
    options = {"kind": "text-classification", "columns": ["text"], "segments": 1, "decode": "softmax", "multi_label": False, "threshold": None}
    labels = {"logits": LABELS}
    write_bundle(bundle, BundleParts(
        name="tiny", version="0", task=options, decoder=decoder(options["kind"])(options, labels), models=files, labels=labels,
        tokenizer_folder=source / "tokenizer", pad_id=0, max_length=MAX_LENGTH, hub_config={}, recipe_lock="",
        examples=[{"text": "anna lives in berlin"}], provenance={"model": "x", "data_sha256": "0", "libraries": {"numpy": "2"}},
    ))  # fmt: skip
    return bundle


def places(document: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path to every value of a document, tables and lists included."""
    if at:
        yield at
    for key, value in document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ():
        yield from places(value, (*at, key))


def mutations(document: dict[str, Any], seed: int, each: int) -> Iterator[Mutation]:
    """``each`` changes of every place, drawn at random; one of them removes it."""
    source = random.Random(seed)
    for place in places(document):
        for name in ("removed", *source.sample([name for name in VALUES if name != "removed"], each - 1)):
            yield Mutation(place, name, changed(document, place, VALUES[name]))


def changed(document: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """A copy of ``document`` with another value at ``place``."""
    copied = copy.deepcopy(document)
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copied


def write_manifest(bundle: Path, document: Any) -> None:
    """Put ``document`` in place of the manifest, with checksums that fit."""
    (bundle / MANIFEST).write_text(json.dumps(document))
    write_sums(bundle)


def first_case(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Damage of a bundle: its first golden case becomes what ``change`` makes of it."""

    def damage(bundle: Path) -> None:
        path = bundle / "golden" / "cases.jsonl"
        first, others = path.read_text(encoding="utf-8").split("\n", 1)
        path.write_text(json.dumps(change(json.loads(first))) + "\n" + others, encoding="utf-8")
        write_sums(bundle)

    return damage


def replaced(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Damage of a bundle: a file has other bytes, and checksums and manifest are made to fit."""

    def damage(bundle: Path) -> None:
        from runtimes.bundle import file_sha256

        path = bundle / name
        path.write_bytes(change(path.read_bytes()))
        document = json.loads((bundle / MANIFEST).read_text())
        for entry in document["models"]:
            entry["sha256"] = file_sha256(bundle / entry["file"])
        write_manifest(bundle, document)

    return damage


TFLITE, ONNX = "tflite/model_int8.tflite", "onnx/model.onnx"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "case null": (first_case(lambda case: None), "cases.jsonl:1: None is not a table"),
    "case list": (first_case(lambda case: []), r"cases.jsonl:1: \[\] is not a table"),
    "case empty": (first_case(lambda case: {}), "cases.jsonl:1: example is missing"),
    "no inputs": (first_case(lambda case: case | {"inputs": []}), "outputs for 0 inputs"),
    "inputs null": (first_case(lambda case: case | {"inputs": None}), "inputs: None is not a list of tables"),
    "ids of text": (first_case(lambda case: changed(case, ("inputs", 0, "ids"), "ids")), "ids: 'ids' is not a list of whole numbers"),
    "ids too wide": (first_case(lambda case: changed(case, ("inputs", 0, "ids", 0), 2**31)), "ids: .* is not a list of whole numbers of 0 to"),
    "ids too short": (first_case(lambda case: changed(case, ("inputs", 0, "ids"), [2])), "1 ids with 2 types"),
    "output too short": (first_case(lambda case: changed(case, ("outputs", ONNX, 0, "logits"), [1.0])), "gives 1 classes, the bundle names 3"),
    "output of text": (first_case(lambda case: changed(case, ("outputs", ONNX, 0, "logits"), "x")), "outputs that are no arrays of numbers"),
    "output huge": (first_case(lambda case: changed(case, ("outputs", ONNX, 0, "logits", 0), 10**400)), "outputs that are no arrays of numbers"),
    "output nan": (first_case(lambda case: changed(case, ("outputs", ONNX, 0, "logits", 0), float("nan"))), "numbers that are not finite"),
    "answer list": (first_case(lambda case: changed(case, ("answer", ONNX), [])), r"answer: onnx/model.onnx: \[\] is not a table"),
    "answer huge": (first_case(lambda case: changed(case, ("answer", ONNX, "probability"), 10**400)), "its outputs are decoded as"),
    "a case fewer": (replaced("golden/cases.jsonl", lambda data: data.split(b"\n", 1)[1]), r"\d+ golden cases; bundle.json promises \d+"),
    "labels too short": (replaced("labels.txt", lambda data: b"on\n"), "logits has 3 classes, and its file of labels names 1"),
    "labels not UTF-8": (replaced("labels.txt", lambda data: b"\xff\xfe"), "labels.txt: cannot be read"),
    "tokenizer empty": (replaced("tokenizer.json", lambda data: b""), "tokenizer.json: not a tokenizer file"),
    "tflite cut off": (replaced(TFLITE, lambda data: data[: len(data) // 2]), "model_int8.tflite: the TFLite file is damaged or cut off"),
    "onnx cut off": (replaced(ONNX, lambda data: data[: len(data) // 2]), "model.onnx: the ONNX file is damaged or cut off"),
}
"""What is done to a bundle, and what ``verify`` says to it."""
