"""Held-out loss, and metrics of predictions, with values and edge cases as in scikit-learn."""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from minilora.backend import get_xp
from minilora.data.batches import Batch

Result = TypeVar("Result")


def evaluate(model: Any, batches: Iterable[Batch], threads: int = 1) -> tuple[float, int]:
    """(mean loss per labelled token in nats, number of labelled tokens). Nothing is saved, dropout is off.

    Batches are computed in parallel; their losses are added in order, so the result does not depend on the number of threads.
    Raises ValueError when no token is labelled.
    """
    batches = list(batches)
    sums = map_batches(model, batches, lambda model, b: float(model.loss(b.ids, b.labels, b.offsets, 1, keep=False)[0]), threads)
    tokens = sum(b.labelled for b in batches)
    if tokens == 0:
        raise ValueError("there is nothing to evaluate: no token is labelled.")
    return sum(sums) / tokens, tokens


def map_batches(model: Any, batches: Sequence[Batch], f: Callable[[Any, Batch], Result], threads: int = 1) -> list[Result]:
    """[f(model, batch) for every batch], in order, with one BLAS thread in each of `threads` threads."""
    if any(get_xp(p.data) is not np for _, p in model.parameters()):
        threads = 1  # one device runs in parallel by itself
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda batch: f(model, batch), batches))


def confusion(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """C (n_classes, n_classes): C[i, j] = the number of class i predicted as j."""
    _check(predicted, labels)
    return np.bincount(labels.astype(np.int64) * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)


def classification_metrics(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> dict[str, float]:
    """accuracy, f1, f1_macro and matthews of class ids (n,), both from 0 to n_classes - 1.

    With C of `confusion`,   t_i = sum_j C_ij (true)   and   p_j = sum_i C_ij (predicted):

        accuracy   sum_i C_ii / n
        F1_i       2 C_ii / (t_i + p_i), the harmonic mean of precision and recall
        f1_macro   the mean of F1_i over the classes that occur in labels or predictions
        f1         F1_1 where there are two classes, else f1_macro
        matthews   (n sum_i C_ii - sum_i t_i p_i) / sqrt((n^2 - sum p_i^2) (n^2 - sum t_i^2)), 0 when a root is 0
                   (Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006, eq. 8)
    """
    C = confusion(predicted, labels, n_classes)
    t, p, n, right = C.sum(axis=1).astype(np.float64), C.sum(axis=0).astype(np.float64), len(labels), float(C.trace())
    each = 2 * C.diagonal() / np.maximum(t + p, 1)
    macro = float(each[t + p > 0].mean())
    below = math.sqrt((n * n - p @ p) * (n * n - t @ t))
    return {
        "accuracy": right / n,
        "f1": float(each[1]) if n_classes == 2 else macro,
        "f1_macro": macro,
        "matthews": float((n * right - t @ p) / below) if below > 0 else 0.0,
    }


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


def _check(predicted: np.ndarray, labels: np.ndarray) -> None:
    if predicted.shape != labels.shape or predicted.ndim != 1:
        raise ValueError(f"metrics: predictions have shape {predicted.shape}, labels {labels.shape}; expected the same (n,).")
    if len(labels) == 0:
        raise ValueError("metrics: there are no predictions to measure.")
