"""Put files, tokenizer, labels, golden cases, checksums and the resolved recipe into one folder that ships."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.cache import digest, library_versions
from pipeline.models.config import EncoderConfig
from pipeline.models.hub import hub_config
from pipeline.recipe import lock_text
from pipeline.stage import Context, Stage


class Pack(Stage):
    """Make the bundle."""

    use: ClassVar[str] = "pack"
    needs: ClassVar[tuple[str, ...]] = ("model", "exported")
    uses: ClassVar[tuple[str, ...]] = ("quantized",)
    gives: ClassVar[tuple[str, ...]] = ("bundle",)
    reads_ledger: ClassVar[bool] = True
    effect: ClassVar[str] = "One folder with everything an app needs."

    precisions: list[Literal["fp32", "int8"]] = Field(["fp32", "int8"], min_length=1)
    """Which files to ship."""

    def run(self, context: Context) -> None:
        from exporters.bundle import BundleParts, ModelFile, write_bundle

        models = []
        for record in context.history:
            for subject in record["subjects"]:
                if subject["file"] is None or subject["precision"] not in self.precisions:
                    continue
                role = "exported" if subject["precision"] == "fp32" else "quantized"
                path = context.folder(role) / subject["file"]
                models.append(ModelFile(subject["file"], path, subject["precision"], subject["unique_params"], subject["accuracy"]))
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


def tokenizer_info(folder: Any, pad_id: int) -> dict[str, Any]:
    """What a client that tokenizes by itself has to know."""
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    normalizer = state.get("normalizer") or {}
    info = {"type": state["model"]["type"].lower(), "pad_id": pad_id, "lowercase": bool(normalizer.get("lowercase"))}
    return info | ({"vocab_file": "vocab.txt"} if state["model"]["type"] == "WordPiece" else {})
