"""Write the model as ONNX and TFLite, and prove that the files compute what it computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from pipeline.flow.cache import digest, library_versions
from pipeline.flow.stage import Context, Stage, Subject
from pipeline.learning.evaluation import REPORTED
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.encoder import count_unique_parameters
from pipeline.models.tokenizer_files import copy_tokenizer
from pipeline.stages.file_evaluation import encodings, evaluate_file
from pipeline.tasks.base import Task
from runtimes.errors import BadInput, GateFailed

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
    chosen from the lengths of the training inputs."""
    max_buckets: int = Field(4, ge=1, le=16)
    """Most signatures that are chosen."""
    output: Literal["logits", "probabilities"] = "logits"
    """What the files of a classifier give; ``probabilities`` puts the softmax (or sigmoid) into them, for clients that expect scores."""

    @field_validator("buckets")
    @classmethod
    def _positive(cls, buckets: list[int] | None) -> list[int] | None:
        if buckets is not None and (not buckets or min(buckets) < 2):
            raise ValueError("lengths of at least 2 tokens are needed")
        return None if buckets is None else sorted(set(buckets))

    def check_task(self, task: Task) -> None:
        if self.output == "probabilities" and task.kind not in ("text-classification", "intent-and-slots", "token-classification"):
            raise BadInput(f"export.output: {task.kind} has no probabilities; leave output out")

    def run(self, context: Context) -> None:
        from exporters.onnx_writer import write_onnx
        from exporters.tflite_writer import write_tflite

        checkpoint = context.load("model")
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
            prove(context, title, checkpoint, path, model, buckets, activation_of(context, self.output))
            metrics = evaluate_file(context, path, folder)
            unique = count_unique_parameters(checkpoint.model)
            context.subjects.append(Subject(title, unique, path.stat().st_size, metrics, name, "fp32", cut_inputs(context, checkpoint)))
        shutil.copytree(self._baseline_file(context), context.output / "baseline_file")

    def _baseline_file(self, context: Context) -> Path:
        """Folder with the baseline as optimum writes it; made once for all models that are compressed from it."""
        from exporters.converters import convert_onnx

        key = digest(["baseline file", context.inputs["baseline"].sha256, context.task.max_length, context.task.segments, library_versions()])

        def make(folder: Path) -> None:
            copy_tokenizer(context.folder("baseline"), folder / "tokenizer")
            baseline = context.load("baseline")
            convert_onnx(baseline.model, folder / "model.onnx", context.task.segments)
            prove(context, "baseline", baseline, folder / "model.onnx")

        return context.cache.shared(key, "baseline file", make)

    def _buckets(self, context: Context, checkpoint: Checkpoint, model: Any) -> list[int]:
        from exporters.buckets import choose_buckets

        longest = context.task.max_length
        if self.buckets is not None:
            return [b for b in self.buckets if b < longest] + [longest]
        lengths = context.encode(checkpoint, "train").lengths
        buckets = choose_buckets(lengths, model.multiply_adds, self.max_buckets, longest)
        padded = np.asarray(buckets)[np.searchsorted(buckets, lengths)]
        listed = ", ".join(map(str, buckets))
        context.note(f"TFLite buckets of {listed} tokens: training inputs have {lengths.mean():.1f} and run padded to {padded.mean():.1f}")
        return buckets


def folded(checkpoint: Checkpoint, context: Context, output: str) -> Any:
    """The model as it is exported."""
    from exporters.folding import fold

    return fold(checkpoint.model, context.task.max_length, context.task.segments, activation_of(context, output))


def activation_of(context: Context, output: str) -> str | None:
    """What a file does to the logits: nothing, or what makes probabilities of them."""
    return context.task.options(context.data)["decode"] if output == "probabilities" else None


def cut_inputs(context: Context, checkpoint: Checkpoint) -> list[str]:
    """A sentence on how many rows were cut to the task's longest input; none where none was."""
    longest, count = context.task.max_length, 0
    for split in REPORTED:
        count += int((context.encode(checkpoint, split).lengths >= longest).sum())
    return [f"{count} validation and test inputs fill all {longest} tokens; what is longer was cut"] if count else []


def prove(
    context: Context, name: str, checkpoint: Checkpoint, path: Path, model: Any = None, buckets: Sequence[int] = (), activation: str | None = None
) -> None:
    """Hold a file against its torch model on real inputs of every length; note the worst difference.

    Raises:
        GateFailed: with the first tensor that is wrong; the file is kept beside the stage's checkpoints.
    """
    from exporters.parity import check_parity, first_wrong_fold, first_wrong_tensor, torch_results

    texts = context.encode(checkpoint, "validation")
    by_length = np.argsort(texts.lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(texts) - 1, min(PARITY_TEXTS, len(texts))).astype(int)]
    inputs = encodings(texts, chosen)
    try:
        expected = torch_results(checkpoint.model, inputs, activation)
        parity = check_parity(expected, path, inputs)
    except GateFailed as error:
        aside = context.work / "rejected" / path.name
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, aside)
        wrong = None
        if model is not None:
            wrong = first_wrong_tensor(model, aside, inputs[-1], buckets) or first_wrong_fold(checkpoint.model, model, inputs[-1])
        raise GateFailed(f"{error}. First wrong tensor: {wrong or 'none of the matrices'}; the file is kept at {aside}") from error
    context.note(f"{name}: {parity.texts} inputs within {parity.worst:.2g} of torch ({parity.limit:.2g} allowed)")
