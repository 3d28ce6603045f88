"""Plans: the best within every budget, compared with enumeration."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.errors import ModelError, RecipeError
from raycloud.retrain.cost import BlockChoice, Budget, Cost, training_cost
from raycloud.retrain.plan_rivals import full
from raycloud.retrain.planner import plan
from raycloud.retrain.plans import Terms
from tests.retrain.problems import GRID, Curves, budget_of, curves, enumerated, instance, penalty, terms_of


@pytest.mark.parametrize("seed", range(220))
def test_plans_equal_enumeration(seed: int) -> None:
    source = random.Random(seed)
    widths: tuple[float, ...] = (1.0,)
    blocks = source.randint(1, 10 if seed % 20 == 0 else 7)
    if seed % 3 == 0:
        widths, blocks = source.choice([(1.0, 0.5), (0.25, 1.0, 0.0), (1.0, 0.0)]), source.randint(1, 4)
    model, law = instance(source, blocks, widths, whole=seed % 2 == 0), curves(source, blocks)
    terms = terms_of(source)
    budget = budget_of(source, model, terms)
    weight = source.choice([0.0, 0.05, 0.3])
    found = plan(model, budget, law, steps_grid=GRID, width_penalty=penalty, penalty_weight=weight, **terms)
    assert found.value == pytest.approx(enumerated(model, budget, law, terms, penalty, weight), rel=1e-9, abs=1e-12)
    assert found.gap <= 1e-9
    assert not found.steps or found.cost.within(budget)
    assert found.cost == training_cost(model, found.choices, steps=found.steps, **terms)


@pytest.mark.parametrize("seed", range(10))
def test_short_lists_keep_the_budget_and_tell_the_gap(seed: int) -> None:
    source = random.Random(seed)
    model, law = instance(source, 7, (1.0,)), curves(source, 7)
    terms = Terms(batch=2, samples=9)
    whole = training_cost(model, [BlockChoice(1.0, True)] * 7, steps=30, **terms)
    budget = Budget(whole.flops * 0.4, whole.memory * 0.5, whole.bytes * 0.5)
    short = plan(model, budget, law, steps_grid=GRID, longest=1, **terms)
    best = enumerated(model, budget, law, terms, penalty, 0.0)
    assert not short.steps or short.cost.within(budget)
    assert short.value <= best + 1e-9 and best <= short.value + short.gap + 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), factors=st.tuples(*[st.floats(1, 3)] * 3))
def test_a_larger_budget_never_lowers_the_value(seed: int, factors: tuple[float, float, float]) -> None:
    source = random.Random(seed)
    model, law = instance(source, 6, (1.0, 0.5)), curves(source, 6)
    terms = terms_of(source)
    small = budget_of(source, model, terms)
    values = [plan(model, small, law, steps_grid=GRID, **terms).value]
    for index, factor in enumerate(factors):
        limits = [small.flops, small.memory, small.bytes]
        limits[index] *= factor
        values.append(plan(model, Budget(*limits), law, steps_grid=GRID, **terms).value)
    assert min(values[1:]) >= values[0] - 1e-9


def test_a_budget_of_all_trains_all_for_the_most_steps() -> None:
    source = random.Random(5)
    model = instance(source, 8, (1.0,))
    law = Curves([0.2] * 8, [20.0] * 8, 0.1)
    terms = Terms(batch=2, samples=9, cached=False)
    whole = [BlockChoice(1.0, True)] * 8
    cost = training_cost(model, whole, steps=60, **terms)
    found = plan(model, Budget(cost.flops, cost.memory, cost.bytes), law, steps_grid=GRID, **terms)
    assert (found.choices, found.steps, found.cost) == (tuple(whole), 60, cost)
    assert found == full(model, Budget(cost.flops, cost.memory, cost.bytes), most=60, law=law, **terms)


def test_memory_spent_before_beyond_the_budget_leaves_nothing_to_plan() -> None:
    model, law = instance(random.Random(7), 4, (1.0,)), curves(random.Random(7), 4)
    found = plan(model, Budget(memory=1e6), law, steps_grid=GRID, batch=1, samples=3, spent=Cost(memory=2e6))
    assert found.steps == 0


def test_wrong_requests_are_refused_in_one_line() -> None:
    model, law = instance(random.Random(12), 3, (1.0,)), Curves([0.1, math.nan, 0.1], [5.0] * 3, 0.1)
    with pytest.raises(RecipeError, match="steps_grid must be 1 to 16 numbers of 1 or more, got"):
        plan(model, Budget(), law, steps_grid=[], batch=1, samples=1)
    with pytest.raises(RecipeError, match="steps_grid must be 1 to 16 numbers"):
        plan(model, Budget(), law, steps_grid=[0], batch=1, samples=1)
    with pytest.raises(ModelError, match="values of blocks and head must be finite"):
        plan(model, Budget(), law, steps_grid=GRID, batch=1, samples=1)
    with pytest.raises(ModelError, match=r"penalty of block 0 at width 1\.0 must be finite, got nan"):
        plan(model, Budget(), law, steps_grid=GRID, batch=1, samples=1, width_penalty=lambda block, width: math.nan)
