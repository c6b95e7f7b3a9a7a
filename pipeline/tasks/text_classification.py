"""Labelled texts, or pairs of texts: one class each, or several (``multi_label``).

The model is a classifier on the first token (Devlin et al. 2018, arXiv:1810.04805 §4.1), or on the mean of all (``pooling``).
Several labels are as many yes-or-no decisions (binary cross-entropy).

``threshold``: an answer whose probability is lower is "none of them". ``"auto"`` chooses it on validation rows: where the folder
has texts that belong to no class (``out_of_scope`` files), so that the mean of the share of right answers and the share of rejected
texts is largest; otherwise so that one right answer in a hundred is rejected.

What this file does not do: read files (:mod:`pipeline.tasks.files`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.tasks.base import Data, Metric, Outputs, Row
from pipeline.tasks.batches import EncodedTexts
from pipeline.tasks.files import fingerprint, label_of, read_splits, shown, text_of
from pipeline.tasks.text_or_pair import TextOrPair
from runtimes.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from pipeline.tasks.batches import Batch

REJECTED_RIGHT = 0.01
"""Share of the right validation answers that a threshold may reject where there is nothing else to choose it by."""
MOST_CLASSES_IN_DETAIL = 20
"""Up to so many classes the ledger has the recall of each; more would bury the other figures."""


class TextClassification(TextOrPair):
    """One text, or a pair of texts, and its class; or several classes at once."""

    kind: ClassVar[str] = "text-classification"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "accuracy"), Metric("macro_f1", "macro F1"), Metric("micro_f1", "micro F1"), Metric("f1", "F1"),
        Metric("matthews", "Matthews"), Metric("log_loss", "log loss", "", False), Metric("calibration_error", "calibration error", "%", False),
    )  # fmt: skip

    label_column: str = "label"
    """Column of the class, or of the list of classes."""
    multi_label: bool = False
    """Whether a row has any number of classes, at least one."""
    positive: str | None = None
    """The class whose F1 is reported as ``f1``."""
    threshold: float | Literal["auto"] | None = None
    """Probability below which the answer is "none of them"; ``auto`` chooses it on validation rows. Of several labels, that from which a label
    counts, 0.5 if left out."""
    out_of_scope: str | None = None
    """Beginning of the names of files with texts of no class (``oos`` for oos_validation.jsonl and oos_test.jsonl)."""
    recalls: bool | None = None
    """Report the share of each class' rows that are right; left out, where there are at most 20 classes or the budget has a recall_drop."""
    limit_per_label: int | None = Field(None, ge=1)
    """Train on at most so many rows of each class, for trials."""

    @model_validator(mode="after")
    def _fields_fit(self) -> TextClassification:
        if self.multi_label and (self.threshold == "auto" or self.out_of_scope):
            raise ValueError("multi_label: threshold = 'auto' and out_of_scope are for texts with one class each")
        if isinstance(self.threshold, float) and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: {self.threshold} must lie between 0 and 1")
        return self

    @property
    def not_computed(self) -> Mapping[str, str]:
        absent = {} if self.positive is not None else {"f1": "is that of one class; name it with positive"}
        if self.multi_label:
            return absent | dict.fromkeys(("matthews", "log_loss", "calibration_error"), "is for texts with one class each")
        return absent | {"micro_f1": "is for multi_label; of one class a text it is the accuracy"}

    @property
    def has_recalls(self) -> bool:
        return self.needs_labels and not self.multi_label

    def rows_by_class(self, rows: Sequence[Row]) -> dict[str, int]:
        return dict(Counter(row["label"] for row in rows if row.get("label") is not None))

    @property
    def primary(self) -> Metric:
        if self.metric is None and self.multi_label:
            return next(metric for metric in self.metrics if metric.name == "micro_f1")
        return super().primary

    # --- rows ---------------------------------------------------------------------------------------------------------

    def read(self, folder: Path) -> Data:
        rows, notes = read_splits(folder, self._row, by=lambda row: " ".join(row["labels"]) if self.multi_label else row["label"])
        return self.make(rows, str(folder), notes, self._read_out_of_scope(folder))

    def make(self, rows: dict[str, list[Row]], origin: str, notes: Sequence[str] = (), out_of_scope: Mapping[str, list[Row]] = {}) -> Data:
        """Put splits together: class names, the fingerprint, and rows of no class, which stand behind those of their split."""
        labels = sorted({label for row in rows["train"] for label in self._labels(row)})
        if len(labels) < 2:
            raise BadInput(f"{origin}: every row has the label {labels[0]!r}; a classifier needs at least two classes")
        if self.positive is not None and self.positive not in labels:
            raise BadInput(f"task.positive: no class {self.positive!r}; the classes are {', '.join(labels[:20])}")
        for split in ("validation", "test"):
            for row in rows[split]:
                unseen = [label for label in self._labels(row) if label not in labels]
                if unseen:
                    raise BadInput(f"{row.get('place', origin)}: label {unseen[0]!r} never occurs in the training rows")
        train = rows["train"]
        if self.limit_per_label is not None:
            kept: Counter[str] = Counter()
            train = [row for row in train if (kept.update(self._labels(row)) or max(kept[x] for x in self._labels(row))) <= self.limit_per_label]
        splits = [train, *(rows[split] + list(out_of_scope.get(split, [])) for split in ("validation", "test"))]
        splits = [[{key: value for key, value in row.items() if key != "place"} for row in split] for split in splits]
        counted = [f"{len(rows_)} out-of-scope texts in {split}" for split, rows_ in out_of_scope.items() if rows_]
        return Data(*splits, {"logits": labels}, fingerprint(splits), (*notes, *counted))

    def _row(self, record: dict[str, Any], place: str) -> Row:
        row = self.texts_row(record, place) | {"place": place}
        if not self.multi_label:
            return row | {"label": label_of(text_of(record, self.label_column, place, numbers=True), self.label_column, place)}
        if self.label_column not in record:
            text_of(record, self.label_column, place)  # says which columns there are
        given = record[self.label_column]
        given = [part.strip() for part in given.split(",")] if isinstance(given, str) else given
        given = [str(label) if type(label) is int else label for label in given] if isinstance(given, list) else given
        if not isinstance(given, list) or not given or not all(isinstance(label, str) and label.strip() for label in given):
            raise BadInput(f"{place}: {self.label_column} must be a list of at least one label, texts or whole numbers, got {shown(repr(given))}")
        return row | {"labels": sorted({label_of(label, self.label_column, place) for label in given})}

    def _read_out_of_scope(self, folder: Path) -> dict[str, list[Row]]:
        """Rows of no class by split; training ones are not used."""
        if self.out_of_scope is None:
            return {}
        from pipeline.tasks.files import read_records, split_file

        found = {}
        for split in ("validation", "test"):
            path = split_file(folder, f"{self.out_of_scope}_{split}")
            if path is None:
                raise BadInput(f"task.out_of_scope: {folder} has no {self.out_of_scope}_{split} file")
            found[split] = [self.texts_row(record, f"{path}:{line}") | {"label": None} for line, record in read_records(path)]
            if not found[split]:
                raise BadInput(f"{path}: no rows")
        return found

    def _labels(self, row: Row) -> list[str]:
        return row["labels"] if self.multi_label else [] if row["label"] is None else [row["label"]]

    # --- inputs, heads, losses ----------------------------------------------------------------------------------------

    def heads(self, data: Data) -> list[dict[str, Any]]:
        return [self.text_head(len(data.labels["logits"]))]

    def encode(self, tokenizer: Tokenizer, rows: Sequence[Row], data: Data, pad_id: int) -> EncodedTexts:
        return replace(self.encode_texts(tokenizer, rows, pad_id), targets={"labels": self.targets(rows, data)})

    def targets(self, rows: Sequence[Row], data: Data) -> np.ndarray:
        """Class of each row, int64 [N]; of several labels float32 [N, C] of 0 and 1. -100, or NaN, where nothing is known."""
        index = {label: number for number, label in enumerate(data.labels["logits"])}
        if not self.multi_label:
            return np.asarray([index[row["label"]] if row.get("label") is not None else -100 for row in rows], dtype=np.int64)
        made = np.full((len(rows), len(index)), np.nan, dtype=np.float32)
        for number, row in enumerate(rows):
            if "labels" in row:
                made[number] = 0.0
                made[number, [index[label] for label in row["labels"]]] = 1.0
        return made

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Cross-entropy, averaged over texts; of several labels binary cross-entropy, summed over classes."""
        from torch.nn import functional

        logits, wanted = outputs["logits"].float(), batch.targets["labels"]
        if not self.multi_label:
            return functional.cross_entropy(logits, wanted)
        return functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1).mean()

    def soft_loss(self, outputs: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, temperature: float) -> Tensor:
        from torch.nn import functional

        from pipeline.tasks.losses import softened_divergence

        if not self.multi_label:
            return softened_divergence(outputs["logits"], teacher["logits"], temperature)
        wanted = (teacher["logits"].float() / temperature).sigmoid()
        given = outputs["logits"].float() / temperature
        return temperature**2 * functional.binary_cross_entropy_with_logits(given, wanted, reduction="none").sum(-1).mean()

    # --- figures and answers ------------------------------------------------------------------------------------------

    def evaluate(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> dict[str, float]:
        """All metrics over the rows that have a class; those of no class count in ``out_of_scope_auroc`` alone."""
        from pipeline.tasks import classification_metrics

        probabilities = self.probabilities(outputs)
        wanted = self.targets([rows[i] for i in texts.rows], data)
        labels = data.labels["logits"]
        if self.multi_label:
            return classification_metrics.several_labels(probabilities, wanted, self._threshold(), labels, self.positive)
        known = wanted >= 0
        found = classification_metrics.one_label(probabilities[known], wanted[known], labels, self.positive)
        if self.recalls or (self.recalls is None and len(labels) <= MOST_CLASSES_IN_DETAIL):
            found |= classification_metrics.recalls(probabilities[known], wanted[known], labels)
        if not known.all():
            found["out_of_scope_auroc"] = classification_metrics.separation(probabilities.max(-1), known)
        return found

    def probabilities(self, outputs: Outputs) -> np.ndarray:
        """[N, C] from what a model or a file gives."""
        if "probabilities" in outputs:
            return np.asarray(outputs["probabilities"], np.float64)
        logits = np.asarray(outputs["logits"], np.float64)
        if self.multi_label:
            return 1 / (1 + np.exp(-logits))
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    def _threshold(self) -> float:
        return self.threshold if isinstance(self.threshold, float) else 0.5

    def floor(self, data: Data) -> dict[str, Any] | None:
        from pipeline.tasks.bag_of_words import classify

        return classify(self, data)

    @property
    def settled_by_outputs(self) -> bool:
        return self.threshold == "auto"

    def describe_settled(self) -> str:
        return f"answers with a probability under {self.threshold:.4g} are none of the classes"

    def settled(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> TextClassification:
        """With the threshold that ``auto`` stands for."""
        probabilities, wanted = self.probabilities(outputs), self.targets([rows[i] for i in texts.rows], data)
        return self.model_copy(update={"threshold": chosen_threshold(probabilities.max(-1), probabilities.argmax(-1) == wanted, wanted >= 0)})

    def options(self, data: Data) -> dict[str, Any]:
        return {
            "kind": self.kind, "columns": list(self.columns), "segments": self.segments, "decode": "sigmoid" if self.multi_label else "softmax",
            "multi_label": self.multi_label, "threshold": self.threshold if isinstance(self.threshold, float) else None,
        }  # fmt: skip

    def hub_fields(self, data: Data) -> dict[str, Any]:
        return {"problem_type": "multi_label_classification" if self.multi_label else "single_label_classification"}


def chosen_threshold(confidence: np.ndarray, right: np.ndarray, in_scope: np.ndarray) -> float:
    """The probability below which an answer is rejected, as the module's docstring says.

    Args:
        confidence: highest probability of each row [N].
        right: whether its class is right [N].
        in_scope: whether it belongs to a class at all [N].
    """
    if in_scope.all():
        return round(float(np.quantile(confidence[right], REJECTED_RIGHT)), 4) if right.any() else 0.0
    candidates = np.unique(np.round(confidence, 4))
    kept = (confidence[in_scope & right][None] >= candidates[:, None]).sum(1) / in_scope.sum()
    rejected = (confidence[~in_scope][None] < candidates[:, None]).mean(1)
    return float(candidates[(kept + rejected).argmax()])
