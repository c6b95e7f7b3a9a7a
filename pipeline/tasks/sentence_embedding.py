"""Sentences as vectors whose cosine says how alike they are.

Source: Reimers & Gurevych 2019, Sentence-BERT, arXiv:1908.10084: the mean of the last feature map over a text's tokens (or its first
token), divided by its length. Two texts of a pair run apart. Training draws the cosine of a pair to its score (§3.1, regression
objective); a student draws its vectors to the teacher's, so that both can be compared with each other (Reimers & Gurevych 2020,
arXiv:2004.09813 eq. 1, here on vectors of length 1).

Training rows may be texts alone, for a student; validation and test rows are pairs with scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.tasks.base import Data, Metric, Outputs, Row, Task
from pipeline.tasks.batches import EncodedTexts, encode
from pipeline.tasks.files import fingerprint, number_of, read_splits, text_of
from pipeline.tasks.heads import head_shape
from pipeline.tasks.text_regression import correlations
from runtimes.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from pipeline.tasks.batches import Batch


class SentenceEmbedding(Task):
    """Pairs of texts with how alike they are; the answer is a vector, or the likeness of two texts."""

    kind: ClassVar[str] = "sentence-embedding"
    decides: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("spearman", "Spearman", ""), Metric("pearson", "Pearson", ""))

    text_column: str = "text"
    """Column of the first text."""
    pair_column: str = "text_pair"
    """Column of the second text."""
    label_column: str = "label"
    """Column of the score."""
    pooling: Literal["mean", "first"] = "mean"
    """What a vector is made of: the mean over all tokens, or the first token."""
    score_range: tuple[float, float] | None = None
    """Scores of pairs that are nothing alike and quite the same, for training; lowest and highest training score if left out."""
    size: int | None = Field(None, ge=1)
    """Numbers of a vector, made by one more matrix; as many as the model is wide if left out."""

    @model_validator(mode="after")
    def _range_rises(self) -> SentenceEmbedding:
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"score_range: {list(self.score_range)} must rise")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return ("text", "text_pair")

    def read(self, folder: Path) -> Data:
        rows, notes = read_splits(folder, self._row)
        for split in ("validation", "test"):
            for row in rows[split]:
                if "score" not in row:
                    raise BadInput(
                        f"{row['place']}: no column {self.pair_column!r}; {split} rows are pairs with a score, only training rows may be texts alone"
                    )
        paired = sum("score" in row for row in rows["train"])
        if paired not in (0, len(rows["train"])):
            alone = paired < len(rows["train"]) / 2  # what fewer rows are is the odd one
            odd = next(row["place"] for row in rows["train"] if ("score" in row) == alone)
            told = f"is {'a pair' if alone else 'a text alone'}; {paired} of {len(rows['train'])} training rows are pairs"
            raise BadInput(f"{odd}: {told}, and all of them must be, or none")
        splits = [[{k: v for k, v in row.items() if k != "place"} for row in rows[split]] for split in ("train", "validation", "test")]
        return Data(*splits, {}, fingerprint(splits), tuple(notes))

    def _row(self, record: dict[str, Any], place: str) -> Row:
        row = {"text": text_of(record, self.text_column, place), "place": place}
        if self.pair_column in record:
            row |= {"text_pair": text_of(record, self.pair_column, place), "score": number_of(record, self.label_column, place)}
        return row

    def heads(self, data: Data) -> list[dict[str, Any]]:
        return [head_shape("embedding", ["sentence_embedding"], self.pooling, self.size, normalized=True)]

    def encode(self, tokenizer: Tokenizer, rows: Sequence[Row], data: Data, pad_id: int) -> EncodedTexts:
        """Pairs are two inputs that stay together; texts alone are one each."""
        if not any("text_pair" in row for row in rows):
            return encode(tokenizer, [row["text"] for row in rows], self.max_length, pad_id)
        made = encode(tokenizer, [text for row in rows for text in (row["text"], row["text_pair"])], self.max_length, pad_id)
        low, high = self.score_range or scores_of(data)
        scores = np.repeat([(row["score"] - low) / (high - low) for row in rows], 2).astype(np.float32)
        return replace(made, targets={"score": scores}, row_of=np.repeat(np.arange(len(rows)), 2), group=2)

    def labelled(self, data: Data) -> bool:
        return all("score" in row for row in data.train)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Mean squared difference between the cosine of a pair and its score, scaled to 0..1."""
        if "score" not in batch.targets:
            raise BadInput("task: training rows are texts alone and teach nothing by themselves; take the source as it is with adopt")
        first, second = outputs["sentence_embedding"].float().unflatten(0, (-1, 2)).unbind(1)
        return ((first * second).sum(-1) - batch.targets["score"][::2]).square().mean()

    def soft_loss(self, outputs: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, temperature: float) -> Tensor:
        """1 - cosine to the teacher's vector, averaged over texts; a temperature means nothing here."""
        return (1 - (outputs["sentence_embedding"].float() * teacher["sentence_embedding"].float()).sum(-1)).mean()

    def evaluate(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> dict[str, float]:
        vectors = np.asarray(outputs["sentence_embedding"], np.float64).reshape(len(texts) // 2, 2, -1)
        cosines = (vectors[:, 0] * vectors[:, 1]).sum(-1)
        return correlations(cosines, np.array([rows[i]["score"] for i in texts.rows[::2]]))

    def floor(self, data: Data) -> dict[str, Any] | None:
        from pipeline.tasks.bag_of_words import compare

        return compare(self, data)

    def example(self, row: Row) -> dict[str, str]:
        return {column: row[column] for column in self.columns if column in row}

    def inputs(self, row: Row) -> list[tuple[str, ...]]:
        return [(text,) for text in self.example(row).values()]

    def unlabeled_row(self, line: str) -> Row:
        return {"text": line}


def scores_of(data: Data) -> tuple[float, float]:
    """Lowest and highest score of the training rows; of validation where training rows have none."""
    scores = [row["score"] for row in data.train if "score" in row] or [row["score"] for row in data.validation]
    low, high = min(scores), max(scores)
    if low == high:
        raise BadInput(f"task.data: every pair has the score {low:g}; scores must differ")
    return low, high
