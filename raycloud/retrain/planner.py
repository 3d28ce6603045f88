"""BlockChoice of the blocks to retrain, exactly within a budget of FLOPs, memory and bytes; and rival choices.

For a given number of steps, and a given lowest trained block, costs and values add up over blocks: a knapsack with a
menu per block and three resources. :func:`plan` solves it from the last block down by lists of undominated partial
plans (Nemhauser and Ullmann, Management Science 15(9), 1969). A Lagrangian bound (Fisher, Management Science 27(1),
1981) leaves out numbers of steps, and partial plans, that cannot lead to the best plan.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from raycloud.errors import ModelError, RecipeError
from raycloud.retrain.cost import NOTHING, BlockChoice, Budget, Cost, ModelCost, training_cost

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MOST_GRID = 16
"""Largest number of step counts that a plan chooses from."""
LONGEST = 4096
"""Partial plans of a list beyond which only those of the highest bounds are kept; the plan then tells its gap."""
_FIRST = 256
"""Length of lists in a first search, whose plan lets the second one leave out more."""
_DUAL_ROUNDS = 40
"""Updates of the multipliers; the bound is valid after any number of them."""
_STEEPEST = 1e5
"""Largest multiplier, of the value: rounding errors of costs times it stay below the tolerance."""
_SLACK = 1e-9
"""Relative tolerance of comparisons before the exact check by :func:`training_cost`."""


_Pair = tuple[int, int, Floats, float]
_Search = Generator[_Pair, float, None]


class Value(Protocol):
    """What retraining a block is worth: values add up over blocks, and the error falls with their sum."""

    def value(self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: int) -> Floats:
        """Return the value of training blocks at widths for so many steps; the first three broadcast together."""
        ...

    def head_value(self, steps: npt.ArrayLike) -> Floats:
        """Return the value of training the head, in the shape of ``steps``."""
        ...

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> float | None:
        """Return the error predicted after training blocks at widths; ``None`` if there is no prediction."""
        ...


class Terms(TypedDict, total=False):
    """Terms of a window that cost every plan alike; see :func:`training_cost`."""

    batch: int
    samples: int
    cached: bool
    spent: Cost | None


@dataclass(frozen=True)
class Plan:
    """What to retrain, for how many steps, and what that costs."""

    choices: tuple[BlockChoice, ...]
    """Width and training of each block."""
    steps: int
    """Optimiser steps; 0 for the empty plan, which trains nothing, not even the head."""
    predicted_error: float | None
    """Error predicted after the steps; ``None`` where nothing predicts it."""
    cost: Cost
    """Cost of the window, what was spent before included."""
    value: float
    """Sum of the values of head and trained blocks, less the penalties of widths."""
    gap: float = 0.0
    """Most that the value of a better plan can be above this one's: 0 unless lists were too long to keep whole."""

    @property
    def trained(self) -> tuple[int, ...]:
        """Trained blocks."""
        return tuple(block for block, choice in enumerate(self.choices) if choice.trained)


