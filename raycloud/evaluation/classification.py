"""Agreement of predicted classes and numbers with the true ones: the metrics of GLUE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """Share of predictions that equal the true value, 0 to 1."""
    return float((predicted == true).mean())


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of class 1: the harmonic mean of precision and recall; 0 if class 1 never occurs."""
    both = float(((predicted == 1) & (true == 1)).sum())
    either = float((predicted == 1).sum() + (true == 1).sum())
    return 2 * both / either if either else 0.0


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Matthews' correlation of two classes; 0 if either array is constant."""
    return _correlation(predicted, true)


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson correlation of two arrays of numbers; 0 if one of them is constant."""
    return _correlation(predicted, true)


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Spearman correlation: the Pearson correlation of the ranks."""
    from scipy.stats import rankdata  # the import is a tenth of a worker's start time, and few callers need it

    return _correlation(rankdata(predicted), rankdata(true))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if len(one) < 2 or not np.ptp(one) or not np.ptp(other):
        return 0.0
    return float(np.corrcoef(one.astype(float), other.astype(float))[0, 1])


METRICS: dict[Metric, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def paired_standard_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Standard error of the difference of two accuracies on the same texts, from hits (n,) or (seeds, n) as booleans.

    The sampling unit is the text; with several seeds, a text's hits are averaged over the seeds first.
    """
    apart = np.atleast_2d(ours).astype(float).mean(axis=0) - np.atleast_2d(theirs).astype(float).mean(axis=0)
    return float(apart.std(ddof=1) / math.sqrt(len(apart)))
