"""Costs of retraining: the terms of each sum, on numbers that tell them apart."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from raycloud.errors import ModelError, RecipeError
from raycloud.retrain.cost import BlockChoice, Budget, Cost, ModelCost, WidthCost, training_cost

FROZEN, TRAINED = BlockChoice(1.0, False), BlockChoice(1.0, True)
DROPPED = WidthCost(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def block(scale: float) -> WidthCost:
    return WidthCost(1.0, *(scale * term for term in (1, 2, 3, 5, 7, 11, 13, 17, 19)))


@pytest.fixture
def model() -> ModelCost:
    menus = tuple((block(10.0**power), DROPPED) for power in range(3))
    return ModelCost(menus, 0.25, 0.125, 0.5, 23.0, 29.0, 31.0, (1.0, 2.0, 4.0, 8.0))


def cost_of(
    model: ModelCost, *choices: BlockChoice, steps: int = 3, cached: bool = True, spent: Cost | None = None
) -> Cost:
    return training_cost(model, choices, steps=steps, batch=2, samples=5, cached=cached, spent=spent)


def test_the_middle_block_of_three_with_the_cache(model: ModelCost) -> None:
    cost = cost_of(model, FROZEN, TRAINED, FROZEN)
    once = 5 * (0.25 + 1)  # stem and block 0, once per sample
    step = 2 * (0.25 + 10 + 100 + 20 + 200 + 30 + 0.125 + 0.5)  # forward and input gradients from block 1 on
    assert cost.flops == once + 3 * step
    activations = 130 + 1100 + 23
    assert cost.memory == 29 + 5 * 111 + 70 + 2 * activations + 5 * 2.0
    assert cost.bytes == 31 + 17 * 111 + 190


def test_without_the_cache_each_step_computes_all_blocks(model: ModelCost) -> None:
    cached, plain = (cost_of(model, FROZEN, TRAINED, FROZEN, cached=cached) for cached in (True, False))
    assert plain.flops == cached.flops - 5 * (0.25 + 1) + 3 * 2 * 1
    assert plain.memory == cached.memory - 5 * 2.0
    assert plain.bytes == cached.bytes


def test_a_trained_first_block_leaves_nothing_to_cache(model: ModelCost) -> None:
    assert cost_of(model, TRAINED, FROZEN, FROZEN) == cost_of(model, TRAINED, FROZEN, FROZEN, cached=False)


def test_the_head_alone_computes_only_stem_and_head(model: ModelCost) -> None:
    cost = cost_of(model, FROZEN, FROZEN, FROZEN)
    assert cost.flops == 5 * (0.25 + 111) + 3 * 2 * (0.25 + 0.125 + 0.5)
    assert cost.memory == 29 + 5 * 111 + 2 * 23 + 5 * 8.0
    assert cost.bytes == 31 + 17 * 111


def test_dropped_blocks_cost_nothing(model: ModelCost) -> None:
    dropped = cost_of(model, BlockChoice(0.0, False), BlockChoice(0.0, False), TRAINED)
    assert dropped.flops == 5 * 0.25 + 3 * 2 * (0.25 + 600 + 0.625)
    assert dropped.bytes == 31 + 100 * (17 + 19)


def test_what_was_spent_is_added_except_for_the_peak_of_memory(model: ModelCost) -> None:
    alone = cost_of(model, TRAINED, TRAINED, TRAINED)
    assert cost_of(model, TRAINED, TRAINED, TRAINED, spent=Cost(7, 3, 2)) == Cost(
        alone.flops + 7, alone.memory, alone.bytes + 2
    )
    assert cost_of(model, TRAINED, TRAINED, TRAINED, spent=Cost(0, 1e9, 0)).memory == 1e9
    assert cost_of(model, TRAINED, TRAINED, TRAINED, steps=0, spent=Cost(7, 3, 2)) == Cost(7, 3, 2)
    assert cost_of(model, TRAINED, TRAINED, TRAINED, steps=0) == Cost()


def test_a_cost_is_within_a_budget_that_it_equals() -> None:
    cost = Cost(3, 4, 5)
    assert cost.within(Budget(3, 4, 5)) and cost.within(Budget())
    assert not cost.within(Budget(2, 4, 5)) and not cost.within(Budget(3, 3, 5)) and not cost.within(Budget(3, 4, 4))


@pytest.mark.parametrize("limits", [(math.nan, 1, 1), (1, -1, 1), (1, 1, -math.inf)])
def test_budgets_are_numbers_of_0_or_more(limits: tuple[float, float, float]) -> None:
    with pytest.raises(RecipeError, match="of Budget must be 0 or more, got"):
        Budget(*limits)


def test_wrong_records_are_refused_in_one_line(model: ModelCost) -> None:
    with pytest.raises(ModelError, match="forward of WidthCost must be finite and 0 or more, got nan"):
        WidthCost(1.0, math.nan, 0, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ModelError, match=r"width of WidthCost must be 0 to 1, got 1\.5"):
        WidthCost(1.5, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ModelError, match="dropped and cannot be trained"):
        BlockChoice(0.0, True)
    with pytest.raises(ModelError, match="must be 3 numbers of 0 or more, one before each block"):
        ModelCost(model.blocks[:2], 0, 0, 0, 0, 0, 0, (1.0, 1.0))
    with pytest.raises(ModelError, match="widths of block 0 must differ"):
        ModelCost(((block(1), block(2)),), 0, 0, 0, 0, 0, 0, (1.0, 1.0))
    with pytest.raises(ModelError, match="choices must be 3, one per block, got 1"):
        cost_of(model, TRAINED)
    with pytest.raises(ModelError, match=r"width 0\.5 of block 0 must be one of \[1\.0, 0\]"):
        cost_of(model, BlockChoice(0.5, True), FROZEN, FROZEN)
    with pytest.raises(RecipeError, match="steps must be 0 or more"):
        cost_of(model, TRAINED, FROZEN, FROZEN, steps=-1)


def test_costs_laws_and_plans_load_without_torch() -> None:
    names = [
        "cost",
        "knapsack",
        "law",
        "law_fit",
        "law_prior",
        "pilots",
        "plan_rivals",
        "planner",
        "plans",
        "rival_laws",
    ]
    program = (
        f"import sys, {', '.join(f'raycloud.retrain.{name}' for name in names)}\n"
        "heavy = {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
