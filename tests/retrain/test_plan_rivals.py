"""Rival plans: what their names say, never over the budget, never better than the exact plan."""

from __future__ import annotations

import random
from typing import Any

import pytest

from raycloud.errors import RecipeError
from raycloud.retrain.cost import BlockChoice, Budget, Cost, ModelCost, training_cost
from raycloud.retrain.plan_rivals import best_contiguous, full, greedy, head_only, last_blocks, random_blocks, taylor
from raycloud.retrain.planner import plan
from raycloud.retrain.plans import Plan, Terms, set_plan
from tests.retrain.problems import GRID, Curves, budget_of, curves, instance, terms_of


def every_plan(source: random.Random, model: ModelCost, budget: Budget, law: Curves, terms: Terms) -> dict[str, Plan]:
    most: dict[str, Any] = {"most": max(GRID), "law": law, **terms}
    return {
        "exact": plan(model, budget, law, steps_grid=GRID, **terms),
        "stretched": plan(model, budget, law, steps_grid=GRID, stretch=True, **terms),
        "greedy": greedy(model, budget, law, steps_grid=GRID, **terms),
        "head": head_only(model, budget, **most),
        "last": last_blocks(model, budget, count=source.randint(1, 3), **most),
        "full": full(model, budget, **most),
        "random": random_blocks(model, budget, seed=source.randint(0, 99), **most),
        "one random": random_blocks(model, budget, seed=source.randint(0, 99), count=1, **most),
        "contiguous": best_contiguous(model, budget, **most),
        "taylor": taylor(model, budget, ratio=0.5, **most),
    }


def test_no_plan_exceeds_its_budget_and_greedy_is_never_better() -> None:
    """1,000 plans, and more: ten kinds in 101 problems."""
    planned = 0
    for seed in range(101):
        source = random.Random(1000 + seed)
        blocks = source.randint(1, 6)
        model, law = instance(source, blocks, (1.0,), whole=seed % 2 == 0), curves(source, blocks)
        terms = terms_of(source)
        budget = budget_of(source, model, terms)
        plans = every_plan(source, model, budget, law, terms)
        for name, found in plans.items():
            planned += 1
            assert found.cost == training_cost(model, found.choices, steps=found.steps, **terms), name
            assert not found.steps or found.cost.within(budget), name
            assert found.steps or not found.trained, name
        assert plans["greedy"].value <= plans["exact"].value + 1e-9
        assert plans["exact"].value <= plans["stretched"].value
        assert all(found.steps == 0 or found.predicted_error is not None for found in plans.values())
    assert planned >= 1000


@pytest.mark.parametrize("budget", [Budget(flops=0), Budget(memory=0), Budget(bytes=0)])
def test_an_impossible_budget_gives_the_empty_plan(budget: Budget) -> None:
    source = random.Random(6)
    model, law = instance(source, 4, (1.0,)), curves(source, 4)
    spent = Cost(1, 2, 3)
    for found in every_plan(source, model, budget, law, Terms(batch=1, samples=3, spent=spent)).values():
        assert found == Plan(tuple([BlockChoice(1.0, False)] * 4), 0, 1.0, spent, 0.0)


def test_rivals_choose_what_their_names_say() -> None:
    model = instance(random.Random(10), 6, (1.0, 0.5))
    law = Curves([0.1, 0.9, 0.9, 0.1, 0.5, 0.1], [5.0] * 6, 0.1)
    terms: dict[str, Any] = {"batch": 2, "samples": 9, "most": 50}
    assert head_only(model, Budget(), **terms).trained == ()
    assert last_blocks(model, Budget(), **terms).trained == (5,)
    assert last_blocks(model, Budget(), count=2, **terms).trained == (4, 5)
    assert full(model, Budget(), **terms).trained == tuple(range(6))
    assert best_contiguous(model, Budget(), law, longest=2, **terms).trained == (1, 2)
    assert set_plan(model, Budget(), [4, 1], **terms).trained == (1, 4)
    drawn = [random_blocks(model, Budget(), seed=seed, **terms).trained for seed in range(20)]
    assert drawn == [random_blocks(model, Budget(), seed=seed, **terms).trained for seed in range(20)]
    assert len(set(drawn)) > 10
    assert all(found.steps == 50 for found in [full(model, Budget(), **terms)])


def test_first_order_gains_take_what_a_share_of_full_training_pays_for() -> None:
    model = instance(random.Random(11), 6, (1.0,))
    law = Curves([1.0] * 6, [1e-9] * 6, 0.0)  # the same value at any number of steps
    terms = Terms(batch=2, samples=9)
    budget = Budget(training_cost(model, [BlockChoice(1.0, True)] * 6, steps=20, **terms).flops)
    shares = [len(taylor(model, budget, law, ratio=ratio, most=500, **terms).trained) for ratio in (0.3, 0.6, 1.0)]
    assert shares == sorted(shares) and 0 < shares[0] < shares[1] < shares[2] == 6
    with pytest.raises(RecipeError, match="ratio must be above 0 and at most 1, got 0"):
        taylor(model, budget, law, ratio=0, most=500, **terms)
