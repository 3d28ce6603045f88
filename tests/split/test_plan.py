"""Plans of cuts: which are possible, and which blocks each side gets."""

from __future__ import annotations

import random

import pytest

from raycloud.errors import ModelError
from raycloud.split.plan import PlanSet, SplitPlan


def test_impossible_plans_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="start_block=5, end_block=3"):
        SplitPlan(5, 3)
    with pytest.raises(ModelError, match="start_block=-1"):
        SplitPlan(-1, 3)
    with pytest.raises(ModelError, match="end_block=9 is beyond the model's 8 blocks"):
        SplitPlan(2, 9).check(8)
    with pytest.raises(ModelError, match="at or below"):
        PlanSet((5,), (3, 4))
    with pytest.raises(ModelError, match="cut 9"):
        PlanSet((1,), (9,)).check(8)


def test_both_sides_hold_what_they_may_have_to_run() -> None:
    fixed = PlanSet.of(SplitPlan(2, 6))
    assert fixed.fixed and fixed.kept(8) == frozenset()
    assert fixed.cloud == range(2, 6) and fixed.edge(8) == (range(2), range(6, 8))
    drawn = PlanSet((0, 4), (3, 8))
    assert not drawn.fixed and drawn.kept(8) == {0, 3, 4}
    assert drawn.cloud == range(0, 8) and drawn.edge(8) == (range(4), range(3, 8))


def test_drawn_plans_are_in_order_and_of_the_set() -> None:
    plans, source = PlanSet((0, 3, 5), (1, 4, 8)), random.Random(0)
    drawn = [plans.draw(source) for _ in range(200)]
    assert all(plan.start_block <= plan.end_block and plans.allows(plan) for plan in drawn)
    assert {plan.start_block for plan in drawn} == {0, 3, 5} and {plan.end_block for plan in drawn} == {1, 4, 8}
