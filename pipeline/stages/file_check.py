"""Is a model file that somebody published still right? Its answers against those of the model that it was made from.

What this file does not do: measure latency (``bench``), or read files whose inputs are not those of a BERT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.inference import predict
from pipeline.stages.file_evaluation import FileOutputs, apart, fidelity, joined
from pipeline.tasks.base import Data, Task
from pipeline.tasks.batches import EncodedTexts
from runtimes.backends import load_model
from runtimes.errors import BadInput, GateFailed, IntegrityError
from runtimes.text import Encoding

FEATURES = ("token_embeddings", "last_hidden_state")
"""What exporters call the last feature map, where a file leaves the pooling to its client."""


EXPECTED_ERROR = 0.01
"""Relative error of a matrix product in 8 bits; below it no rise is told."""


@dataclass
class Verdict:
    """One file against its model.

    Attributes:
        metrics: the task's where rows have labels, agreement and divergence.
        drop: points of the metric that decides which the file loses against the model.
        worst: the matrix product, or layer, of an ONNX file at which the distance from the model rises most on one text, and its relative error
            there; None where the inside is not seen.
        broken: why the file must not be used; None where it holds.
    """

    file: str
    size_bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    drop: float | None = None
    worst: tuple[str, float] | None = None
    broken: str | None = None


class FileCheck:
    """The model's own answers to the test rows, which files are held against.

    Args:
        source: folder of the model, with the heads of ``task``.
        allowed: points of the metric that decides which a file may lose.
    """

    def __init__(self, source: Path, task: Task, data: Data, allowed: float) -> None:
        self.task, self.data, self.allowed = task, data, allowed
        self.checkpoint = Checkpoint.load(source, task.heads(data), data.labels.get("logits"))
        if self.checkpoint.model.fresh_heads:
            raise BadInput(f"--against {source}: it has no trained {', '.join(self.checkpoint.model.fresh_heads)} for this task and its classes")
        self.texts: EncodedTexts = task.encode(self.checkpoint.tokenizer, data.test, data, self.checkpoint.model.config.pad_token_id)
        self.inputs: list[Encoding] = [self.texts.encoding(i) for i in range(len(self.texts))]
        model = self.checkpoint.model
        self.expected = apart({name: value.numpy() for name, value in predict(model, self.texts).items()}, model.config.per_token_outputs, self.texts)
        self.reference = self._metrics(self.expected)

    def check(self, path: Path, name: str) -> Verdict:
        """Run a file over all test rows."""
        verdict = Verdict(name, path.stat().st_size)
        try:
            outputs = self._outputs(path)
        except (BadInput, IntegrityError) as error:
            verdict.broken = str(error)
            return verdict
        if not all(np.isfinite(value).all() for one in outputs for value in one.values()):
            verdict.broken = "it gives values that are no numbers"
            return verdict
        verdict.metrics, primary = self._metrics(outputs), self.task.primary
        sign = 1 if primary.higher_is_better else -1
        verdict.drop = round(sign * (self.reference[primary.name] - verdict.metrics[primary.name]), 6)
        if path.suffix == ".onnx":
            verdict.worst = self._worst(path)
        if verdict.drop > self.allowed:
            verdict.broken = f"{primary.title} is {verdict.metrics[primary.name]:g}, that of the model {self.reference[primary.name]:g}"
        return verdict

    def _metrics(self, outputs: FileOutputs) -> dict[str, float]:
        found = self.task.evaluate(joined(outputs), self.texts, self.data.test, self.data) if self.task.needs_labels else {}
        return {name: round(value, 3) for name, value in found.items()} | fidelity(self.task, self.data, outputs, self.expected, self.texts)

    def _outputs(self, path: Path) -> FileOutputs:
        """What the file gives for each input, under the task's own names."""
        model = load_model(path)
        wanted, made = list(self.expected[0]), []
        for one in self.inputs:
            given = model.run(one.ids, one.types)
            made.append(given if set(given) >= set(wanted) else self._renamed(path, given, wanted))
        return made

    def _renamed(self, path: Path, given: dict[str, np.ndarray], wanted: Sequence[str]) -> dict[str, np.ndarray]:
        features = next((given[name] for name in FEATURES if name in given), None)
        if list(wanted) == ["sentence_embedding"] and features is not None:
            head = self.checkpoint.model.config.heads[0]
            pooled = features[0] if head["tokens"] == "first" else features.mean(0)
            return {"sentence_embedding": pooled / np.linalg.norm(pooled)}
        if len(given) != len(wanted):
            raise BadInput(f"{path}: it gives {', '.join(given)}; this task needs {', '.join(wanted)}")
        return dict(zip(wanted, given.values(), strict=True))  # other names, the same order

    def _worst(self, path: Path) -> tuple[str, float] | None:
        from exporters.foreign import operator_errors

        middle = self.inputs[int(np.argsort(self.texts.lengths, kind="stable")[len(self.inputs) // 2])]
        return steepest(operator_errors(path, self.checkpoint.model, middle))


def steepest(errors: Mapping[str, float]) -> tuple[str, float] | None:
    """Where the error rises most over all before, as a factor; an error is handed on, so that the largest may stand far behind the fault."""
    found, rise, before = None, 0.0, EXPECTED_ERROR
    for name, error in errors.items():
        if error / before > rise:
            found, rise = (name, error), error / before
        before = max(before, error)
    return found


def files_of(place: Path) -> list[tuple[str, Path]]:
    """(name, path) of a model file, or of all that are in a folder, such as a bundle or one of the hub.

    Raises:
        BadInput: there is none.
    """
    if place.is_file():
        return [(place.name, place)]
    found = sorted(path for suffix in ("onnx", "tflite") for path in place.rglob(f"*.{suffix}") if path.is_file())
    if not found:
        raise BadInput(f"{place}: no .onnx or .tflite file there")
    return [(path.relative_to(place).as_posix(), path) for path in found]


def refuse_broken(verdicts: Sequence[Verdict]) -> None:
    """Raise GateFailed where a file is broken."""
    broken = [f"{one.file}: {one.broken}" for one in verdicts if one.broken is not None]
    if broken:
        raise GateFailed("; ".join(broken))
