"""Retraining of blocks against its rivals, at equal operations and memory, on drifting domains.

Every method gets the same window of samples and the same budget, and trains by the same loop. What it pays is metered:
operations by torch's counter, memory by hooks of saved tensors, bytes of what it sends. See
:mod:`raycloud.benchmarks.retrain_digits` for the domains.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from raycloud.benchmarks.measure import Measured
from raycloud.benchmarks.retrain_digits import BLOCKS, REGIMES, SOURCE_STEPS, DigitsScenario
from raycloud.benchmarks.retrain_methods import (
    SETTINGS,
    Method,
    MethodCase,
    all_blocks,
    blocks,
    drawn,
    lora,
    planned,
    random_block,
    run_method,
    untrained,
)
from raycloud.benchmarks.retrain_prior import PILOT_STEPS, simulated_drifts
from raycloud.data.image_shifts import DIGITS_SHIFTS, SIMULATED_SHIFTS
from raycloud.evaluation.classification import paired_standard_error
from raycloud.report.console import timed
from raycloud.retrain.cost import BlockChoice, Budget, ModelCost, WidthCost, training_cost
from raycloud.retrain.law import Law
from raycloud.retrain.law_prior import fit_prior, leave_one_kind_out
from raycloud.retrain.measure import model_cost
from raycloud.retrain.parts import parts_of
from raycloud.retrain.planner import plan
from raycloud.retrain.plans import steps_grid
from raycloud.retrain.tasks import TASKS

RIVALS: Mapping[str, Method] = {
    "head_only": blocks(),
    "last_block": blocks(BLOCKS - 1),
    "first_block": blocks(0),
    "random_block": random_block,
    "lora": lora,
    "full": all_blocks,
    "lisa": drawn(None),
    "misa": drawn(1.0),
}
"""Rivals by name."""
OURS, NONE, HEAD_FIRST = "ours", "none", "first_block_head_first"
PRIOR_SEED = 100
"""Seed of the source model in which drifts are simulated; it is none of those that methods are compared on."""
LARGE = 62
"""Number of blocks of the model whose plan is timed."""
QUICK = {
    "seeds": 1,
    "regimes": ("A",),
    "domains": ("invert", "rot45"),
    "source_steps": 100,
    "kinds": ("names", "shear"),
}


@dataclass(frozen=True)
class RetrainRow:
    """Result of a method in one window."""

    regime: str
    seed: int
    domain: str
    method: str
    accuracy: float
    flops: float
    """Share of the budget that was paid."""
    memory: float
    """Peak of the memory as a share of full fine-tuning's."""
    bytes: float
    steps: int
    blocks: tuple[int, ...]
    over_budget: bool


