"""Metrics of predictions. Class ids are integers from 0; all arrays (n,) on the host. Values and edge cases as in scikit-learn.

All raise ValueError for arrays that are empty or of different lengths.

With the confusion matrix C, C[i, j] = the number of class i predicted as j:   t_i = sum_j C_ij (true)   p_j = sum_i C_ij (predicted)
"""

from __future__ import annotations

import math

import numpy as np


def confusion(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """C (k, k), int64, k = the largest class id + 1."""
    _check(predicted, labels)
    k = int(max(predicted.max(), labels.max())) + 1
    return np.bincount(labels.astype(np.int64) * k + predicted, minlength=k * k).reshape(k, k)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """sum_i C_ii / n."""
    _check(predicted, labels)
    return float((predicted == labels).mean())


def f1(predicted: np.ndarray, labels: np.ndarray, average: str = "macro") -> float:
    """F1_i = 2 C_ii / (t_i + p_i), the harmonic mean of precision and recall.

    "macro": the mean over the classes that occur in labels or predictions; "binary": F1 of class 1, 0 when it does not occur.
    """
    C = confusion(predicted, labels)
    occurs = C.sum(axis=0) + C.sum(axis=1)
    if average == "binary":
        if len(C) > 2:
            raise ValueError(f"f1: average='binary' is for classes 0 and 1, got ids up to {len(C) - 1}.")
        return float(2 * C[1, 1] / occurs[1]) if len(C) == 2 else 0.0
    if average != "macro":
        raise ValueError(f"f1: unknown average {average!r}; choose macro or binary.")
    seen = occurs > 0
    return float((2 * C.diagonal()[seen] / occurs[seen]).mean())


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """(n sum_i C_ii - sum_i t_i p_i) / sqrt((n^2 - sum p_i^2) (n^2 - sum t_i^2)), 0 when a root is 0.

    Matthews' correlation coefficient for any number of classes: Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006, eq. 8.
    """
    C = confusion(predicted, labels).astype(np.float64)
    t, p, n = C.sum(axis=1), C.sum(axis=0), C.sum()
    below = math.sqrt((n * n - p @ p) * (n * n - t @ t))
    return float((n * C.trace() - t @ p) / below) if below > 0 else 0.0


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """cov(x, y) / (std(x) std(y)); nan when one of them is constant."""
    _check(x, y)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def perplexity(loss: float) -> float:
    """exp(loss), the loss being the mean over tokens in nats; inf where that overflows."""
    return math.exp(loss) if loss < 709 else math.inf if loss == loss else math.nan


def classification_metrics(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> dict[str, float]:
    """accuracy, f1 (of class 1 when there are two classes, else the macro average), f1_macro, matthews."""
    macro = f1(predicted, labels)
    return {
        "accuracy": accuracy(predicted, labels),
        "f1": f1(predicted, labels, "binary") if n_classes == 2 else macro,
        "f1_macro": macro,
        "matthews": matthews(predicted, labels),
    }


def _check(predicted: np.ndarray, labels: np.ndarray) -> None:
    if predicted.shape != labels.shape or predicted.ndim != 1:
        raise ValueError(f"metrics: predictions have shape {predicted.shape}, labels {labels.shape}; expected the same (n,).")
    if len(labels) == 0:
        raise ValueError("metrics: there are no predictions to measure.")
