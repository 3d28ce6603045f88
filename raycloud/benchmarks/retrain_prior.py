"""Prior law of a scenario of the benchmark of block retraining, from drifts that are simulated with source samples."""

from __future__ import annotations

from collections.abc import Sequence

from raycloud.benchmarks.retrain_cases import DomainWindow, RetrainScenario, cost_and_budget
from raycloud.models.chain import block_list_of
from raycloud.retrain.gain import block_gains
from raycloud.retrain.law_prior import SimulatedDrift
from raycloud.retrain.parts import parts_of
from raycloud.retrain.pilots import Pilot
from raycloud.retrain.plans import head_phase
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.window import retrain_blocks

GAIN_SAMPLES = 64
"""Number of samples whose gradients are compared."""


def simulated_drifts(
    scenario: RetrainScenario, kinds: Sequence[str], steps: Sequence[int], sizes: tuple[int, int]
) -> list[SimulatedDrift]:
    """Train sets of blocks under simulated drifts; the error is that of the drift's test.

    The sets are the head alone, every single block, and the first and last block together.

    Args:
        scenario: scenario of a seed that methods are not compared on.
        kinds: kinds of simulated drifts.
        steps: numbers of steps, all tried with few samples, the largest also with many.
        sizes: numbers of samples, few and many.
    """
    blocks = len(block_list_of(scenario.model()).blocks)
    sets = [(), *((block,) for block in range(blocks)), (0, blocks - 1)]
    few, many = sizes
    trials = [*((count, few) for count in steps), (max(steps), many)]
    drifts = list[SimulatedDrift]()
    for kind in kinds:
        for domain in scenario.simulated[kind]:
            given, model = scenario.window(domain, many), scenario.model()
            parts = parts_of(model, given.window.select(slice(0, 2)).inputs)
            gains = block_gains(model, parts, given.window.select(slice(0, GAIN_SAMPLES)), scenario.task.loss)
            settings = _settings(scenario, given)
            drifts.append(
                SimulatedDrift(
                    kind,
                    mean_error(model, given.test, scenario.task.error),
                    tuple(one.magnitude for one in gains.blocks),
                    tuple(one.snr for one in gains.blocks),
                    tuple(_pilot(scenario, settings, given, trained, *trial) for trained in sets for trial in trials),
                )
            )
    return drifts


def _settings(scenario: RetrainScenario, given: DomainWindow) -> RetrainTraining:
    """Settings with as many steps for the head alone as the smallest budget of the scenario has."""
    regime, settings = min(scenario.regimes.values(), key=lambda one: one.full_steps), scenario.settings
    window = given.window.select(slice(0, regime.samples))
    cost, budget = cost_and_budget(scenario, regime, window)
    share, batch = settings.head_share, settings.batch_size
    most = settings.head_steps
    steps, _ = head_phase(cost, budget, most=most, share=share, batch=batch, samples=len(window))
    return settings.model_copy(update={"head_steps": steps})


def _pilot(
    scenario: RetrainScenario,
    settings: RetrainTraining,
    given: DomainWindow,
    blocks: tuple[int, ...],
    steps: int,
    samples: int,
) -> Pilot:
    model, window, task = scenario.model(), given.window.select(slice(0, samples)), scenario.task
    parts = parts_of(model, window.select(slice(0, 2)).inputs)
    retrain_blocks(model, parts, blocks, window, task.loss, settings, steps=steps, seed=scenario.seed)
    return Pilot(blocks, steps, samples, mean_error(model, given.test, task.error))
