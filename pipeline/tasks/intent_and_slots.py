"""What a speaker wants, and with what: a class for the text and a tag for each token, from one model with two heads.

Source: Chen et al. 2019, "BERT for Joint Intent Classification and Slot Filling", arXiv:1902.10909: the class is read from the
first token, tags from the first piece of each word, and the two cross-entropies are added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pipeline.tasks.base import SPLITS, Data, Metric, Outputs, Row, Task
from pipeline.tasks.batches import IGNORED, EncodedTexts
from pipeline.tasks.files import fingerprint, label_of, read_splits, text_of
from pipeline.tasks.heads import head_shape
from pipeline.tasks.tagged import encode_words, predicted_tags, row_text, span_scores, tag_names, to_bio, tokens_and_tags, unseen_words, word_loss
from runtimes.errors import BadInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from pipeline.tasks.batches import Batch


class IntentAndSlots(Task):
    """A text with its class, and its tokens with a tag each."""

    kind: ClassVar[str] = "intent-and-slots"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("frame_accuracy", "frame accuracy"), Metric("intent_accuracy", "intent accuracy"), Metric("slot_f1", "slot F1"),
    )  # fmt: skip

    label_column: str = "label"
    """Column of the class."""
    tokens_column: str = "tokens"
    """Column of the tokens."""
    tags_column: str = "tags"
    """Column of the tags."""

    def read(self, folder: Path) -> Data:
        rows, notes = read_splits(folder, self._row, by=lambda row: row["label"])
        splits = [rows[split] for split in ("train", "validation", "test")]
        repaired = to_bio(splits)
        tags = tag_names(splits[0], splits[1:])
        labels = sorted({row["label"] for row in splits[0]})
        if len(labels) < 2:
            raise BadInput(f"{folder}: every row has the label {labels[0]!r}; use token-classification, or add rows of other classes")
        for row in (row for split in splits[1:] for row in split):
            if row["label"] not in labels:
                raise BadInput(f"{row['place']}: label {row['label']!r} never occurs in the training rows")
        splits = [[{key: value for key, value in row.items() if key != "place"} for row in split] for split in splits]
        return Data(*splits, {"logits": labels, "slot_logits": tags}, fingerprint(splits), (*notes, *repaired))

    def _row(self, record: dict[str, Any], place: str) -> Row:
        tokens, tags = tokens_and_tags(record, self.tokens_column, self.tags_column, place)
        label = label_of(text_of(record, self.label_column, place, numbers=True), self.label_column, place)
        return {"label": label, "tokens": tokens, "tags": tags, "place": place}

    def heads(self, data: Data) -> list[dict[str, Any]]:
        return [
            head_shape("classifier", ["logits"], "first", len(data.labels["logits"]), pooler=True),
            head_shape("slots", ["slot_logits"], "all", len(data.labels["slot_logits"])),
        ]

    def encode(self, tokenizer: Tokenizer, rows: Sequence[Row], data: Data, pad_id: int) -> EncodedTexts:
        made = encode_words(tokenizer, rows, data.labels["slot_logits"], self.max_length, pad_id)
        index = {label: number for number, label in enumerate(data.labels["logits"])}
        return replace(made, targets={"labels": np.array([index.get(row.get("label"), IGNORED) for row in rows], np.int64)})

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Sum of the two cross-entropies, one averaged over texts, the other over words."""
        from torch.nn import functional

        intent = functional.cross_entropy(outputs["logits"].float(), batch.targets["labels"], ignore_index=IGNORED)
        return intent + word_loss(outputs["slot_logits"], batch.token_targets["tags"])

    def soft_loss(self, outputs: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Batch, temperature: float) -> Tensor:
        from pipeline.tasks.losses import softened_divergence

        return sum(softened_divergence(outputs[name], teacher[name], temperature) for name in ("logits", "slot_logits"))

    def evaluate(self, outputs: Outputs, texts: EncodedTexts, rows: Sequence[Row], data: Data) -> dict[str, float]:
        """A frame is right when its class and all its tags are."""
        intents = np.asarray(outputs["logits"] if "logits" in outputs else outputs["probabilities"]).argmax(-1)
        labels = data.labels["logits"]
        right = np.array([labels[intent] == rows[number]["label"] for intent, number in zip(intents, texts.rows, strict=True)])
        slots = outputs["slot_logits"] if "slot_logits" in outputs else outputs["slot_probabilities"]
        wanted, given = predicted_tags(slots, texts, rows, data.labels["slot_logits"])
        filled = np.array([one == other for one, other in zip(wanted, given, strict=True)])
        found = {"frame_accuracy": 100 * float((right & filled).mean()), "intent_accuracy": 100 * float(right.mean())}
        found |= {f"slot_{name}": value for name, value in span_scores(wanted, given).items() if " " not in name}
        return found | unseen_words(texts, rows)

    def options(self, data: Data) -> dict[str, Any]:
        return super().options(data) | {"decode": "softmax", "multi_label": False, "threshold": None}

    def example(self, row: Row) -> dict[str, str]:
        return {"text": row_text(row)}

    def floor(self, data: Data) -> dict[str, Any] | None:
        """Of the class alone: tags are beyond a bag of words."""
        from pipeline.tasks.bag_of_words import classify
        from pipeline.tasks.text_classification import TextClassification

        splits = {split: [self.example(row) | {"label": row["label"]} for row in data.split(split)] for split in SPLITS}
        task = TextClassification(data=self.data)
        found = classify(task, task.make(splits, self.data))
        return found | {"metrics": {split: {"intent_accuracy": values["accuracy"]} for split, values in found["metrics"].items()}}

    def unlabeled_row(self, line: str) -> Row:
        return {"text": line}
