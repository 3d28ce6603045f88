"""Equality of the two formulations of the benchmark; its figures are not checked."""

from __future__ import annotations

from raycloud.benchmarks import distill_step
from raycloud.benchmarks.measure import median_ratio


def test_both_formulations_have_equal_loss_and_gradients() -> None:
    case = distill_step.StepCase(vocab_size=997)
    assert distill_step.difference(case) <= 1e-4


def test_ratios_are_taken_pair_by_pair() -> None:
    assert median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0
