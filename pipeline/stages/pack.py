"""Put files, tokenizer, labels, golden cases, checksums and the resolved recipe into one folder that ships."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.flow.cache import digest, library_versions
from pipeline.flow.ledger import GATE_SPLIT
from pipeline.flow.stage import Context, Stage
from pipeline.models.config import EncoderConfig
from pipeline.models.hub import hub_config
from pipeline.models.source import read_origin
from pipeline.models.tokenizer_files import TOKENIZER
from pipeline.models.vocabulary_texts import vocabulary_texts
from pipeline.stages.export import DESCRIPTION
from pipeline.stages.file_evaluation import encode_for_files, encodings, file_outputs, joined
from pipeline.stages.quantize import QUANTIZATION
from pipeline.stages.tune import tuned_files, tuned_session
from pipeline.tasks.base import Task
from runtimes.decode import decoder

MOST_EXAMPLES = 200
GENERATED = 25


class Pack(Stage):
    """Make the bundle."""

    use: ClassVar[str] = "pack"
    version: ClassVar[int] = 4
    needs: ClassVar[tuple[str, ...]] = ("model", "exported")
    uses: ClassVar[tuple[str, ...]] = ("source", "quantized", "tuned")
    gives: ClassVar[tuple[str, ...]] = ("bundle",)
    reads_ledger: ClassVar[bool] = True
    effect: ClassVar[str] = "One folder with everything an app needs."

    precisions: list[Literal["fp32", "int8", "int4"]] = Field(["fp32", "int8", "int4"], min_length=1)
    """Precisions of the files that ship."""

    examples: Literal["validation", "generated"] = "validation"
    """What golden cases are made of: rows of validation, which then ship with the bundle, or random words of the vocabulary, for data that may
    not be passed on."""

    special_tokens: Literal["special", "text"] = "special"
    """What a special token becomes that a person types, "[SEP]": that very token, as in training and in stock tokenizers, or the letters that it is
    written with, for apps in which strangers type."""

    def run(self, context: Context) -> None:
        from exporters.bundle import BundleParts, ModelFile, write_bundle

        models, tuned, quantized = [], tuned_files(context), _quantized_files(context)
        for record in context.history:
            for subject in record["subjects"]:
                if subject["file"] is None or subject["precision"] not in self.precisions:
                    continue
                role = "exported" if subject["precision"] == "fp32" else "quantized"
                path = context.folder(role) / subject["file"]
                metrics = tuned.get(subject["file"], {}).get("metrics") or subject["metrics"]
                session = tuned_session(tuned, subject["file"])
                how = quantized.get(subject["file"])
                models.append(ModelFile(subject["file"], path, subject["precision"], subject["unique_params"], metrics, session, how))
        folder = context.folder("exported")
        config = EncoderConfig(**json.loads((context.folder("model") / "config.json").read_text(encoding="utf-8")))
        task, origin = self._settled(context, models), read_origin(context.folder("source"))
        options = task.options(context.data)
        if json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["output"] == "probabilities":
            options["decode"] = "none"
        (context.output / "bundle").mkdir()
        write_bundle(context.output / "bundle", BundleParts(
            name=context.name, version=version("pocketbert"), task=options, models=models, labels=context.data.labels,
            decoder=decoder(task.kind)(options, context.data.labels), tokenizer_folder=folder / "tokenizer",
            pad_id=config.pad_token_id, special_tokens=self.special_tokens, max_length=task.max_length,
            hub_config=hub_config(config) | task.hub_fields(context.data), recipe_lock=context.lock, examples=self._examples(context, folder),
            provenance={
                "model": context.source_name, "revision": origin.revision, "license": origin.license, "data_sha256": context.data.fingerprint,
                "recipe_sha256": digest(context.lock), "libraries": library_versions(),
            },
        ))  # fmt: skip

    def _settled(self, context: Context, models: list[Any]) -> Task:
        """The task with what is chosen on validation rows, by the outputs of the file that a client runs first."""
        from exporters.bundle import in_order_of_preference

        first = in_order_of_preference(models)[0]
        folder = context.folder("exported")
        texts = encode_for_files(context, folder, GATE_SPLIT)
        task = context.task
        if task.settled_by_outputs:
            outputs = joined(file_outputs(first.path, encodings(texts), first.session))
            task = task.settled(outputs, texts, context.data.split(GATE_SPLIT), context.data)
            context.note(task.describe_settled())
        return task

    def _examples(self, context: Context, folder: Path) -> list[dict[str, str]]:
        """What golden cases are made of, as a person would give it."""
        rows = context.data.split(GATE_SPLIT)
        if self.examples == "validation":
            return [context.task.example(row) for row in rows[:MOST_EXAMPLES]]
        return vocabulary_texts((folder / "tokenizer" / TOKENIZER).read_text(encoding="utf-8"), context.task.columns, context.seed, GENERATED)


def _quantized_files(context: Context) -> dict[str, Any]:
    """How each file was quantized, and which tensors were kept in float32, by the file's name; {} where none was."""
    if "quantized" not in context.inputs:
        return {}
    return json.loads((context.folder("quantized") / QUANTIZATION).read_text(encoding="utf-8"))

