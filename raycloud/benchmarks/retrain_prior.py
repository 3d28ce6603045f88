"""Prior laws of a scenario of the benchmark of block retraining, from drifts that are simulated with source samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raycloud.benchmarks.retrain_cases import Regime, RetrainScenario, cost_and_budget
from raycloud.report.console import timed
from raycloud.retrain.law_fit import fit
from raycloud.retrain.law_prior import SimulatedDrift
from raycloud.retrain.rival_laws import PowerLaw
from raycloud.retrain.simulation import simulated_drift


@dataclass(frozen=True)
class RegimeDrift:
    """Simulated drift in a regime, whose pilots took all of its budget."""

    regime: str
    drift: SimulatedDrift


def simulated_drifts(scenario: RetrainScenario, regimes: Sequence[str], kinds: Sequence[str]) -> list[RegimeDrift]:
    """Train sets of blocks under simulated drifts, each within a regime's budget; errors are those of drifts' tests.

    In the scenario's first regime all drifts of a kind are simulated, in the others, whose budgets are larger, one.

    Args:
        scenario: scenario of a seed that methods are not compared on.
        regimes: regimes whose budgets are tried.
        kinds: kinds of simulated drifts.
    """
    drifts, smallest = list[RegimeDrift](), next(iter(scenario.regimes))
    for regime in regimes:
        for kind in kinds:
            for domain in scenario.simulated[kind][: None if regime == smallest else 1]:
                with timed(f"{scenario.name}: regime {regime}, simulated drift '{domain}'"):
                    drifts.append(RegimeDrift(regime, _drift(scenario, scenario.regimes[regime], kind, domain)))
    return drifts


def best_run(drifts: Sequence[RegimeDrift], regime: str) -> tuple[int, ...]:
    """Run of neighbouring blocks, at most half of them, that leaves the lowest mean error in a regime."""
    errors = dict[tuple[int, ...], list[float]]()
    for one in drifts:
        half = len(one.drift.magnitude) // 2
        for pilot in one.drift.pilots if one.regime == regime else ():
            if 1 < len(pilot.blocks) <= half and max(pilot.blocks) - min(pilot.blocks) < len(pilot.blocks):
                errors.setdefault(pilot.blocks, []).append(pilot.error)
    return min(errors, key=lambda blocks: float(np.mean(errors[blocks])))


def fit_power_law(drifts: Sequence[RegimeDrift]) -> PowerLaw:
    """Power law of all drifts, for an error of 1 before training."""
    pilots = [
        replace(pilot, error=pilot.error / one.drift.start_error)
        for one in drifts
        for pilot in one.drift.pilots
        if one.drift.start_error > 0
    ]
    steps = float(np.median([pilot.steps for pilot in pilots]))
    neutral = PowerLaw.neutral(1.0, len(drifts[0].drift.magnitude), steps)
    return fit(pilots, neutral, noise=0.2, spread=1.5)


def _drift(scenario: RetrainScenario, regime: Regime, kind: str, domain: str) -> SimulatedDrift:
    given, task = scenario.window(domain, regime.samples), scenario.task
    cost, budget = cost_and_budget(scenario, regime, given.window)
    return simulated_drift(
        kind,
        scenario.model(),
        given.window,
        given.test,
        task.loss,
        task.error,
        scenario.settings,
        cost,
        budget,
        most_steps=regime.most_steps,
        seed=scenario.seed,
    )
