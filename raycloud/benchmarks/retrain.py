"""Retraining of blocks against its rivals, at equal operations and memory, on drifting domains.

Every method gets the same window of samples and the same budget, and trains by the same loop. What it pays is metered:
operations by torch's counter, memory by hooks of saved tensors, bytes of what it sends. The domains are those of
:mod:`raycloud.benchmarks.retrain_digits` and :mod:`raycloud.benchmarks.retrain_text`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from raycloud.benchmarks import retrain_digits, retrain_text
from raycloud.benchmarks.measure import Measured
from raycloud.benchmarks.retrain_cases import RetrainScenario, cost_and_budget
from raycloud.benchmarks.retrain_methods import (
    Method,
    MethodCase,
    all_blocks,
    blocks,
    drawn,
    hard_samples,
    lora,
    random_block,
    untrained,
)
from raycloud.benchmarks.retrain_planned import exact, green_trainer, one_shot, planned, published, published_greedy
from raycloud.benchmarks.retrain_prior import RegimeDrift, best_run, fit_power_law, simulated_drifts
from raycloud.evaluation.classification import paired_standard_error
from raycloud.report.console import timed
from raycloud.retrain.cost import Budget, ModelCost, WidthCost
from raycloud.retrain.law import Law
from raycloud.retrain.law_prior import fit_prior, leave_one_kind_out, mean_misses
from raycloud.retrain.planner import plan
from raycloud.retrain.plans import steps_grid
from raycloud.retrain.trainer import mean_error

ALIKE: Mapping[str, Method] = {
    "head_only": blocks(),
    "last_block": blocks(-1),
    "first_block": blocks(0),
    "random_block": random_block,
    "lora": lora,
    "full": all_blocks,
    "lisa": drawn(None),
    "misa": drawn(1.0),
    "green_trainer": green_trainer,
}
"""Rivals that are the same in all scenarios and regimes, by name."""
RIVALS = (*ALIKE, "surgical", "published_greedy", "tlm")
"""Names of rivals. Of them block and head begin together; ``tlm`` is for texts only."""
OURS, NONE = "ours", "none"
ABLATIONS = ("head_then_first", "greedy", "power_law", "one_shot")
"""Names of methods that are ours in part: the first block always, the published search by our law, and our planner by
another law or a score. They are no rivals."""
PRIOR_SEED = 100
"""Seed of the source model in which drifts are simulated; it is none of those that methods are compared on."""
SCENARIOS: Mapping[str, Callable[[int, int], RetrainScenario]] = {
    "digits": retrain_digits.DigitsScenario,
    "text": retrain_text.TextScenario,
}
SOURCE_STEPS = {"digits": retrain_digits.SOURCE_STEPS, "text": retrain_text.SOURCE_STEPS}
LARGE = 62
"""Number of blocks of the model whose plan is timed."""
QUICK = {
    "seeds": 1,
    "regimes": ("A", "C"),
    "domains": ("invert", "code"),
    "source_steps": {"digits": 100, "text": 40},
    "kinds": ("names_and_tone", "letters"),
    "full_steps": 4,
}


@dataclass(frozen=True)
class RetrainRow:
    """Result of a method in one window."""

    scenario: str
    regime: str
    seed: int
    domain: str
    method: str
    figure: float
    """Accuracy of digits; bits per byte of text."""
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
    regimes: Sequence[str] = ("A", "B", "C"),
    domains: Sequence[str] | None = None,
    source_steps: Mapping[str, int] = SOURCE_STEPS,
    kinds: Sequence[str] | None = None,
    full_steps: int | None = None,
) -> Measured:
    """Run all methods in all windows of all scenarios.

    Args:
        seeds: number of source models.
        regimes: regimes to run.
        domains: domains to run; None for all.
        source_steps: steps of the source models' training, by scenario.
        kinds: kinds of simulated drifts; None for all.
        full_steps: steps of full fine-tuning whose operations are the budget; None for those of each regime.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models so small are slower with more
    rows, law_error = list[RetrainRow](), dict[str, dict[str, float]]()
    try:
        for name, new in SCENARIOS.items():
            simulated = new(PRIOR_SEED, source_steps[name])
            wanted = [regime for regime in regimes if regime in simulated.regimes]
            if not wanted:
                continue
            with timed(f"{name}: source models of {seeds} seeds"):
                scenarios = [new(seed, source_steps[name]) for seed in range(seeds)]
            if full_steps is not None:
                for one in (simulated, *scenarios):
                    one.regimes = {
                        regime: replace(sizes, full_steps=full_steps, most_steps=5 * full_steps)
                        for regime, sizes in one.regimes.items()
                    }
            chosen = [kind for kind in simulated.simulated if kinds is None or kind in kinds]
            drifts = simulated_drifts(simulated, wanted, chosen)
            law_error[name] = (
                leave_one_kind_out([one.drift for one in drifts], gradients=False) if len(chosen) > 1 else {}
            )
            for regime in wanted:
                methods = methods_of(name, drifts, regime)
                for scenario in scenarios:
                    with timed(f"{name}: regime {regime}, seed {scenario.seed}"):
                        for domain in scenario.domains:
                            if domains is None or domain in domains:
                                rows += run_case(scenario, regime, domain, methods)
    finally:
        torch.set_num_threads(threads)
    return result(rows, regimes, law_error)


