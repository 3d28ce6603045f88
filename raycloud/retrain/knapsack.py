"""Knapsack of a plan: the choices of most value for one step count and one lowest trained block, and bounds of them.

For a given number of steps, and a given lowest trained block, costs and values add up over blocks: a knapsack with a
menu per block and three resources. It is solved from the last block down by lists of undominated partial plans
(Nemhauser and Ullmann, Management Science 15(9), 1969), of which a Lagrangian bound (Fisher, Management Science 27(1),
1981) leaves out those that cannot lead to the best plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raycloud.errors import ModelError
from raycloud.retrain.cost import NOTHING, BlockChoice, Budget, ModelCost
from raycloud.retrain.plans import Floats, Terms, Value

Integers = npt.NDArray[np.int64]

_DUAL_ROUNDS = 40
"""Updates of the multipliers; the bound is valid after any number of them."""
_STEEPEST = 1e5
"""Largest multiplier, of the value: rounding errors of costs times it stay below the tolerance."""
_SLACK = 1e-9
"""Relative tolerance of comparisons before the exact check of costs."""


@dataclass(frozen=True)
class Bound:
    """Upper bounds of the values of several problems, by Lagrangian multipliers."""

    value: Floats
    """Bounds, shape ``[n]``."""
    multipliers: Floats
    """Multipliers that attain them, shape ``[n, R]``."""
    found: float
    """Highest value of a plan within the limits met on the way; minus infinity if none was."""


class PlanningProblem:
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
        # Of a menu the smallest saving counts, so that no plan is taken for cheaper than it is.
        saving = np.asarray(
            [min((one.lowest_saving for one in menu if one.width), default=0.0) for menu in model.blocks]
        )
        closing[:, :-1, 0] -= steps[:, None] * float(batch) * np.asarray(saving)
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

    def bound(self, rows: Integers, lowest: Integers | None, start: Floats | None = None) -> Bound:
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
        return Bound(best, kept, float(found.max()))

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
            rows = np.flatnonzero((bound >= less(floor)) & (costs + least[block] <= allowed).all(1))
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


def less(value: float) -> float:
    """Value less the tolerance of comparisons."""
    return value - _SLACK * max(1.0, abs(value))


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
