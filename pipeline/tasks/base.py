"""What a model is compressed for: :class:`Task`.

A task answers, and nobody else needs to know: which columns make a row and how they are read; how rows become ids; which heads a
model needs; the loss against labels and against a teacher's outputs; the metrics; the answer that a person gets. Its fields are
the keys of the ``[task]`` table. What a device needs of it, from outputs to an answer, lies in :mod:`runtimes.decode`.

A task of a plug-in is a class registered under the entry-point group ``pocketbert.tasks``, with its decoder under
``pocketbert.decoders``.

Outputs are dictionaries by name: [N, ...] with a row per input, or [T, ...] with a row per token, as :class:`EncodedTexts` has them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtimes.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from pipeline.tasks.batches import Batch, EncodedTexts

Row = dict[str, Any]
"""Checked columns of one row, under the task's own names for them."""
Outputs = Mapping[str, Any]
SPLITS = ("train", "validation", "test")


class Metric(NamedTuple):
    """A figure by which a model is judged. Shares, F1 and correlations are in points of 100; ``unit`` is what a table writes behind."""

    name: str
    title: str
    unit: str = "%"
    higher_is_better: bool = True


AGREEMENT = Metric("agreement", "agreement")
DIVERGENCE = Metric("divergence", "divergence", "", False)
FIDELITY = (AGREEMENT, DIVERGENCE)
"""How near a file comes to the model that it was written from; every task has them, and they need no labels. Agreement: the share of decisions
(a class, a tag, a start or an end) that are the model's. Divergence: the soft-target loss of the file's outputs against the model's at
temperature 1, less that of the model against itself: of classes the Kullback-Leibler divergence in nats."""


