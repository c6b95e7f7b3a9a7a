"""Put files, tokenizer, labels, golden cases, checksums and the resolved recipe into one folder that ships."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.flow.cache import digest, library_versions
from pipeline.flow.recipe import lock_text
from pipeline.flow.stage import Context, Stage
from pipeline.models.config import EncoderConfig
from pipeline.models.hub import hub_config
from pipeline.stages.quantize import QUANTIZATION
from pipeline.stages.tune import tuned_files, tuned_session


class Pack(Stage):
    """Make the bundle."""

    use: ClassVar[str] = "pack"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("model", "exported")
    uses: ClassVar[tuple[str, ...]] = ("quantized", "tuned")
    gives: ClassVar[tuple[str, ...]] = ("bundle",)
    reads_ledger: ClassVar[bool] = True
    effect: ClassVar[str] = "One folder with everything an app needs."

    precisions: list[Literal["fp32", "int8", "int4"]] = Field(["fp32", "int8", "int4"], min_length=1)
    """Which files to ship."""

    def run(self, context: Context) -> None:
        from exporters.bundle import BundleParts, ModelFile, write_bundle

        models, tuned, quantized = [], tuned_files(context), _quantized_files(context)
        for record in context.history:
            for subject in record["subjects"]:
                if subject["file"] is None or subject["precision"] not in self.precisions:
                    continue
                role = "exported" if subject["precision"] == "fp32" else "quantized"
                path = context.folder(role) / subject["file"]
                metrics = tuned.get(subject["file"], {}).get("metrics") or subject["accuracy"]
                session = tuned_session(tuned, subject["file"])
                how = quantized.get(subject["file"])
                models.append(ModelFile(subject["file"], path, subject["precision"], subject["unique_params"], metrics, session, how))
        tokenizer_folder = context.folder("exported") / "tokenizer"
        config = EncoderConfig(**json.loads((context.folder("model") / "config.json").read_text(encoding="utf-8")))
        lock = lock_text(context.recipe)
        folder = context.output / "bundle"
        folder.mkdir()
        write_bundle(folder, BundleParts(
            name=context.recipe.name, version=version("pocketbert"), task=context.task.kind, models=models,
            labels=context.data.labels, tokenizer_folder=tokenizer_folder,
            tokenizer_info=tokenizer_info(tokenizer_folder, config.pad_token_id), max_length=context.task.max_length,
            hub_config=hub_config(config), recipe_lock=lock, texts=[row.text for row in context.data.validation],
            provenance={
                "model": context.recipe.model.source, "data_sha256": context.data.fingerprint,
                "recipe_sha256": digest(lock), "libraries": library_versions(),
            },
        ))  # fmt: skip


def _quantized_files(context: Context) -> dict[str, Any]:
    """How each file was quantized, and which tensors were kept in float32, by the file's name; {} where none was."""
    if "quantized" not in context.inputs:
        return {}
    return json.loads((context.folder("quantized") / QUANTIZATION).read_text(encoding="utf-8"))


def tokenizer_info(folder: Any, pad_id: int) -> dict[str, Any]:
    """What a client that tokenizes by itself has to know."""
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    normalizer = state.get("normalizer") or {}
    info = {"type": state["model"]["type"].lower(), "pad_id": pad_id, "lowercase": bool(normalizer.get("lowercase"))}
    return info | ({"vocab_file": "vocab.txt"} if state["model"]["type"] == "WordPiece" else {})
