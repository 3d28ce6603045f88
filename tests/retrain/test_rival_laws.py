"""Rival laws: what they cannot say, and that they plan."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.errors import TrainingError
from raycloud.retrain.cost import Budget, ModelCost, WidthCost
from raycloud.retrain.law import Law
from raycloud.retrain.law_fit import fit, mean_miss
from raycloud.retrain.pilots import Pilot
from raycloud.retrain.planner import plan
from raycloud.retrain.rival_laws import PowerLaw, Score
from tests.retrain.laws import BLOCKS, SETS, TRUE, crossing, positive


@settings(max_examples=50, deadline=None)
@given(values=st.lists(positive, min_size=6, max_size=6), beta=st.floats(0.05, 2))
def test_no_power_law_lets_late_blocks_win_with_few_steps_and_early_ones_with_many(
    values: list[float], beta: float
) -> None:
    few, many = crossing(PowerLaw(1.0, 0.1, 0.3, tuple(values), beta, 40.0))
    assert few == many


def test_the_saturating_law_finds_that_crossing_and_the_power_law_does_not() -> None:
    assert crossing(TRUE) == (False, True)
    source = random.Random(4)
    measured = [
        Pilot(blocks, steps, 300, max(0.0, TRUE.error(dict.fromkeys(blocks, 1.0), steps, 300) + source.gauss(0, 0.01)))
        for blocks in SETS
        for steps in (10, 40, 120, 300, 1200)
    ]
    law = fit(measured, Law.neutral(0.75, BLOCKS, 100, 300), noise=0.015)
    power = fit(measured, PowerLaw.neutral(0.75, BLOCKS, 100), noise=0.015)
    assert crossing(law) == (False, True)
    assert len(set(crossing(power))) == 1
    assert mean_miss(law, measured) < mean_miss(power, measured)


def test_laws_and_scores_plan() -> None:
    block = WidthCost(1.0, 1, 1, 1, 1, 2, 1, 2, 0, 1)
    model = ModelCost(((block,),) * BLOCKS, 0, 0.1, 0.2, 0, 0, 0, (0.0,) * (BLOCKS + 1))
    few, many = (
        plan(model, Budget(flops=flops), TRUE, steps_grid=(5, 10, 20, 40, 80, 160, 320), batch=32, samples=100).trained
        for flops in (6_000, 300_000)
    )
    assert few and min(few) > min(many) == 0
    scored = plan(model, Budget(flops=45), Score((9, 1, 1, 1, 1, 1)), steps_grid=(3,), batch=1, samples=1)
    assert 0 in scored.trained and scored.predicted_error is None


def test_wrong_numbers_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match="scores must be finite and 0 or more"):
        Score((1.0, -1.0))