@dataclass(frozen=True)
class Data:
    """The rows of a task.

    Attributes:
        labels: names of the classes by output.
        fingerprint: SHA-256 of all of it.
        notes: sentences for the user about what was decided on their behalf.
        unlabeled: rows without labels, to learn from a teacher.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    labels: dict[str, list[str]]
    fingerprint: str
    notes: tuple[str, ...] = ()
    unlabeled: list[Row] = field(default_factory=list)

    def split(self, name: str) -> list[Row]:
        return {"train": self.train, "validation": self.validation, "test": self.test, "unlabeled": self.unlabeled}[name]


class Task(BaseModel):
    """Base of every task."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    kind: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    """The first is the primary one, which gates and choices look at, unless the recipe names another."""

    decides: ClassVar[bool] = True
    """Whether an answer holds decisions, or numbers alone."""

    data: str
    """Folder with train, validation and test files, or ``builtin:commands``. One file, whose rows then serve for every split. With ``metric`` at
    ``agreement`` or ``divergence``, a file of texts without labels, one a line, or ``builtin:vocabulary`` for random words of the vocabulary."""
    max_length: int = Field(64, ge=4, le=512)
    """Longest input in tokens; longer ones are cut, and counted."""
    metric: str | None = None
    """The metric that gates and choices look at; the first of the task's if left out. ``agreement`` and ``divergence`` compare files with the
    model that they were written from, and need no labels."""
    evaluation_rows: int | None = Field(None, ge=1)
    """Most rows of validation, and of test, that are used, drawn by a fixed seed; all of them if left out."""
    unlabeled: str | list[str] | None = None
    """File of texts without labels, or several, one a line, in the data's folder or wherever data folders lie; distillation and healing learn
    from them too."""

    @model_validator(mode="after")
    def _known_metric(self) -> Task:
        known = [metric.name for metric in (*self.metrics, *FIDELITY)]
        if self.metric is not None and self.metric not in known:
            raise ValueError(f"metric: unknown {self.metric!r}; {self.kind} has {', '.join(known)}")
        if self.metric in self.not_computed:
            computed = ", ".join(name for name in known if name not in self.not_computed)
            raise ValueError(f"metric: {self.metric} {self.not_computed[self.metric]}; this task has {computed}")
        if self.metric == AGREEMENT.name and not self.decides:
            raise ValueError(f"metric: {self.kind} gives numbers and decides nothing; take {DIVERGENCE.name}")
        return self

    @property
    def not_computed(self) -> Mapping[str, str]:
        """Those of ``metrics`` that :meth:`evaluate` does not compute with this task's keys, each with the reason."""
        return {}

    @property
    def needs_labels(self) -> bool:
        """Whether the metric that decides is measured against labels."""
        return self.metric not in {metric.name for metric in FIDELITY}

    @property
    def has_recalls(self) -> bool:
        """Whether every row has one class, so that each class has a recall; see :meth:`rows_by_class`."""
        return False

    def rows_by_class(self, rows: Sequence[Row]) -> dict[str, int]:
        """Rows of each class, where :attr:`has_recalls`."""
        return {}

    @property
    def primary(self) -> Metric:
        """The metric that gates and choices look at."""
        return next((metric for metric in (*self.metrics, *FIDELITY) if metric.name == self.metric), self.metrics[0])

    @property
    def segments(self) -> int:
        """2 where an input consists of two texts that a model tells apart."""
        return 1

    @abstractmethod
    def read(self, folder: Path) -> Data:
        """Read and check a data folder.

        Raises:
            BadInput: with file and line.
        """

    @abstractmethod
    def heads(self, data: Data) -> list[dict[str, Any]]:
        """What a model for this task has behind its encoder; see :func:`pipeline.models.config.head_shape`."""

    @abstractmethod
    def encode(self, tokenizer: Tokenizer, rows: Sequence[Row], data: Data, pad_id: int) -> EncodedTexts:
        """Rows -> inputs with their targets."""

    def trainable(self, texts: EncodedTexts) -> EncodedTexts:
        """The inputs of training rows that labels can teach; all of them where each has a target."""
        return texts

    def labelled(self, data: Data) -> bool:
        """Whether training rows have what :meth:`loss` needs."""
        return True

    def untaught(self, texts: EncodedTexts, rows: Sequence[Row]) -> str:
        """A sentence about training rows whose labels are in none of their inputs ``texts``; empty where there are none."""
        return ""

    @abstractmethod
    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The loss against labels, a mean over the batch."""

    @abstractmethod
    def soft_loss(self, outputs: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, temperature: float) -> Tensor:
        """The loss against a teacher's outputs for the same inputs, a mean over the batch."""

    @abstractmethod
    def evaluate(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> dict[str, float]:
        """The value of every metric from the outputs (NumPy arrays) of ``texts``, which :meth:`encode` made of ``rows``."""

    def floor(self, data: Data) -> dict[str, Any] | None:
        """What a model without a BERT scores: ``{"name", "metrics": {split: {metric: value}}}``; None where there is no cheap one."""
        return None

    def options(self, data: Data) -> dict[str, Any]:
        """The ``task`` section of a bundle's manifest; its decoder is made of it."""
        return {"kind": self.kind, "columns": list(self.columns), "segments": self.segments, "decode": "none"}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a person gives for an answer."""
        return ("text",)

    def example(self, row: Row) -> dict[str, str]:
        """What a person would give to get an answer for ``row``."""
        return {column: row[column] for column in self.columns}

    def inputs(self, row: Row) -> list[tuple[str, ...]]:
        """The texts of each input that ``row`` makes, by which it is known again; of a pair that a model reads at once both."""
        return [tuple(self.example(row).values())]

    def hub_fields(self, data: Data) -> dict[str, Any]:
        """What the hub's ``config.json`` says of the task beside the class of the model."""
        return {}

    @property
    def settled_by_outputs(self) -> bool:
        """Whether something is left to be chosen by what a file gives for validation rows, such as a threshold."""
        return False

    def settled(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> Task:
        """The task with what is left to be chosen, by the outputs for validation rows."""
        return self

    def describe_settled(self) -> str:
        """What was chosen, in a sentence."""
        return ""

    def unlabeled_row(self, line: str) -> Row:
        """A row without labels made of one line of text.

        Raises:
            BadInput: one line cannot make an input of this task.
        """
        raise BadInput(f"task.unlabeled: lines of text make no input of {self.kind}; leave it out")


def better(metric: Metric, value: float) -> float:
    """``value`` so that more is better; applied twice, the value itself."""
    return value if metric.higher_is_better else -value
