"""Alarms: one for each domain, by hidden states, errors or a schedule."""

from __future__ import annotations

import pytest
import torch

from raycloud.retrain.alarms import DriftAlarm, ErrorReference
from raycloud.retrain.drift import DomainSignature, DriftVerdict, TapStatistics

SOURCE = TapStatistics((torch.zeros(4),) * 3, (torch.ones(4),) * 3)


def seen(shift: float) -> tuple[DriftVerdict, DomainSignature]:
    """Verdict and signature of a window whose hidden states are moved by so many standard deviations."""
    means = (torch.full((4,), shift),) * 2
    distances = torch.full((3,), shift**2)
    return DriftVerdict(100 * shift**2, abs(shift) > 0.1, distances), DomainSignature(distances, means)


def causes(alarm: DriftAlarm, windows: list[tuple[float, float | None]]) -> list[str | None]:
    """Causes of the alarms of windows, each answered at once."""
    found = []
    for shift, error in windows:
        verdict, signature = seen(shift)
        cause, alarm = alarm.after(verdict, signature, SOURCE, error, 100)
        found.append(cause)
        if cause:
            alarm = alarm.answered(signature, alarm.usual and ErrorReference(error or 0.0, 0.5, 20))
    return found


def test_a_domain_raises_one_alarm_and_the_way_back_another() -> None:
    windows = [(shift, None) for shift in (0.0, 0.0, 2.0, 2.02, -2.0, 0.0, 0.0)]
    drifts = "hidden_states"
    assert causes(DriftAlarm(0.5), windows) == [None, None, drifts, None, drifts, drifts, None]


def test_errors_raise_an_alarm_at_once_or_by_and_by() -> None:
    usual = ErrorReference(0.1, 0.3, 200)
    # One standard deviation of a mean over 100 samples is 0.037 here, and the limit 4 of them above a slack of half.
    assert causes(DriftAlarm(0.5, usual=usual), [(0.0, 0.1), (0.0, 0.3)]) == [None, "errors"]
    slowly = [(0.0, 0.1 + 0.037 * 1.6)] * 6
    assert causes(DriftAlarm(0.5, usual=usual), slowly) == [None, None, None, "errors", None, None]
    assert causes(DriftAlarm(0.5, usual=usual), [(0.0, 0.1 + 0.015)] * 50) == [None] * 50
    # The held-out samples that a later reference is of are few, which counts.
    assert ErrorReference(0.1, 0.3, 20).surplus(0.2, 100) == pytest.approx(0.1 / (0.3 * (1 / 100 + 1 / 20) ** 0.5))


def test_a_cool_down_delays_and_a_schedule_repeats() -> None:
    moving = [(float(shift), None) for shift in (2, -2, 4, -4)]
    assert causes(DriftAlarm(0.5, cool_down=1), moving) == ["hidden_states", None, "hidden_states", None]
    still = [(0.0, None)] * 5
    assert causes(DriftAlarm(0.5, every=2), still) == ["schedule", None, "schedule", None, "schedule"]
