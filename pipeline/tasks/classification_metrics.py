"""Figures of classifiers from their probabilities, by scikit-learn; in points of 100 but for the log loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import f1_score, log_loss, matthews_corrcoef, roc_auc_score

BINS = 15
"""Of the calibration error (Guo et al. 2017, arXiv:1706.04599)."""


def one_label(probabilities: np.ndarray, wanted: np.ndarray, labels: Sequence[str], positive: str | None) -> dict[str, float]:
    """``probabilities`` [N, C], ``wanted`` [N] class numbers."""
    given = probabilities.argmax(-1)
    normalised = probabilities / probabilities.sum(-1, keepdims=True)  # float32 files round their sums
    found = {
        "accuracy": 100 * float((given == wanted).mean()),
        "macro_f1": 100 * float(f1_score(wanted, given, average="macro", zero_division=0.0)),
        "matthews": 100 * float(matthews_corrcoef(wanted, given)),
        "log_loss": float(log_loss(wanted, normalised, labels=np.arange(probabilities.shape[1]))),
        "calibration_error": 100 * calibration_error(normalised.max(-1), given == wanted),
    }
    if positive is not None:
        number = list(labels).index(positive)
        found["f1"] = 100 * float(f1_score(wanted == number, given == number, zero_division=0.0))
    return found


def several_labels(probabilities: np.ndarray, wanted: np.ndarray, threshold: float, labels: Sequence[str], positive: str | None) -> dict[str, float]:
    """``probabilities`` and ``wanted`` [N, C]; a row is right in ``accuracy`` when all its classes are."""
    given, wanted = probabilities >= threshold, wanted > 0.5
    found = {
        "accuracy": 100 * float((given == wanted).all(-1).mean()),
        "macro_f1": 100 * float(f1_score(wanted, given, average="macro", zero_division=0.0)),
        "micro_f1": 100 * float(f1_score(wanted, given, average="micro", zero_division=0.0)),
    }
    if positive is not None:
        number = list(labels).index(positive)
        found["f1"] = 100 * float(f1_score(wanted[:, number], given[:, number], zero_division=0.0))
    return found


def recalls(probabilities: np.ndarray, wanted: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Share of each class' rows that are right, under ``recall CLASS``; classes without a row are left out."""
    right = probabilities.argmax(-1) == wanted
    return {f"recall {label}": 100 * float(right[wanted == number].mean()) for number, label in enumerate(labels) if (wanted == number).any()}


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean over bins of |share right - mean confidence|, weighted by their rows."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return float(sum(abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(BINS)) / len(right))


def separation(confidence: np.ndarray, in_scope: np.ndarray) -> float:
    """Area under the curve of telling texts of a class from texts of none by the confidence."""
    return 100 * float(roc_auc_score(in_scope, confidence))
