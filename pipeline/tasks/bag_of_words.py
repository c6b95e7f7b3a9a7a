"""The floor: what a linear model on bags of words scores, which knows nothing of order or meaning.

Features are TF-IDF of words (one and two in a row) and of three to five characters; models are scikit-learn's LinearSVC, Ridge and, for
likeness, the cosine of the features themselves. If a BERT is hardly better, it is not worth its megabytes.

It costs seconds: of many training rows ``MOST_ROWS`` are drawn by a fixed seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

from pipeline.tasks.base import Data, Row, Task
from pipeline.tasks.batches import from_id_lists

MOST_ROWS = 20_000
MOST_FEATURES = 100_000
SPLITS = ("validation", "test")


def classify(task: Task, data: Data) -> dict[str, Any]:
    """LinearSVC; its decision values stand for logits."""
    train = _drawn(data.train)
    features = _features(train)
    labels = data.labels["logits"]
    model = LinearSVC(random_state=0)
    if "labels" in train[0]:
        has = np.array([[label in row["labels"] for label in labels] for row in train])
        known = np.flatnonzero(has.any(0) & ~has.all(0))  # of others there is nothing to learn from the drawn rows
        model, wanted = OneVsRestClassifier(model), has[:, known].astype(int)
    else:
        wanted = np.array([labels.index(row["label"]) for row in train])
        known = np.unique(wanted)
    model.fit(features(train), wanted)

    def logits(rows: Sequence[Row]) -> np.ndarray:
        values = model.decision_function(features(rows))
        values = np.stack([-values, values], axis=1) if values.ndim == 1 else values
        made = np.full((len(rows), len(labels)), values.min() - 1)  # classes that no drawn row has
        made[:, known] = values
        return made

    # Distances to planes are no log-probabilities, so what judges those is left out.
    return _scored(task, data, "linear SVM on bags of words", logits, ("log_loss", "calibration_error"))


def regress(task: Task, data: Data) -> dict[str, Any]:
    """Ridge regression; of pairs on the features of both texts and on what they share."""
    train = _drawn(data.train)
    features = _features(train)
    model = Ridge(random_state=0).fit(features(train), [row["value"] for row in train])
    return _scored(task, data, "ridge regression on bags of words", lambda rows: model.predict(features(rows))[:, None])


def compare(task: Task, data: Data) -> dict[str, Any]:
    """The cosine of the two bags of words, without any training."""
    fitted = _fitted([text for row in _drawn(data.train) for text in (row["text"], row.get("text_pair")) if text])
    metrics = {}
    for split in SPLITS:
        rows = data.split(split)
        first, second = (_transformed(fitted, [row[column] for row in rows]) for column in ("text", "text_pair"))
        lengths = np.sqrt(np.asarray(first.multiply(first).sum(1))[:, 0] * np.asarray(second.multiply(second).sum(1))[:, 0])
        cosines = np.asarray(first.multiply(second).sum(1))[:, 0] / np.maximum(lengths, 1e-12)
        # Two numbers whose product is the cosine, as vectors of two texts would give it.
        vectors = np.stack([cosines, np.ones_like(cosines)], axis=1).reshape(-1, 1)
        texts = _rows_as_inputs(rows, 2)
        metrics[split] = _rounded(task.evaluate({"sentence_embedding": vectors}, texts, rows, data))
    return {"name": "cosine of bags of words", "metrics": metrics}


def _scored(
    task: Task, data: Data, name: str, logits: Callable[[Sequence[Row]], np.ndarray], without: Sequence[str] = ()
) -> dict[str, Any]:
    metrics = {}
    for split in SPLITS:
        rows = data.split(split)
        found = task.evaluate({"logits": logits(rows)}, _rows_as_inputs(rows), rows, data)
        known = {metric.name for metric in task.metrics} - set(without)
        metrics[split] = _rounded({metric: value for metric, value in found.items() if metric in known})
    return {"name": name, "metrics": metrics}


def _rows_as_inputs(rows: Sequence[Row], group: int = 1) -> Any:
    """Inputs of one token each, so that a task can judge the values."""
    from dataclasses import replace

    return replace(from_id_lists([[0]] * (len(rows) * group), 0), row_of=np.repeat(np.arange(len(rows)), group), group=group)


def _drawn(rows: Sequence[Row]) -> list[Row]:
    if len(rows) <= MOST_ROWS:
        return list(rows)
    return [rows[i] for i in sorted(random.Random("floor").sample(range(len(rows)), MOST_ROWS))]


def _features(train: Sequence[Row]) -> Callable[[Sequence[Row]], Any]:
    """Rows -> sparse features; of pairs those of both texts, of their product and of their difference."""
    paired = "text_pair" in train[0]
    fitted = _fitted([row[column] for row in train for column in (("text", "text_pair") if paired else ("text",))])

    def features(rows: Sequence[Row]) -> Any:
        first = _transformed(fitted, [row["text"] for row in rows])
        if not paired:
            return first
        second = _transformed(fitted, [row["text_pair"] for row in rows])
        shared = first.multiply(second)
        return hstack([first, second, shared, abs(first - second), shared.sum(1)]).tocsr()

    return features


def _fitted(texts: Sequence[str]) -> list[TfidfVectorizer]:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=MOST_FEATURES, token_pattern=r"(?u)\b\w+\b")
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, max_features=MOST_FEATURES)
    return [vectorizer.fit(texts) for vectorizer in (words, letters)]


def _transformed(fitted: Sequence[TfidfVectorizer], texts: Sequence[str]) -> Any:
    return hstack([vectorizer.transform(texts) for vectorizer in fitted]).tocsr()


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in metrics.items()}
