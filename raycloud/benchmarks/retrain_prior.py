"""Prior laws of a scenario of the benchmark of block retraining, from drifts that are simulated with source samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raycloud.benchmarks.retrain_cases import Regime, RetrainScenario, cost_and_budget
from raycloud.models.chain import block_list_of
from raycloud.report.console import timed
from raycloud.retrain.estimate import estimate
from raycloud.retrain.gain import block_gains, gain_samples
from raycloud.retrain.law_fit import fit
from raycloud.retrain.law_prior import SimulatedDrift
from raycloud.retrain.parts import parts_of
from raycloud.retrain.pilots import Pilot
from raycloud.retrain.plans import Terms, affordable_steps, training_choices
from raycloud.retrain.rival_laws import PowerLaw
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.window import retrain_blocks


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


def sets_of_blocks(blocks: int) -> list[tuple[int, ...]]:
    """Sets that pilots train: none, first, middle and last, first with last, runs from either end, and all."""
    every = tuple(range(blocks))
    half, last = blocks // 2, blocks - 1
    sets = [(), (0,), (half,), (last,), (0, last), every[:2], every[-2:], every[:half], every[half:], every]
    return list(dict.fromkeys(sets))


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
    given, model, task = scenario.window(domain, regime.samples), scenario.model(), scenario.task
    parts = parts_of(model, given.window.select(slice(0, 2)).inputs)
    cost, budget = cost_and_budget(scenario, regime, given.window)
    settings, seed = scenario.settings, scenario.seed
    found = estimate(model, parts, given.window, task.loss, task.error, settings, cost, budget, seed)
    some = given.window.select(slice(0, gain_samples(cost, budget, len(given.window))))
    gains = block_gains(model, parts, some, task.loss).blocks  # the law's, not the edge's: it does not pay for them
    after = {name: one.detach().clone() for name, one in model.named_parameters()}
    late = {"head_lr": settings.late_head_lr} if found.head_steps else {}
    settings = settings.model_copy(update={"head_steps": 0, **late})
    terms = Terms(batch=settings.batch_size, samples=len(given.window), spent=found.cost)
    pilots = []
    for blocks in sets_of_blocks(len(block_list_of(model).blocks)):
        choices = training_choices(cost, blocks)
        steps = affordable_steps(cost, choices, budget, most=regime.most_steps, **terms)
        model.load_state_dict(after, strict=False)
        retrain_blocks(model, parts, blocks, given.window, task.loss, settings, steps=steps, seed=seed)
        pilots.append(Pilot(blocks, steps, len(given.window), mean_error(model, given.test, task.error)))
    return SimulatedDrift(
        kind,
        found.error,
        tuple(one.magnitude for one in gains),
        tuple(one.snr for one in gains),
        tuple(pilots),
    )
