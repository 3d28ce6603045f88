"""Prior law of the benchmark of block retraining, from drifts that are simulated with source samples."""

from __future__ import annotations

from collections.abc import Sequence

from raycloud.benchmarks.retrain_digits import BLOCKS, DigitsCase, DigitsScenario, Regime
from raycloud.data.image_shifts import SIMULATED_SHIFTS
from raycloud.retrain.gain import block_gains
from raycloud.retrain.law_prior import SimulatedDrift
from raycloud.retrain.parts import parts_of
from raycloud.retrain.pilots import Pilot
from raycloud.retrain.tasks import TASKS
from raycloud.retrain.trainer import RetrainTraining, mean_error
from raycloud.retrain.window import retrain_blocks

TASK = TASKS["classification"]
SETS: Sequence[tuple[int, ...]] = ((), *((block,) for block in range(BLOCKS)), (0, BLOCKS - 1))
PILOT_STEPS, SAMPLES = (15, 50, 150), (50, 200)


def simulated_drifts(
    scenario: DigitsScenario, kinds: Sequence[str] = tuple(SIMULATED_SHIFTS), pilot_steps: Sequence[int] = PILOT_STEPS
) -> list[SimulatedDrift]:
    """Train sets of blocks under simulated drifts; the error is that of the drift's test.

    All numbers of steps are tried with few samples, the largest also with many.
    """
    few, many = SAMPLES
    sizes = [*((steps, few) for steps in pilot_steps), (max(pilot_steps), many)]
    drifts = list[SimulatedDrift]()
    for kind in kinds:
        for name, shift in SIMULATED_SHIFTS[kind].items():
            case = scenario.case(f"{kind}-{name}", shift, Regime(many, 0, 0))
            model = scenario.model()
            parts = parts_of(model, case.window.select(slice(0, 2)).inputs)
            gains = block_gains(model, parts, case.window.select(slice(0, 64)), TASK.loss)
            drifts.append(
                SimulatedDrift(
                    kind,
                    mean_error(model, case.test, TASK.error),
                    tuple(one.magnitude for one in gains.blocks),
                    tuple(one.snr for one in gains.blocks),
                    tuple(_pilot(scenario, case, blocks, *size) for blocks in SETS for size in sizes),
                )
            )
    return drifts


def _pilot(scenario: DigitsScenario, case: DigitsCase, blocks: tuple[int, ...], steps: int, samples: int) -> Pilot:
    model, window = scenario.model(), case.window.select(slice(0, samples))
    parts = parts_of(model, window.select(slice(0, 2)).inputs)
    retrain_blocks(model, parts, blocks, window, TASK.loss, RetrainTraining(), steps=steps, seed=scenario.seed)
    return Pilot(blocks, steps, samples, mean_error(model, case.test, TASK.error))
