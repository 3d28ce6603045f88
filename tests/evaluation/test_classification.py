"""Classification metrics against the definitions of scikit-learn and SciPy, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from raycloud.evaluation.classification import METRICS, paired_standard_error

GUESSED = np.array([1, 1, 0, 0, 1, 0, 1, 0])
TRUE = np.array([1, 0, 0, 1, 1, 0, 1, 1])


def test_classes() -> None:
    # 3 right ones, 1 wrong one, 2 missed, 2 rightly left out.
    assert METRICS["accuracy"](GUESSED, TRUE) == 5 / 8
    assert METRICS["f1"](GUESSED, TRUE) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert METRICS["matthews"](GUESSED, TRUE) == pytest.approx((3 * 2 - 1 * 2) / np.sqrt(4 * 5 * 3 * 4))
    nothing = np.zeros(8, dtype=int)
    assert METRICS["f1"](nothing, nothing) == METRICS["matthews"](nothing, TRUE) == 0.0


def test_numbers() -> None:
    chance = np.random.default_rng(0)
    one = chance.normal(size=50)
    other = np.exp(one) + 0.1 * chance.normal(size=50)
    assert METRICS["pearson"](one, other) == pytest.approx(stats.pearsonr(one, other)[0])
    assert METRICS["spearman"](one, other) == pytest.approx(stats.spearmanr(one, other)[0])
    assert METRICS["pearson"](one, np.ones(50)) == 0.0


def test_the_error_of_a_paired_difference_is_that_of_its_mean() -> None:
    """Samples that both models get right, or both get wrong, add nothing."""
    chance = np.random.default_rng(1)
    draws = []
    for _ in range(300):
        theirs = chance.random(200) < 0.8
        ours = theirs ^ (chance.random(200) < 0.05)
        draws.append((ours.mean() - theirs.mean(), paired_standard_error(ours, theirs)))
    apart, errors = np.array(draws).T
    assert errors.mean() == pytest.approx(apart.std(), rel=0.15)
    assert errors.mean() < 0.6 * np.sqrt(2 * 0.8 * 0.2 / 200)