def methods_of(scenario: str, drifts: Sequence[RegimeDrift], regime: str) -> dict[str, Method]:
    """Methods by name, for a regime of a scenario with its simulated drifts."""
    here = [one.drift for one in drifts if one.regime == regime]
    law, power = fit_prior([one.drift for one in drifts], gradients=False).typical_law, fit_power_law(drifts)
    return {
        NONE: untrained,
        **ALIKE,
        "surgical": blocks(*best_run(drifts, regime)),
        "published_greedy": published_greedy(power),
        **({"tlm": hard_samples} if scenario == "text" else {}),
        "head_then_first": blocks(0, head_first=True),
        "greedy": planned(law, published),
        "power_law": planned(power.scaled, exact(mean_misses(power.scaled, here))),
        "one_shot": one_shot,
        OURS: planned(law, exact(mean_misses(law, here))),
    }


def result(
    rows: Sequence[RetrainRow], regimes: Sequence[str], law_error: Mapping[str, Mapping[str, float]]
) -> Measured:
    """Table and figures of results."""
    figures = {
        **comparisons([row for row in rows if row.scenario == "digits"], 100),
        "text": comparisons([row for row in rows if row.scenario == "text"], -1),
        "law_error": law_error,
        "plan_s": plan_seconds(),
        "rows": [asdict(row) for row in rows],
    }
    notes = [
        "Digits: accuracy, differences in points. Text: bits per byte. FLOPs and memory: largest shares of what full",
        "fine-tuning takes. Ours pays for its estimates, too. TLM needs texts. Methods below ours are parts of it.",
    ]
    header = ["method", *regimes, "digits: ours - method", "text", "FLOPs", "memory"]
    table = _table(rows, [NONE, *RIVALS, OURS, *ABLATIONS], regimes, figures)
    return Measured("Block retraining on drifting domains", header, table, figures, notes)


def run_case(scenario: RetrainScenario, regime: str, domain: str, methods: Mapping[str, Method]) -> list[RetrainRow]:
    """Run methods in one window."""
    sizes = scenario.regimes[regime]
    given = scenario.window(domain, sizes.samples)
    cost, budget = cost_and_budget(scenario, sizes, given.window)
    case = MethodCase(
        scenario.model,
        domain,
        given.window,
        given.test,
        scenario.task,
        cost,
        budget,
        scenario.settings,
        sizes.most_steps,
        scenario.seed,
    )
    rows = []
    for name, method in methods.items():
        done = method(case)
        error = mean_error(done.model, given.test, scenario.task.error)
        rows.append(
            RetrainRow(
                scenario.name,
                regime,
                scenario.seed,
                domain,
                name,
                scenario.figure(error),
                done.flops / budget.flops,
                done.memory / budget.memory,
                done.bytes,
                done.steps,
                done.blocks,
                done.over(budget),
            )
        )
    return rows


def comparisons(rows: Sequence[RetrainRow], scale: float) -> dict[str, Any]:
    """Differences of ours and each rival over all windows, with paired standard errors.

    The best rival of a seed is chosen on the other seeds.

    Args:
        rows: results of one scenario.
        scale: factor of differences; negative if a smaller figure is better, whose differences keep their own sign.
    """
    cases = sorted({(row.regime, row.seed, row.domain) for row in rows})
    sign = 1.0 if scale > 0 else -1.0
    if not cases:
        return {}
    found = {(row.regime, row.seed, row.domain, row.method): sign * row.figure for row in rows}
    ours = np.array([found[*case, OURS] for case in cases])
    present = {row.method for row in rows}
    others = {
        name: np.array([found[*case, name] for case in cases]) for name in (*RIVALS, *ABLATIONS) if name in present
    }
    rivals = {name: others[name] for name in RIVALS if name in present}
    seeds = np.array([seed for _, seed, _ in cases])
    best = np.empty(len(cases))
    for seed in set(seeds.tolist()):
        here = seeds == seed
        elsewhere = ~here if (~here).any() else here
        name = max(rivals, key=lambda one: float(rivals[one][elsewhere].mean()))
        best[here] = rivals[name][here]

    def difference(theirs: np.ndarray) -> dict[str, float]:
        error = abs(scale) * paired_standard_error(ours, theirs) if len(cases) > 1 else 0.0
        return {"difference": scale * float((ours - theirs).mean()), "standard_error": error}

    hindsight = np.maximum.reduce([ours, *rivals.values()])
    return {
        "ours_minus_best_rival": difference(best),
        **{f"ours_minus_{name}": difference(theirs) for name, theirs in others.items()},
        "over_budget": sum(row.over_budget for row in rows),
        "regret": abs(scale) * float((hindsight - ours).mean()),
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
    def apart(found: Mapping[str, Any], name: str, digits: int) -> str:
        one = found.get(f"ours_minus_{name}")
        return f"{one['difference']:+.{digits}f} ± {one['standard_error']:.{digits}f}" if one else ""

    table = []
    for name in names:
        mine = [row for row in rows if row.method == name]
        found = [[row.figure for row in mine if row.regime == regime] for regime in regimes]
        table.append(
            [
                name,
                *(f"{np.mean(here):.3f}" if here else "not defined" for here in found),
                apart(figures, name, 1),
                apart(figures["text"], name, 3),
                f"{max((row.flops for row in mine), default=0.0):.2f}",
                f"{max((row.memory for row in mine), default=0.0):.2f}",
            ]
        )
    return table
