"""Texts, or pairs of texts, with a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pipeline.tasks.base import Data, Metric, Outputs, Row
from pipeline.tasks.batches import EncodedTexts
from pipeline.tasks.files import fingerprint, number_of, read_splits
from pipeline.tasks.text_or_pair import TextOrPair

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from pipeline.tasks.batches import Batch


class TextRegression(TextOrPair):
    """One text, or a pair of texts, and a number."""

    kind: ClassVar[str] = "text-regression"
    decides: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("spearman", "Spearman", ""), Metric("pearson", "Pearson", ""))

    label_column: str = "label"
    """Column of the number."""

    def read(self, folder: Path) -> Data:
        rows, notes = read_splits(folder, self._row)
        splits = list(rows.values())
        return Data(rows["train"], rows["validation"], rows["test"], {}, fingerprint(splits), tuple(notes))

    def _row(self, record: dict[str, Any], place: str) -> Row:
        return self.texts_row(record, place) | {"value": number_of(record, self.label_column, place)}

    def heads(self, data: Data) -> list[dict[str, Any]]:
        return [self.text_head(1)]

    def encode(self, tokenizer: Tokenizer, rows: Sequence[Row], data: Data, pad_id: int) -> EncodedTexts:
        values = np.array([row.get("value", np.nan) for row in rows], np.float32)
        known = [row["value"] for row in data.train if "value" in row]
        spread = (float(np.var(known)) or 1.0) if known else np.nan
        return replace(self.encode_texts(tokenizer, rows, pad_id), targets={"value": values, "scale": np.full(len(rows), 1 / spread, np.float32)})

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Mean squared error over the variance of the training values: 1 for a model that knows their mean alone."""
        return ((outputs["logits"][:, 0].float() - batch.targets["value"]).square() * batch.targets["scale"]).mean()

    def soft_loss(self, outputs: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, temperature: float) -> Tensor:
        """The same against the teacher's values; a temperature means nothing here.

        Altered copies do not know the variance of the training values. Rows of their batch do; a batch of copies alone takes the
        variance of the teacher's values.
        """
        wanted, scales = teacher["logits"].float(), batch.targets["scale"]
        known = scales[scales.isfinite()]
        spread = wanted.var(correction=0)
        scale = known[0] if len(known) else 1 / spread if spread > 0 else 1.0
        return (outputs["logits"].float() - wanted).square().mean() * scale

    def evaluate(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> dict[str, float]:
        return correlations(np.asarray(outputs["logits"])[:, 0], np.array([rows[i]["value"] for i in texts.rows]))

    def floor(self, data: Data) -> dict[str, Any] | None:
        from pipeline.tasks.bag_of_words import regress

        return regress(self, data)

    def hub_fields(self, data: Data) -> dict[str, Any]:
        return {"problem_type": "regression"}


def correlations(given: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Spearman and Pearson of two vectors times 100; 0 where one of them is constant."""
    from scipy.stats import pearsonr, spearmanr

    given, wanted = (np.asarray(values, np.float64) for values in (given, wanted))
    if np.ptp(given) == 0 or np.ptp(wanted) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    return {"spearman": 100 * float(spearmanr(given, wanted).statistic), "pearson": 100 * float(pearsonr(given, wanted).statistic)}
