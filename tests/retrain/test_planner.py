"""Plans: the best within every budget, compared with enumeration; rivals; no plan over budget."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.errors import ModelError, RecipeError
from raycloud.retrain import planner
from raycloud.retrain.cost import BlockChoice, Budget, Cost, ModelCost, WidthCost, training_cost
from raycloud.retrain.planner import (
    Plan,
    Terms,
    affordable_steps,
    best_contiguous,
    full,
    greedy,
    head_only,
    last_blocks,
    plan,
    random_blocks,
    set_plan,
    steps_grid,
    taylor,
)

GRID = (4, 16, 60)


class Curves:
    """Saturating values of blocks, and of the head."""

    def __init__(self, ceilings: list[float], steps: list[float], head: float) -> None:
        self.ceilings, self.steps, self.head = np.asarray(ceilings), np.asarray(steps), head

    def value(
        self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: int
    ) -> npt.NDArray[np.float64]:
        block = np.asarray(block)
        share = -np.expm1(-np.asarray(steps, dtype=np.float64) / self.steps[block])
        return self.ceilings[block] * np.sqrt(np.asarray(width, dtype=np.float64)) * share

    def head_value(self, steps: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return -self.head * np.expm1(-np.asarray(steps, dtype=np.float64) / 5)

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> float:
        total = self.head_value(steps) + sum(
            float(self.value(block, width, steps, samples)) for block, width in trained.items()
        )
        return float(np.exp(-total))


def instance(source: random.Random, blocks: int, widths: tuple[float, ...], whole: bool = False) -> ModelCost:
    """Model of random costs; whole numbers make many plans cost the same."""

    def number(low: float, high: float) -> float:
        return float(source.randint(int(low), int(high))) if whole else source.uniform(low, high)

    def option(width: float) -> WidthCost:
        if width == 0:
            return WidthCost(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        terms = [(5, 15), (5, 20), (5, 15), (1, 5), (5, 30), (1, 9), (2, 15), (0, 4), (1, 9)]
        return WidthCost(width, *(width * number(*term) for term in terms))

    menus = tuple(tuple(option(width) for width in widths) for _ in range(blocks))
    boundary = tuple(number(0, 6) for _ in range(blocks + 1))
    return ModelCost(
        menus, number(0, 3), number(1, 3), number(1, 3), number(1, 3), number(1, 20), number(1, 5), boundary
    )


def curves(source: random.Random, blocks: int) -> Curves:
    ceilings = [max(0.0, source.uniform(-0.1, 0.6)) for _ in range(blocks)]
    return Curves(ceilings, [source.uniform(3, 80) for _ in range(blocks)], source.uniform(0, 0.5))


def budget_of(source: random.Random, model: ModelCost, terms: Terms) -> Budget:
    """Budget between nothing and more than everything, at times without a limit, at times just reached by a plan."""
    everything = training_cost(model, [BlockChoice(width, True) for width in model.whole], steps=max(GRID), **terms)
    if source.random() < 0.2:
        chosen = [BlockChoice(width, source.random() < 0.5) for width in model.whole]
        reached = training_cost(model, chosen, steps=source.choice(GRID), **terms)
        return Budget(reached.flops, reached.memory, reached.bytes)
    limits = [
        math.inf if source.random() < 0.2 else source.uniform(0, 1.1) * most
        for most in (everything.flops, everything.memory, everything.bytes)
    ]
    return Budget(*limits)


def terms_of(source: random.Random) -> Terms:
    spent = Cost(source.uniform(0, 50), source.uniform(0, 100), source.uniform(0, 2)) if source.random() < 0.3 else None
    return Terms(batch=source.randint(1, 4), samples=source.randint(1, 30), cached=source.random() < 0.7, spent=spent)


def enumerated(
    model: ModelCost, budget: Budget, law: Curves, terms: Terms, penalty: Callable[[int, float], float], weight: float
) -> float:
    """Highest value of all plans, that of doing nothing among them."""
    menus = [
        [
            BlockChoice(option.width, trained)
            for option in menu
            for trained in (False, True)
            if option.width or not trained
        ]
        for menu in model.blocks
    ]
    values = {
        (block, choice, steps): (
            float(law.value(block, choice.width, steps, terms["samples"])) if choice.trained else 0.0
        )
        - weight * penalty(block, choice.width)
        for block, menu in enumerate(menus)
        for choice in menu
        for steps in GRID
    }
    best = 0.0
    for choices in itertools.product(*menus):
        for steps in GRID:
            value = float(law.head_value(steps)) + sum(
                values[block, choice, steps] for block, choice in enumerate(choices)
            )
            if value > best and training_cost(model, choices, steps=steps, **terms).within(budget):
                best = value
    return best


def penalty(block: int, width: float) -> float:
    return (1 + block % 3) * (1 - width)


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


@pytest.mark.parametrize("budget", [Budget(flops=0), Budget(memory=0), Budget(bytes=0)])
def test_an_impossible_budget_gives_the_empty_plan(budget: Budget) -> None:
    source = random.Random(6)
    model, law = instance(source, 4, (1.0,)), curves(source, 4)
    spent = Cost(1, 2, 3)
    for found in every_plan(source, model, budget, law, Terms(batch=1, samples=3, spent=spent)).values():
        assert found == Plan(tuple([BlockChoice(1.0, False)] * 4), 0, 1.0, spent, 0.0)


def test_memory_spent_before_beyond_the_budget_leaves_nothing_to_plan() -> None:
    model, law = instance(random.Random(7), 4, (1.0,)), curves(random.Random(7), 4)
    found = plan(model, Budget(memory=1e6), law, steps_grid=GRID, batch=1, samples=3, spent=Cost(memory=2e6))
    assert found.steps == 0


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


def test_sixty_blocks_are_solved_exactly_with_short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work, not time: the partial plans compared for 62 different blocks and three scarce resources."""
    source = random.Random(13)
    model, law = instance(source, 62, (1.0,)), curves(source, 62)
    compared = []
    plain = planner._undominated

    def counted(cost: npt.NDArray[np.float64], value: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        compared.append(len(value))
        return plain(cost, value)

    monkeypatch.setattr(planner, "_undominated", counted)
    terms = Terms(batch=2, samples=50)
    whole = training_cost(model, [BlockChoice(1.0, True)] * 62, steps=100, **terms)
    budget = Budget(whole.flops * 0.2, whole.memory * 0.45, whole.bytes * 0.4)
    found = plan(model, budget, law, steps_grid=steps_grid(model, budget, most=1000, **terms), **terms)
    assert found.gap <= 1e-9 and found.trained
    assert max(compared) < 10_000 and sum(compared) < 200_000
