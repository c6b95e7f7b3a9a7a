"""Write the model as ONNX and TFLite, and prove that the files compute what it computes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from pipeline.flow.cache import digest, library_versions
from pipeline.flow.stage import Context, Stage, Subject
from pipeline.models.checkpoint import Checkpoint, copy_tokenizer
from pipeline.models.encoder import count_unique_parameters
from runtimes.backends import load_model
from runtimes.errors import GateFailed
from runtimes.text import TextEncoder

PARITY_TEXTS = 128
DESCRIPTION = "export.json"


class Export(Stage):
    """Write ONNX and TFLite files in full precision; the baseline is written by optimum, as any other tool would."""

    use: ClassVar[str] = "export"
    needs: ClassVar[tuple[str, ...]] = ("model", "baseline")
    gives: ClassVar[tuple[str, ...]] = ("exported", "baseline_file")
    effect: ClassVar[str] = "The same function in fewer operators, in files that run without Python."

    formats: list[Literal["onnx", "tflite"]] = Field(["onnx", "tflite"], min_length=1)
    """Files to write."""
    buckets: list[int] | None = None
    """Lengths in tokens that the TFLite file has signatures for; the task's max_length is added if it is longer. Left out, they are
    chosen from the lengths of the training texts."""
    max_buckets: int = Field(4, ge=1, le=16)
    """Most signatures that are chosen."""
    output: Literal["logits", "probabilities"] = "logits"
    """What the files give; ``probabilities`` puts the softmax into them, for clients that expect scores."""

    @field_validator("buckets")
    @classmethod
    def _positive(cls, buckets: list[int] | None) -> list[int] | None:
        if buckets is not None and (not buckets or min(buckets) < 2):
            raise ValueError("lengths of at least 2 tokens are needed")
        return None if buckets is None else sorted(set(buckets))

    def run(self, context: Context) -> None:
        from exporters.onnx_writer import write_onnx
        from exporters.tflite_writer import write_tflite

        checkpoint = Checkpoint.load(context.folder("model"))
        folder = context.output / "exported"
        copy_tokenizer(context.folder("model"), folder / "tokenizer")
        model = folded(checkpoint, context, self.output)
        buckets = self._buckets(context, checkpoint, model)
        (folder / DESCRIPTION).write_text(json.dumps({"buckets": buckets, "output": self.output}) + "\n", encoding="utf-8")
        for format_, name, title in (("onnx", "onnx/model.onnx", "ONNX fp32"), ("tflite", "tflite/model_fp32.tflite", "TFLite fp32")):
            if format_ not in self.formats:
                continue
            path = folder / name
            if format_ == "onnx":
                write_onnx(model, path)
            else:
                write_tflite(model, path, buckets)
            prove(context, title, checkpoint, path, model, buckets)
            scores, notes = file_accuracy(context, path, folder / "tokenizer" / "tokenizer.json")
            unique = count_unique_parameters(checkpoint.model)
            context.subjects.append(Subject(title, unique, path.stat().st_size, scores, name, "fp32", notes))
        shutil.copytree(self._baseline_file(context), context.output / "baseline_file")

    def _baseline_file(self, context: Context) -> Path:
        """Folder with the baseline as optimum writes it; made once for all models that are compressed from it."""
        from exporters.converters import convert_onnx

        key = digest(["baseline file", context.inputs["baseline"].sha256, context.task.max_length, library_versions()])
        with context.cache.lock(key):
            folder = context.cache.shared(key)
            if not folder.is_dir():
                partial = folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                copy_tokenizer(context.folder("baseline"), partial / "tokenizer")
                baseline = Checkpoint.load(context.folder("baseline"))
                convert_onnx(baseline.model, partial / "model.onnx")
                prove(context, "baseline", baseline, partial / "model.onnx")
                os.replace(partial, folder)
        return folder

    def _buckets(self, context: Context, checkpoint: Checkpoint, model: Any) -> list[int]:
        from exporters.buckets import choose_buckets

        longest = context.task.max_length
        if self.buckets is not None:
            return [b for b in self.buckets if b < longest] + [longest]
        lengths = checkpoint.encode(context.data.train, context.label_index, longest).lengths
        buckets = choose_buckets(lengths, model.multiply_adds, self.max_buckets, longest)
        padded = np.asarray(buckets)[np.searchsorted(buckets, lengths)]
        listed = ", ".join(map(str, buckets))
        context.note(f"TFLite buckets of {listed} tokens: training texts have {lengths.mean():.1f} and run padded to {padded.mean():.1f}")
        return buckets


def folded(checkpoint: Checkpoint, context: Context, output: str) -> Any:
    """The model as it is exported; a text classifier's texts are one segment each."""
    from exporters.folding import fold

    return fold(checkpoint.model, context.task.max_length, segments=1, probabilities=output == "probabilities")


def prove(context: Context, name: str, checkpoint: Checkpoint, path: Path, model: Any = None, buckets: Sequence[int] = ()) -> None:
    """Hold a file against its torch model on real texts of every length; note the worst difference.

    Raises:
        GateFailed: with the first tensor that is wrong; the file is kept beside the stage's checkpoints.
    """
    from exporters.parity import check_parity, first_wrong_fold, first_wrong_tensor, torch_results

    texts = checkpoint.encode(context.data.validation, context.label_index, context.task.max_length)
    by_length = np.argsort(texts.lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(texts) - 1, min(PARITY_TEXTS, len(texts))).astype(int)]
    id_lists = [texts.text(row).tolist() for row in chosen]
    try:
        expected = torch_results(checkpoint.model, id_lists, model is not None and model.probabilities)
        parity = check_parity(expected, path, id_lists)
    except GateFailed as error:
        aside = context.work / "rejected" / path.name
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, aside)
        wrong = None
        if model is not None:
            longest = id_lists[-1]
            wrong = first_wrong_tensor(model, aside, longest, buckets) or first_wrong_fold(checkpoint.model, model, longest)
        raise GateFailed(f"{error}. First wrong tensor: {wrong or 'none of the matrices'}; the file is kept at {aside}") from error
    context.note(f"{name}: {parity.texts} texts within {parity.worst:.2g} of torch ({parity.limit:.2g} allowed)")


def file_accuracy(context: Context, path: Path, tokenizer_file: Path) -> tuple[dict[str, float], list[str]]:
    """Accuracy of a model file in its own runtime, text by text: (per cent by split, notes on cut texts)."""
    encoder = TextEncoder(tokenizer_file, context.task.max_length)
    scores = {}
    for split in ("validation", "test"):
        rows = context.data.split(split)
        labels = [context.label_index[row.label] for row in rows]
        scores[split] = score_file(path, encoder.encode_batch([row.text for row in rows]), labels)
    cut = [f"{encoder.truncated} validation and test texts are longer than {context.task.max_length} tokens and were cut"]
    return scores, cut if encoder.truncated else []


def score_file(path: Path, id_lists: Sequence[list[int]], labels: Sequence[int]) -> float:
    """Per cent of the texts that a model file decides rightly in its own runtime."""
    return round(per_cent_right(file_results(path, id_lists).argmax(axis=1), labels), 3)


def file_results(path: Path, id_lists: Sequence[list[int]]) -> np.ndarray:
    """What a model file gives for each text, run alone, [N, C]."""
    model = load_model(path)
    return np.stack([model.logits(ids) for ids in id_lists])


def per_cent_right(answers: Sequence[int] | np.ndarray, labels: Sequence[int]) -> float:
    return 100.0 * float(np.mean(np.asarray(answers) == np.asarray(labels)))