def run(
    seeds: int = 5,
    regimes: Sequence[str] = ("A", "B"),
    domains: Sequence[str] = tuple(DIGITS_SHIFTS),
    source_steps: int = SOURCE_STEPS,
    kinds: Sequence[str] = tuple(SIMULATED_SHIFTS),
    pilot_steps: Sequence[int] = PILOT_STEPS,
) -> Measured:
    """Run all methods in all windows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower with more
    try:
        with timed(f"source models of {seeds + 1} seeds"):
            scenarios = [DigitsScenario(seed, source_steps) for seed in range(seeds)]
            simulated = DigitsScenario(PRIOR_SEED, source_steps)
        with timed("simulated drifts"):
            drifts = simulated_drifts(simulated, kinds, pilot_steps)
            prior, law_error = fit_prior(drifts), leave_one_kind_out(drifts)
        methods = {NONE: untrained, **RIVALS, HEAD_FIRST: blocks(0, head_steps=100), OURS: planned(prior)}
        rows = list[RetrainRow]()
        for regime in regimes:
            for scenario in scenarios:
                with timed(f"regime {regime}, seed {scenario.seed}"):
                    for domain in domains:
                        rows += run_case(scenario, regime, domain, methods)
    finally:
        torch.set_num_threads(threads)
    figures = {
        **comparisons(rows),
        "law_error": law_error,
        "plan_s": plan_seconds(),
        "rows": [asdict(row) for row in rows],
    }
    header = ["method", *(f"accuracy {regime}" for regime in regimes), "ours - method", "FLOPs", "memory", "MB sent"]
    table = _table(rows, list(methods), regimes, figures)
    notes = [
        "FLOPs and memory are the largest shares of what full fine-tuning takes; ours pays for its estimates, too."
    ]
    return Measured("Block retraining on drifting digits", header, table, figures, notes)


def run_case(scenario: DigitsScenario, regime: str, domain: str, methods: Mapping[str, Method]) -> list[RetrainRow]:
    """Run methods in one window."""
    settings, task = REGIMES[regime], TASKS["classification"]
    (case,) = scenario.cases(settings, [domain])
    model, some = scenario.model(), case.window.select(slice(0, 4))
    cost = model_cost(model, parts_of(model, some.inputs), some, task.loss)
    everything = [BlockChoice(1.0, True)] * BLOCKS
    batch, samples = SETTINGS.batch_size, settings.samples
    full = training_cost(cost, everything, steps=settings.full_steps, batch=batch, samples=samples)
    budget = Budget(full.flops, full.memory, full.bytes)
    given = MethodCase(scenario.model, case.window, case.test, task, cost, budget, settings.most_steps, scenario.seed)
    rows = []
    for name, method in methods.items():
        done = run_method(method, given)
        rows.append(
            RetrainRow(
                regime,
                scenario.seed,
                domain,
                name,
                1 - done.error,
                done.flops / budget.flops,
                done.memory / full.memory,
                done.bytes,
                done.steps,
                done.blocks,
                done.over(budget),
            )
        )
    return rows


def comparisons(rows: Sequence[RetrainRow]) -> dict[str, Any]:
    """Differences of ours and each rival over all windows, in points of accuracy, with paired standard errors.

    The best rival of a seed is chosen on the other seeds.
    """
    cases = sorted({(row.regime, row.seed, row.domain) for row in rows})
    found = {(row.regime, row.seed, row.domain, row.method): row.accuracy for row in rows}
    ours = np.array([found[*case, OURS] for case in cases])
    rivals = {name: np.array([found[*case, name] for case in cases]) for name in RIVALS}
    seeds = np.array([seed for _, seed, _ in cases])
    best = np.empty(len(cases))
    for seed in set(seeds.tolist()):
        here = seeds == seed
        others = ~here if (~here).any() else here
        name = max(rivals, key=lambda one: float(rivals[one][others].mean()))
        best[here] = rivals[name][here]

    def difference(theirs: np.ndarray) -> dict[str, float]:
        error = 100 * paired_standard_error(ours, theirs) if len(cases) > 1 else 0.0
        return {"points": 100 * float((ours - theirs).mean()), "standard_error": error}

    hindsight = np.maximum.reduce([ours, *rivals.values()])
    return {
        "ours_minus_best_rival": difference(best),
        **{f"ours_minus_{name}": difference(theirs) for name, theirs in rivals.items()},
        "over_budget": sum(row.over_budget for row in rows),
        "regret": 100 * float((hindsight - ours).mean()),
        "memory_share": max(row.memory for row in rows if row.method == OURS),
    }


def plan_seconds() -> float:
    """Seconds of one plan for a model of :data:`LARGE` blocks with a scarce budget; the median of 5."""
    block = WidthCost(1.0, 1e9, 1e9, 1e9, 1e8, 3e8, 1e6, 2e6, 0.0, 1e8)
    cost = ModelCost(((block,),) * LARGE, 1e6, 1e8, 2e8, 1e6, 1e8, 1e6, (1e5,) * (LARGE + 1))
    drawn = np.random.default_rng(0).uniform(0.1, 1.0, (3, LARGE)) * [[1], [100], [100]]
    omega, tau, nu = (tuple(float(one) for one in row) for row in drawn)
    law = Law(1.0, 0.1, 0.3, 20.0, omega, tau, nu)
    budget = Budget(40 * 32 * 3e9 * LARGE, 1.2e10, 4e9)
    grid = steps_grid(cost, budget, most=400, batch=32, samples=200)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        plan(cost, budget, law, steps_grid=grid, batch=32, samples=200)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _table(
    rows: Sequence[RetrainRow], names: Sequence[str], regimes: Sequence[str], figures: Mapping[str, Any]
) -> list[list[str]]:
    table = []
    for name in names:
        mine = [row for row in rows if row.method == name]
        accuracies = [np.mean([row.accuracy for row in mine if row.regime == regime]) for regime in regimes]
        apart = figures.get(f"ours_minus_{name}")
        table.append(
            [
                name,
                *(f"{one:.3f}" for one in accuracies),
                f"{apart['points']:+.1f} ± {apart['standard_error']:.1f}" if apart else "",
                f"{max(row.flops for row in mine):.2f}",
                f"{max(row.memory for row in mine):.2f}",
                f"{max(row.bytes for row in mine) / 1e6:.2f}",
            ]
        )
    return table