def affordable_steps(
    model: ModelCost, choices: Sequence[BlockChoice], budget: Budget, *, most: int, **terms: Unpack[Terms]
) -> int:
    """Largest number of steps, up to ``most``, that a budget allows; 0 if it allows none."""

    def fits(steps: int) -> bool:
        return training_cost(model, choices, steps=steps, **_full(terms)).within(budget)

    if most < 1 or not fits(1):
        return 0
    if fits(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def steps_grid(model: ModelCost, budget: Budget, *, most: int, **terms: Unpack[Terms]) -> tuple[int, ...]:
    """Step counts for :func:`plan`: at most 16, evenly in logs, up to what the head alone can afford.

    The lowest is what training every block affords, or 1.
    """
    high = affordable_steps(model, _frozen(model), budget, most=most, **terms)
    low = affordable_steps(model, _training(model, range(len(model.blocks))), budget, most=most, **terms)
    if high == 0:
        return (1,)
    grid = np.geomspace(max(1, min(low, high)), high, MOST_GRID)
    return tuple(sorted({int(steps) for steps in np.append(np.floor(grid), high)}))[-MOST_GRID:]


def plan(
    model: ModelCost,
    budget: Budget,
    law: Value,
    *,
    steps_grid: Sequence[int],
    batch: int,
    samples: int,
    cached: bool = True,
    spent: Cost | None = None,
    width_penalty: Callable[[int, float], float] | None = None,
    penalty_weight: float = 1.0,
    stretch: bool = False,
    longest: int = LONGEST,
) -> Plan:
    """Best plan within the budget, among all widths and sets of trained blocks, for the best step count of a grid.

    It maximises the head's and the trained blocks' values less the weighted penalties of widths. If no plan fits the
    budget, or none is worth more than doing nothing, the plan is empty.

    Args:
        model: costs of the parts.
        budget: limits, which no plan exceeds.
        law: value of training each block.
        steps_grid: step counts to choose from, at most 16.
        batch: samples of each step.
        samples: different samples of the window.
        cached: whether the hidden states before the lowest trained block are cached.
        spent: cost of what the window has done before.
        width_penalty: loss of value of a block at a width, trained or not.
        penalty_weight: factor of the penalties.
        stretch: spend what the chosen plan leaves of the budget on more steps, up to the grid's highest. The value
            does then not always grow with the budget, since the blocks are chosen before.
        longest: partial plans of a list that are kept; the plan is exact if that many suffice, and tells its gap if
            not. Only wide menus with several scarce resources need more than a few hundred.

    Raises:
        RecipeError: the grid is empty, too long or has a number below 1.
        ModelError: a value or penalty is not finite.
    """
    if not 1 <= len(steps_grid) <= MOST_GRID or min(steps_grid) < 1:
        raise RecipeError(f"steps_grid must be 1 to {MOST_GRID} numbers of 1 or more, got {list(steps_grid)}")
    terms = Terms(batch=batch, samples=samples, cached=cached, spent=spent)
    _full(terms)
    penalty = _penalties(model, width_penalty, penalty_weight)
    best, possible = empty_plan(model, law, terms), -math.inf
    problem = _Problem(model, budget, law, np.asarray(sorted(set(steps_grid)), dtype=np.int64), penalty, terms)
    search = _promising(problem)
    pair = next(search, None)
    while pair is not None:
        row, lowest, multipliers, floor = pair
        steps, left_out = int(problem.steps[row]), -math.inf
        for length in (min(_FIRST, longest), longest):
            plans, left_out = problem.best(row, lowest, multipliers, max(floor, best.value), length)
            candidates = (_priced(model, budget, law, choices, steps, penalty, terms) for choices in plans)
            best = max(best, next(filter(None, candidates), best), key=lambda plan: plan.value)
            if left_out <= best.value:
                break
        possible = max(possible, left_out)
        pair = _next(search, best.value)
    best = replace(best, gap=max(0.0, possible - best.value))
    if stretch and best.steps:
        steps = affordable_steps(model, best.choices, budget, most=max(steps_grid), **terms)
        longer = _priced(model, budget, law, best.choices, steps, penalty, terms)
        best = max(best, replace(longer, gap=best.gap) if longer else best, key=lambda plan: plan.value)
    assert not best.steps or best.cost.within(budget)
    return best


def empty_plan(model: ModelCost, law: Value | None, terms: Terms) -> Plan:
    """Plan that trains nothing, not even the head; it costs what was spent before."""
    error = law.error({}, 0, terms["samples"]) if law else None
    return Plan(_frozen(model), 0, error, terms.get("spent") or NOTHING, 0.0)


# Rivals: the same costs and the same budget, another choice of blocks. Each gets the steps that its budget buys.


def head_only(model: ModelCost, budget: Budget, *, most: int, law: Value | None = None, **terms: Unpack[Terms]) -> Plan:
    """Plan that trains the head alone."""
    return set_plan(model, budget, (), most=most, law=law, **terms)


def last_blocks(
    model: ModelCost, budget: Budget, *, most: int, count: int = 1, law: Value | None = None, **terms: Unpack[Terms]
) -> Plan:
    """Plan that trains the last ``count`` blocks."""
    blocks = len(model.blocks)
    return set_plan(model, budget, range(max(0, blocks - count), blocks), most=most, law=law, **terms)


def full(model: ModelCost, budget: Budget, *, most: int, law: Value | None = None, **terms: Unpack[Terms]) -> Plan:
    """Plan that trains every block."""
    return set_plan(model, budget, range(len(model.blocks)), most=most, law=law, **terms)


def random_blocks(
    model: ModelCost,
    budget: Budget,
    *,
    seed: int,
    most: int,
    count: int | None = None,
    law: Value | None = None,
    **terms: Unpack[Terms],
) -> Plan:
    """Plan of blocks drawn at random: ``count`` of them, or 1 to all; those that cannot be afforded are left out."""
    source = random.Random(seed)
    blocks = len(model.blocks)
    drawn = source.sample(range(blocks), source.randint(1, blocks) if count is None else min(count, blocks))
    while drawn and not affordable_steps(model, _training(model, drawn), budget, most=1, **terms):
        drawn.pop()
    return set_plan(model, budget, drawn, most=most, law=law, **terms)


def best_contiguous(
    model: ModelCost, budget: Budget, law: Value, *, most: int, longest: int | None = None, **terms: Unpack[Terms]
) -> Plan:
    """Plan of the most valuable run of neighbouring blocks (surgical fine-tuning, Lee et al., ICLR 2023).

    Each run is valued at the steps that the budget buys for it; runs have at most ``longest`` blocks.
    """
    blocks = len(model.blocks)
    runs = [
        range(low, high) for low in range(blocks) for high in range(low + 1, min(blocks, low + (longest or blocks)) + 1)
    ]
    plans = [set_plan(model, budget, run, most=most, law=law, **terms) for run in runs]
    return max(plans, key=lambda plan: plan.value)


def taylor(model: ModelCost, budget: Budget, law: Value, *, ratio: float, most: int, **terms: Unpack[Terms]) -> Plan:
    """Plan of the highest gain at a share of full training's FLOPs per step (GreenTrainer, Huang et al., ICLR 2024).

    The published method is given the share and spends the same number of steps whatever it chooses. Here the budget
    gives the steps: as many as full training affords, divided by the share.

    Args:
        model: costs of the parts.
        budget: limits.
        law: first-order gain of each block; see :class:`raycloud.retrain.law.Score`.
        ratio: FLOPs of a step as a share of full training's, above 0 and at most 1.
        most: largest number of steps.
        terms: terms of the window.

    Raises:
        RecipeError: the ratio is out of range.
    """
    if not 0 < ratio <= 1:
        raise RecipeError(f"ratio must be above 0 and at most 1, got {ratio}")
    # Of the limits, only FLOPs set the steps: memory and bytes do not depend on them.
    steps = affordable_steps(
        model, _training(model, range(len(model.blocks))), Budget(budget.flops), most=most, **terms
    )
    chosen = plan(model, budget, law, steps_grid=[min(most, max(1, int(steps / ratio)))], **_full(terms))
    return set_plan(model, budget, chosen.trained, most=most, law=law, **terms) if chosen.steps else chosen


def greedy(model: ModelCost, budget: Budget, law: Value, *, steps_grid: Sequence[int], **terms: Unpack[Terms]) -> Plan:
    """Plan built by the action of most value per extra FLOP, as published: one more block, or more steps.

    The published search charges the time of another block and overruns its window (method sheet, §7.2); here an action
    that exceeds the budget is not allowed, and costs follow the lowest trained block after each action.
    """
    penalty = _penalties(model, None, 0.0)
    best = empty_plan(model, law, terms)
    grid = sorted(set(steps_grid))
    position = -1
    while True:
        sets = [set(best.trained)] if position + 1 < len(grid) else []
        actions = [(position + 1, chosen) for chosen in sets]
        if position >= 0:
            others = set(range(len(model.blocks))) - set(best.trained)
            actions += [(position, {*best.trained, block}) for block in sorted(others)]
        rated = []
        for place, chosen in actions:
            choices = _training(model, chosen)
            candidate = _priced(model, budget, law, choices, grid[place], penalty, terms)
            if candidate is not None and candidate.value > best.value:
                extra = max(candidate.cost.flops - best.cost.flops, 1.0)
                rated.append(((candidate.value - best.value) / extra, place, candidate))
        if not rated:
            return best
        _, position, best = max(rated, key=lambda action: action[0])


def set_plan(
    model: ModelCost,
    budget: Budget,
    blocks: Sequence[int] | set[int] | range,
    *,
    most: int,
    law: Value | None = None,
    **terms: Unpack[Terms],
) -> Plan:
    """Plan that trains given blocks, whole, for the steps that the budget buys; empty if it buys none."""
    choices = _training(model, blocks)
    steps = affordable_steps(model, choices, budget, most=most, **terms)
    penalty = _penalties(model, None, 0.0)
    priced = _priced(model, budget, law, choices, steps, penalty, terms) if steps else None
    return priced or empty_plan(model, law, terms)


def _frozen(model: ModelCost) -> tuple[BlockChoice, ...]:
    """Choices that leave every block whole and frozen."""
    return _training(model, ())


def _training(model: ModelCost, blocks: Sequence[int] | set[int] | range) -> tuple[BlockChoice, ...]:
    """Choices that leave every block whole and train the given ones."""
    return tuple(BlockChoice(width, block in blocks) for block, width in enumerate(model.whole))


class _FullTerms(TypedDict):
    batch: int
    samples: int
    cached: bool
    spent: Cost | None


def _full(terms: Terms) -> _FullTerms:
    """Terms with their defaults."""
    return {
        "batch": terms["batch"],
        "samples": terms["samples"],
        "cached": terms.get("cached", True),
        "spent": terms.get("spent"),
    }


def _less(value: float) -> float:
    """Value less the tolerance of comparisons."""
    return value - _SLACK * max(1.0, abs(value))


def _penalties(
    model: ModelCost, penalty: Callable[[int, float], float] | None, weight: float
) -> Mapping[tuple[int, float], float]:
    """Weighted penalty of each width of each block."""
    table = {
        (block, option.width): weight * penalty(block, option.width) if penalty else 0.0
        for block, menu in enumerate(model.blocks)
        for option in menu
    }
    for (block, width), value in table.items():
        if not math.isfinite(value):
            raise ModelError(f"penalty of block {block} at width {width} must be finite, got {value}")
    return table


def _priced(
    model: ModelCost,
    budget: Budget,
    law: Value | None,
    choices: tuple[BlockChoice, ...],
    steps: int,
    penalty: Mapping[tuple[int, float], float],
    terms: Terms,
) -> Plan | None:
    """Plan with its value and cost, or ``None`` if it exceeds the budget."""
    cost = training_cost(model, choices, steps=steps, **_full(terms))
    if not cost.within(budget):
        return None
    if law is None:
        return Plan(choices, steps, None, cost, 0.0)
    samples = terms["samples"]
    trained = {block: choice.width for block, choice in enumerate(choices) if choice.trained}
    values = law.value(list(trained), list(trained.values()), steps, samples) if trained else np.zeros(0)
    lost = sum(penalty[block, choice.width] for block, choice in enumerate(choices))
    value = float(law.head_value(steps)) + float(np.sum(values)) - lost
    return Plan(choices, steps, law.error(trained, steps, samples), cost, value)


@dataclass(frozen=True)
class _Bound:
    """Upper bounds of the values of several problems, by Lagrangian multipliers."""

    value: Floats
    """Bounds, shape ``[n]``."""
    multipliers: Floats
    """Multipliers that attain them, shape ``[n, R]``."""
    found: float
    """Highest value of a plan within the limits met on the way; minus infinity if none was."""


class _Problem:
    """Arrays of a planning problem: ``Q`` step counts, ``L`` blocks, menus padded to ``K`` columns, ``R = 3``.

    A block is *open* at or above the lowest trained one, where gradients pass, and *closed* below, where it is frozen
    and costs its cached or repeated forward pass.
    """

    def __init__(
        self,
        model: ModelCost,
        budget: Budget,
        law: Value,
        steps: Integers,
        penalty: Mapping[tuple[int, float], float],
        terms: Terms,
    ) -> None:
        batch, samples, cached = terms["batch"], terms["samples"], terms.get("cached", True)
        spent = terms.get("spent") or NOTHING
        self.steps = steps
        rows = [
            [(option, trained) for option in menu for trained in (False, True) if not trained or option.width]
            for menu in model.blocks
        ]
        columns = max(map(len, rows))
        self.menus = [[BlockChoice(option.width, trained) for option, trained in row] for row in rows]
        shape = (len(rows), columns)
        exists, trained = np.zeros(shape, bool), np.zeros(shape, bool)
        width, lost = np.zeros(shape), np.zeros(shape)
        forward, backward, active, idle = (np.zeros(shape) for _ in range(4))
        memory, frozen_memory, wire = (np.zeros(shape) for _ in range(3))
        for block, row in enumerate(rows):
            for column, (option, train) in enumerate(row):
                place = block, column
                exists[place], trained[place], width[place] = True, train, option.width
                lost[place] = penalty[block, option.width]
                forward[place] = option.forward
                backward[place] = option.input_gradient + (option.weight_gradient if train else 0.0)
                active[place] = option.trained_activations if train else option.frozen_activations
                frozen_memory[place] = option.weights
                memory[place] = option.weights + (option.trained_state if train else 0.0) + batch * active[place]
                wire[place] = option.down + (option.up if train else 0.0)
        blocks = np.arange(len(rows))[:, None]
        each = (steps * float(batch))[:, None, None]
        worth = np.asarray(law.value(blocks, width, steps[:, None, None], samples), dtype=np.float64)
        head = np.broadcast_to(np.asarray(law.head_value(steps), dtype=np.float64), steps.shape)
        value = np.where(trained, worth, 0.0) - lost
        if not np.isfinite(value[:, exists]).all() or not np.isfinite(head).all():
            raise ModelError("values of blocks and head must be finite, got some that are not")
        self.head = head
        self.open_value = np.where(exists, value, -np.inf)
        self.training_value = np.where(exists & trained, value, -np.inf)
        self.closed_value = np.where(exists & ~trained, value, -np.inf)
        open_cost = _stack(each * (forward + backward), memory, wire)
        idle = np.broadcast_to(samples * forward if cached else each * forward, open_cost.shape[:-1])
        closed_cost = _stack(idle, frozen_memory, wire)
        closing = np.zeros((len(steps), len(rows) + 1, 3))
        if cached:
            closing[:, 1:, 0] = samples * model.stem_forward
            closing[:, 1:, 1] = samples * np.asarray(model.boundary[1:])
        base = _stack(
            steps * float(batch) * (model.stem_forward + model.head_forward + model.head_gradient),
            np.asarray(model.fixed_memory + batch * model.head_activations),
            np.asarray(model.fixed_bytes),
        )
        limit = np.asarray([budget.flops - spent.flops, budget.memory, budget.bytes - spent.bytes])
        if spent.memory > budget.memory:
            limit[1] = -1.0
        # A resource that no plan can exhaust is left out: its costs would only lengthen the lists.
        highest = np.where(exists[..., None], np.maximum(open_cost, closed_cost), 0.0).max(2).sum(1)
        self.tight = highest + closing.max(1) + base > limit * (1 - _SLACK)
        scale = np.where(np.isfinite(limit) & (limit > 0), limit, 1.0)
        self.open_cost, self.closed_cost = open_cost / scale, closed_cost / scale
        self.closing, self.limit = closing / scale, np.where(np.isfinite(limit), limit, 0.0) / scale - base / scale
        # A limit of 0 is met with costs of 0 only, whatever the tolerance.
        self.allowed = self.limit + np.where(limit > 0, _SLACK, 0.0)

    def bound(self, rows: Integers, lowest: Integers | None, start: Floats | None = None) -> _Bound:
        """Bounds of several problems, each of one step count, with a given lowest trained block or with any.

        For multipliers ``μ ≥ 0`` the best of *value − μ·(cost − limit)* bounds the best value within the limits; for a
        given lowest block it falls apart into the blocks' own best choices. Polyak's steps lower it.

        Args:
            rows: index of the step count of each problem, shape ``[n]``.
            lowest: lowest trained block of each problem, ``L`` for the head alone; without it, the best is taken.
            start: multipliers to start from, shape ``[n, R]``.
        """
        count, (_, blocks, _) = len(rows), self.open_value.shape
        every, lines = np.arange(count), np.arange(blocks)[None]
        opened, training, closed = self.open_value[rows], self.training_value[rows], self.closed_value[rows]
        open_cost, closed_cost = self.open_cost[rows], self.closed_cost[rows]
        limit, tight, head = self.limit[rows], self.tight[rows], self.head[rows]
        best, found = np.full(count, np.inf), np.full(count, -np.inf)
        multipliers = np.zeros((count, 3)) if start is None else start
        kept, patience = multipliers, np.ones(count)
        for _ in range(_DUAL_ROUNDS):
            open_net = opened - np.einsum("qlkr,qr->qlk", open_cost, multipliers)
            train_net = np.where(np.isfinite(training), open_net, -np.inf)
            closed_net = closed - np.einsum("qlkr,qr->qlk", closed_cost, multipliers)
            above = _below(open_net.max(2)[:, ::-1])[:, ::-1]
            lowest_net = np.concatenate((train_net.max(2) + above[:, 1:], np.zeros((count, 1))), axis=1)
            lowest_net += _below(closed_net.max(2)) - np.einsum("qjr,qr->qj", self.closing[rows], multipliers)
            chosen = lowest_net.argmax(1) if lowest is None else lowest
            dual = lowest_net[every, chosen] + head + (multipliers * limit).sum(1)
            better = dual < best
            # Steps that do not lower the bound are too long.
            patience = np.where(dual < best - 1e-4 * np.abs(dual), patience, patience * 0.7)
            best = np.where(better, dual, best)
            kept = np.where(better[:, None], multipliers, kept)
            # The plan that attains the bound: its value, and what it uses beyond the limits.
            place = chosen[:, None]
            net = np.where((lines > place)[..., None], open_net, closed_net)
            column = np.where((lines == place)[..., None], train_net, net).argmax(2)[..., None]
            is_open = lines >= place
            cost = np.where(
                is_open[..., None],
                np.take_along_axis(open_cost, column[..., None], 2)[:, :, 0],
                np.take_along_axis(closed_cost, column[..., None], 2)[:, :, 0],
            )
            excess = cost.sum(1) + self.closing[rows, chosen] - limit
            value = np.take_along_axis(opened, column, 2)[:, :, 0].sum(1) + head
            found = np.where((excess <= -_SLACK * tight).all(1), np.maximum(found, value), found)
            # A multiplier of 0 cannot fall, and what is exhausted to the last digit is no excess.
            moves = (np.abs(excess) > _SLACK) & ((multipliers > 0) | (excess > 0))
            slope = np.where(tight & moves, excess, 0.0)
            square = (slope**2).sum(1)
            if not square.any():
                break
            target = np.maximum(found, dual - np.maximum(np.abs(dual), 1e-12) * 0.5)
            step = patience * (dual - target) / np.where(square > 0, square, 1.0)
            most = _STEEPEST * np.maximum(1.0, np.abs(dual))[:, None]
            multipliers = np.clip(multipliers + step[:, None] * slope, 0.0, most)
        return _Bound(best, kept, float(found.max()))

    def best(
        self, row: int, lowest: int, multipliers: Floats, floor: float, longest: int
    ) -> tuple[Iterator[tuple[BlockChoice, ...]], float]:
        """Best plans for a step count and a lowest trained block, highest value first, and a bound of those left out.

        Args:
            row: index of the step count.
            lowest: lowest trained block; ``L`` for the head alone.
            multipliers: multipliers of the bound.
            floor: value below which plans are of no interest.
            longest: partial plans of each list that are kept, those of the highest bounds.
        """
        tight = self.tight[row]
        above = (np.arange(len(self.menus)) >= lowest)[:, None]
        value = np.where(above, self.open_value[row], self.closed_value[row])
        if lowest < len(self.menus):
            value[lowest] = self.training_value[row][lowest]
        cost = np.where(above[..., None], self.open_cost[row], self.closed_cost[row])[..., tight]
        slope, allowed = multipliers[tight], self.allowed[row][tight]
        rest = _below((value - cost @ slope).max(1)[None])[0] + slope @ self.limit[row][tight]
        least = np.where(np.isfinite(value)[..., None], cost, np.inf).min(1)
        least = np.concatenate((np.zeros((1, least.shape[1])), least.cumsum(0)))
        costs, values = self.closing[row, lowest][None, tight], self.head[row][None]
        left_out = -math.inf
        history = []
        for block in reversed(range(len(self.menus))):
            columns = np.flatnonzero(np.isfinite(value[block]))
            size = len(values)
            costs = (costs[None] + cost[block, columns][:, None]).reshape(size * len(columns), costs.shape[1])
            values = (values[None] + value[block, columns][:, None]).reshape(-1)
            bound = values + rest[block] - costs @ slope
            rows = np.flatnonzero((bound >= _less(floor)) & (costs + least[block] <= allowed).all(1))
            rows = rows[_undominated(costs[rows], values[rows])]
            if len(rows) > longest:
                order = np.argpartition(-bound[rows], longest)
                left_out = max(left_out, float(bound[rows[order[longest:]]].max()))
                rows = rows[order[:longest]]
            costs, values = costs[rows], values[rows]
            history.append((rows % size, columns[rows // size]))
        return self._traced(values, history), left_out

    def _traced(self, values: Floats, history: list[tuple[Integers, Integers]]) -> Iterator[tuple[BlockChoice, ...]]:
        """Choices of finished plans, from the highest value to the lowest.

        Args:
            values: values of the finished plans.
            history: for each block, from the last to the first, the index of each partial plan's predecessor, and the
                column of the block's menu that it chose.
        """
        for plan in np.argsort(-values, kind="stable"):
            choices, index = [], int(plan)
            for block, (parent, column) in enumerate(reversed(history)):
                choices.append(self.menus[block][int(column[index])])
                index = int(parent[index])
            yield tuple(choices)


def _next(search: _Search, known: float) -> _Pair | None:
    """Next pair of a search that is told the value of the best plan so far; ``None`` if none is left."""
    try:
        return search.send(known)
    except StopIteration:
        return None


def _promising(problem: _Problem) -> _Search:
    """Step counts and lowest trained blocks that may lead to a better plan than known, the most promising first.

    Args:
        problem: the problem.

    Yields:
        Index of the step count, lowest trained block, multipliers, and the value below which plans are of no interest;
        after each it is sent the value of the best plan so far, which for the empty plan is 0.
    """
    blocks = len(problem.menus)
    coarse = problem.bound(np.arange(len(problem.steps)), None)
    floor, known = coarse.found, 0.0
    for row in np.argsort(-coarse.value, kind="stable"):
        floor = max(floor, known)
        if coarse.value[row] <= known or coarse.value[row] < _less(floor):
            return
        start = np.repeat(coarse.multipliers[row][None], blocks + 1, axis=0)
        fine = problem.bound(np.full(blocks + 1, row), np.arange(blocks + 1), start)
        floor = max(floor, fine.found)
        for lowest in np.argsort(-fine.value, kind="stable"):
            floor = max(floor, known)
            if fine.value[lowest] <= known or fine.value[lowest] < _less(floor):
                break
            known = yield int(row), int(lowest), fine.multipliers[lowest], floor


def _stack(flops: npt.NDArray[Any], memory: npt.NDArray[Any], wire: npt.NDArray[Any]) -> Floats:
    """Three resources as the last axis of one array, broadcast together."""
    return np.stack(np.broadcast_arrays(flops, memory, wire), axis=-1)


def _below(best: Floats) -> Floats:
    """Sums over the blocks below each block, ``[Q, L]`` to ``[Q, L + 1]``."""
    return np.concatenate((np.zeros((len(best), 1)), best.cumsum(1)), axis=1)


def _undominated(cost: Floats, value: Floats) -> Integers:
    """Rows that no other row beats or equals in value and in every cost; one of equal rows remains.

    With two and more resources and very many rows, some dominated ones may remain, which costs time only.
    """
    count, resources = cost.shape
    if count <= 1:
        return np.arange(count)
    if resources == 0:
        return np.asarray([value.argmax()])
    order = np.lexsort((*cost.T, -value))
    cost = cost[order]
    if resources == 1:
        least = np.minimum.accumulate(cost[:, 0])
        return order[np.concatenate(([True], cost[1:, 0] < least[:-1]))]
    kept = np.zeros(0, np.int64)
    for first in range(0, count, 256):
        chunk = np.arange(first, min(first + 256, count))
        chunk = chunk[~_covered(cost[chunk], cost[kept[:4096]]).any(1)]
        kept = np.concatenate((kept, chunk[~np.tril(_covered(cost[chunk], cost[chunk]), -1).any(1)]))
    return order[kept]


def _covered(cost: Floats, by: Floats) -> npt.NDArray[np.bool_]:
    """Whether each row of ``by`` costs no more than each row of ``cost`` in every resource, shape ``[n, m]``."""
    covered = by[None, :, 0] <= cost[:, None, 0]
    for resource in range(1, cost.shape[1]):
        covered &= by[None, :, resource] <= cost[:, None, resource]
    return covered
