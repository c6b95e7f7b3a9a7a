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
CERTAIN = 100.0
"""Logit of a class that every row has; of one that no drawn row has, less than 0. Decision values are a few units."""


def classify(task: Task, data: Data) -> dict[str, Any]:
    """LinearSVC; its decision values stand for logits."""
    train = _drawn(data.train)
    features = _features(train)
    labels, several = data.labels["logits"], "labels" in train[0]
    has = np.array([[label in (row["labels"] if several else [row["label"]]) for label in labels] for row in train])
    known = np.flatnonzero(has.any(0) & ~has.all(0))  # of others there is nothing to learn from the drawn rows
    values = _planes(features(train), has[:, known], several) if len(known) else None

    def logits(rows: Sequence[Row]) -> np.ndarray:
        made = np.repeat(np.where(has.all(0), CERTAIN, -CERTAIN)[None], len(rows), axis=0)
        if values is not None:
            made[:, known] = values(features(rows))
        return made

    # Distances to planes are no log-probabilities, so what judges those is left out.
    return _scored(task, data, "linear SVM on bags of words", logits, ("log_loss", "calibration_error"))


def _planes(features: Any, has: np.ndarray, several: bool) -> Callable[[Any], np.ndarray]:
    """Features -> decision values [N, C], fitted to ``has`` [N, C]: one class a row, or any number (``several``)."""
    if not several:
        model = LinearSVC(random_state=0).fit(features, has.argmax(1))
    elif has.shape[1] == 1:
        model = LinearSVC(random_state=0).fit(features, has[:, 0].astype(int))
    else:
        model = OneVsRestClassifier(LinearSVC(random_state=0)).fit(features, has.astype(int))

    def values(features: Any) -> np.ndarray:
        found = model.decision_function(features)
        return found if found.ndim == 2 else np.stack([-found, found], axis=1)[:, -has.shape[1] :]

    return values


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
    split = words.build_analyzer()
    worded = any(split(text) for text in texts)  # signs and emoji alone make no word
    return [vectorizer.fit(texts) for vectorizer in ((words, letters) if worded else (letters,))]


def _transformed(fitted: Sequence[TfidfVectorizer], texts: Sequence[str]) -> Any:
    return hstack([vectorizer.transform(texts) for vectorizer in fitted]).tocsr()


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in metrics.items()}
