"""Budget of a window, in the units of a recipe: absolute, or as shares of what full fine-tuning takes."""

from __future__ import annotations

import math

from raycloud.retrain.cost import Budget, ModelCost, training_cost
from raycloud.retrain.plans import training_choices
from raycloud.retrain.recipe import BudgetRecipe


def budget_of(recipe: BudgetRecipe, cost: ModelCost, *, batch: int, samples: int) -> Budget:
    """Budget of a window; of two limits on one resource the lower one counts.

    Args:
        recipe: limits of the recipe.
        cost: costs of the model's parts.
        batch: samples of each step.
        samples: different samples of the window.
    """
    everything = training_choices(cost, range(len(cost.blocks)))
    full = training_cost(cost, everything, steps=recipe.full_steps or 1, batch=batch, samples=samples)
    flops = [recipe.flops or math.inf, full.flops if recipe.full_steps is not None else math.inf]
    memory = [
        recipe.memory or math.inf,
        recipe.memory_share * full.memory if recipe.memory_share is not None else math.inf,
    ]
    return Budget(min(flops), min(memory), recipe.bytes or math.inf)
