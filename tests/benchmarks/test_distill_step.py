"""The benchmark's two formulations agree; its figures are its own business."""

from __future__ import annotations

import pytest

from raycloud.benchmarks import distill_step
from raycloud.benchmarks.measure import median_ratio


def test_both_formulations_have_equal_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_step, "WORDS", 997)
    monkeypatch.setattr(distill_step, "HIDDEN", 48)
    case = distill_step.Case()
    assert distill_step.difference(case) <= 1e-4


def test_ratios_are_taken_pair_by_pair() -> None:
    assert median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0
