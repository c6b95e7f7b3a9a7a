"""Write the model as ONNX and TFLite, and prove that the files compute what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from pipeline.checkpoint import Checkpoint, copy_tokenizer
from pipeline.models.encoder import count_unique_parameters
from pipeline.stage import Context, Stage, Subject
from runtimes.backends import load_model
from runtimes.text import TextEncoder

PARITY_TEXTS = 128


class Export(Stage):
    """Write ONNX and TFLite files in full precision; the baseline is written as ONNX beside them."""

    use: ClassVar[str] = "export"
    needs: ClassVar[tuple[str, ...]] = ("model", "baseline")
    gives: ClassVar[tuple[str, ...]] = ("exported", "baseline_file")
    effect: ClassVar[str] = "The same function in files that run without Python."

    formats: list[Literal["onnx", "tflite"]] = Field(["onnx", "tflite"], min_length=1)
    """Files to write."""
    buckets: list[int] = [16, 32, 64]
    """Lengths in tokens that the TFLite file has signatures for; the task's max_length is added if it is longer."""

    @field_validator("buckets")
    @classmethod
    def _positive(cls, buckets: list[int]) -> list[int]:
        if not buckets or min(buckets) < 2:
            raise ValueError("lengths of at least 2 tokens are needed")
        return sorted(set(buckets))

    def run(self, context: Context) -> None:
        from exporters.onnx_file import export_onnx

        checkpoint = Checkpoint.load(context.folder("model"))
        longest = context.task.max_length
        folder = context.output / "exported"
        copy_tokenizer(context.folder("model"), folder / "tokenizer")
        unique = count_unique_parameters(checkpoint.model)
        if "onnx" in self.formats:
            path = folder / "onnx" / "model.onnx"
            export_onnx(checkpoint.model, path)
            context.subjects.append(self._proven(context, "ONNX fp32", checkpoint, path, unique))
        if "tflite" in self.formats:
            from exporters.tflite_file import export_tflite

            buckets = [b for b in self.buckets if b < longest] + [longest]
            path = folder / "tflite" / "model_fp32.tflite"
            export_tflite(checkpoint.model, path, buckets)
            context.subjects.append(self._proven(context, "TFLite fp32", checkpoint, path, unique))
        baseline = Checkpoint.load(context.folder("baseline"))
        copy_tokenizer(context.folder("baseline"), context.output / "baseline_file" / "tokenizer")
        path = context.output / "baseline_file" / "model.onnx"
        export_onnx(baseline.model, path)
        prove(context, "baseline", baseline, path)

    def _proven(self, context: Context, name: str, checkpoint: Checkpoint, path: Path, unique: int) -> Subject:
        prove(context, name, checkpoint, path)
        file = path.relative_to(context.output / "exported").as_posix()
        scores, notes = file_accuracy(context, path, context.output / "exported" / "tokenizer" / "tokenizer.json")
        return Subject(name, unique, path.stat().st_size, scores, file, "fp32", notes)


def prove(context: Context, name: str, checkpoint: Checkpoint, path: Path) -> None:
    """Hold a file against its torch model on real texts of every length; note the worst difference."""
    from exporters.parity import check_parity, torch_logits

    texts = checkpoint.encode(context.data.validation, context.label_index, context.task.max_length)
    by_length = np.argsort(texts.lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(texts) - 1, min(PARITY_TEXTS, len(texts))).astype(int)]
    id_lists = [texts.text(row).tolist() for row in chosen]
    parity = check_parity(torch_logits(checkpoint.model, id_lists), path, id_lists)
    context.note(f"{name}: logits of {parity.texts} texts within {parity.worst:.2g} of torch ({parity.limit:.2g} allowed)")


def file_accuracy(context: Context, path: Path, tokenizer_file: Path) -> tuple[dict[str, float], list[str]]:
    """Accuracy of a model file in its own runtime, text by text: (per cent by split, notes on cut texts)."""
    model, encoder = load_model(path), TextEncoder(tokenizer_file, context.task.max_length)
    scores = {}
    for split in ("validation", "test"):
        rows = context.data.split(split)
        answers = [int(model.logits(ids).argmax()) for ids in encoder.encode_batch([row.text for row in rows])]
        scores[split] = round(per_cent_right(answers, [context.label_index[row.label] for row in rows]), 3)
    cut = [f"{encoder.truncated} validation and test texts are longer than {context.task.max_length} tokens and were cut"]
    return scores, cut if encoder.truncated else []


def per_cent_right(answers: Sequence[int], labels: Sequence[int]) -> float:
    return 100.0 * float(np.mean(np.asarray(answers) == np.asarray(labels)))
