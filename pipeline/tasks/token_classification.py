"""Tokens with tags: names of persons and places, parts of an address, fields of a form.

The model decides on every token (Devlin et al. 2018, arXiv:1810.04805 §5.3); a word's tag is that of its first piece.
Rows come from JSON lines with two lists, or from CoNLL files; tags are BIO or IOB1 (:mod:`pipeline.tasks.tagged`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.tasks.base import Data, Metric, Outputs, Row, Task
from pipeline.tasks.batches import EncodedTexts
from pipeline.tasks.files import fingerprint, read_splits
from pipeline.tasks.heads import head_shape
from pipeline.tasks.tagged import encode_words, predicted_tags, row_text, span_scores, tag_names, to_bio, tokens_and_tags, unseen_words, word_loss

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from pipeline.tasks.batches import Batch


class TokenClassification(Task):
    """Tokens and a tag for each; the answer is spans in the original text."""

    kind: ClassVar[str] = "token-classification"
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("f1", "span F1"), Metric("precision", "precision"), Metric("recall", "recall"))

    tokens_column: str = "tokens"
    """Column of the tokens."""
    tags_column: str = "tags"
    """Column of the tags."""

    def read(self, folder: Path) -> Data:
        rows, notes = read_splits(folder, self._row)
        splits = [rows[split] for split in ("train", "validation", "test")]
        repaired = to_bio(splits)
        names = tag_names(splits[0], splits[1:])
        splits = [[{key: value for key, value in row.items() if key != "place"} for row in split] for split in splits]
        return Data(*splits, {"logits": names}, fingerprint(splits), (*notes, *repaired))

    def _row(self, record: dict[str, Any], place: str) -> Row:
        tokens, tags = tokens_and_tags(record, self.tokens_column, self.tags_column, place)
        return {"tokens": tokens, "tags": tags, "place": place}

    def heads(self, data: Data) -> list[dict[str, Any]]:
        return [head_shape("classifier", ["logits"], "all", len(data.labels["logits"]))]

    def encode(self, tokenizer: Tokenizer, rows: Sequence[Row], data: Data, pad_id: int) -> EncodedTexts:
        return encode_words(tokenizer, rows, data.labels["logits"], self.max_length, pad_id)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Cross-entropy on the first token of each word, averaged over the words of the batch."""
        return word_loss(outputs["logits"], batch.token_targets["tags"])

    def soft_loss(self, outputs: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, temperature: float) -> Tensor:
        """Averaged over all tokens: a teacher has an answer for the later pieces of a word too."""
        from pipeline.tasks.losses import softened_divergence

        return softened_divergence(outputs["logits"], teacher["logits"], temperature)

    def evaluate(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> dict[str, float]:
        """Scores of spans, and the share of words that no model can tag because they were cut off; they count as O."""
        scores = outputs["logits"] if "logits" in outputs else outputs["probabilities"]
        return span_scores(*predicted_tags(scores, texts, rows, data.labels["logits"])) | unseen_words(texts, rows)

    def options(self, data: Data) -> dict[str, Any]:
        return super().options(data) | {"decode": "softmax"}

    def example(self, row: Row) -> dict[str, str]:
        return {"text": row_text(row)}

    def unlabeled_row(self, line: str) -> Row:
        return {"text": line}
