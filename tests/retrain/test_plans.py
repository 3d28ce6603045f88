"""Steps that a budget affords, and the grid of them."""

from __future__ import annotations

import random

import pytest

from raycloud.retrain.cost import BlockChoice, Budget, training_cost
from raycloud.retrain.law import Law
from raycloud.retrain.plan_rivals import head_only
from raycloud.retrain.plans import (
    Terms,
    affordable_steps,
    corrected,
    head_phase,
    set_plan,
    steps_grid,
    training_choices,
    worthwhile,
)
from tests.retrain.problems import budget_of, instance, terms_of


def test_affordable_steps_are_the_most_that_fit() -> None:
    source = random.Random(8)
    for _ in range(50):
        model, terms = instance(source, 5, (1.0,)), terms_of(source)
        budget = budget_of(source, model, terms)
        choices = [BlockChoice(1.0, source.random() < 0.5) for _ in range(5)]
        steps = affordable_steps(model, choices, budget, most=77, **terms)
        fits = [training_cost(model, choices, steps=count, **terms).within(budget) for count in range(1, 79)]
        assert all(fits[:steps]) and (steps == 77 or not fits[steps])


def test_the_grid_of_steps_reaches_from_full_training_to_the_head_alone() -> None:
    model = instance(random.Random(9), 5, (1.0,))
    terms = Terms(batch=2, samples=9)
    whole = training_cost(model, [BlockChoice(1.0, True)] * 5, steps=40, **terms)
    grid = steps_grid(model, Budget(whole.flops), most=600, **terms)
    assert len(grid) <= 16 and list(grid) == sorted(set(grid))
    assert 39 <= grid[0] <= 40 and grid[-1] == head_only(model, Budget(whole.flops), most=600, **terms).steps


def test_the_head_goes_first_within_its_share_of_the_budget() -> None:
    source = random.Random(3)
    model = instance(source, 4, (1.0,))
    everything = training_cost(model, training_choices(model, range(4)), steps=40, batch=4, samples=12)
    for share in (0.001, 0.05, 0.5):
        steps, cost = head_phase(model, Budget(flops=everything.flops), most=30, share=share, batch=4, samples=12)
        assert cost.flops <= share * everything.flops and cost.bytes == 0
        more = training_cost(model, training_choices(model, ()), steps=steps + 1, batch=4, samples=12)
        assert steps == 30 or more.flops > share * everything.flops
    assert head_phase(model, Budget(), most=30, share=0.05, batch=4, samples=12)[0] == 30
    limit = Budget(flops=everything.flops)
    often, cost = head_phase(model, limit, most=3000, share=0.3, batch=4, samples=12, times=6)
    once, _ = head_phase(model, limit, most=18000, share=0.3, batch=4, samples=12)
    assert often == once // 6 and cost.flops <= 0.3 * everything.flops


def test_pilots_correct_predictions_and_blocks_must_be_worth_training() -> None:
    """By the law alone {0, 1} is best; pilots of that set were worse than predicted, and those of {1} were not."""
    model = instance(random.Random(3), 3, (1.0,))
    law = Law(0.5, 0.1, 0.1, 5.0, (0.6, 0.5, 0.4), (9.0,) * 3, (9.0,) * 3)
    plans = {
        blocks: set_plan(model, Budget(), blocks, most=20, law=law, batch=4, samples=12)
        for blocks in [(), (0,), (1,), (0, 1)]
    }
    errors = {blocks: one.predicted_error or 0.0 for blocks, one in plans.items()}
    assert min(errors, key=lambda blocks: errors[blocks]) == (0, 1)
    gap = errors[(1,)] - errors[(0, 1)]
    chosen = corrected(list(plans.values()), {(0, 1): gap + 0.01, (1,): 0.0, (): 0.0})
    assert chosen.trained == (1,) and chosen.predicted_error == errors[(1,)]
    # No pilot trained {0}, so the largest miss counts for it.
    known = corrected([plans[(0,)]], {(0, 1): 0.07, (): 0.0})
    assert known.predicted_error == pytest.approx(errors[(0,)] + 0.07)
    gain = errors[()] - errors[(1,)]
    assert worthwhile(chosen, plans[()], gain - 1e-9) == chosen
    assert worthwhile(chosen, plans[()], gain + 1e-9) == plans[()]
