"""Attacks on reports of drift find a word that shifts hidden states, and none that does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.evaluation.privacy.word_presence import area_under_curve
from raycloud.retrain.drift import TapStatistics
from raycloud.retrain.report_privacy import TextSide, attacked


def side(seed: int, shift: float) -> TextSide:
    """Texts whose hidden states are normal at three taps; the first word shifts some coordinates, the other none."""
    generator = torch.Generator().manual_seed(seed)

    def taps(count: int) -> list[Tensor]:
        return [torch.randn(count, 12, generator=generator) for _ in range(3)]

    plain = taps(80)
    direction = torch.zeros(12)
    direction[:3] = shift
    return TextSide(plain, ([one[:20] + direction for one in plain], [one[:20] for one in plain]))


def test_areas_are_the_chance_of_the_right_order() -> None:
    truth = torch.tensor([True, True, False, False])
    assert area_under_curve(torch.tensor([3.0, 1.0, 2.0, 1.0]), truth) == pytest.approx(2.5 / 4)
    with pytest.raises(ValueError, match="with and without"):
        area_under_curve(torch.ones(2), torch.ones(2, dtype=torch.bool))


def test_means_tell_a_word_and_chance_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.retrain.report_privacy.WINDOWS", 120)
    known, seen = side(0, 3.0), side(1, 3.0)
    source = TapStatistics.of(side(2, 0.0).plain)
    found = attacked(known, seen, source, ["shifts", "does not"], window=40, count=8, seed=0)
    assert found["shifts"].means > 0.95
    assert found["shifts"].means > found["shifts"].chance + 0.2
    assert abs(found["does not"].means - 0.5) < 0.25
    with pytest.raises(ValueError, match="do not fit"):
        attacked(known, seen, source, ["a", "b"], window=10, count=8, seed=0)
