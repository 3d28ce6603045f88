"""Fit of a law to pilots, with a pull towards a prior law, and how well a law tells the errors of pilots.

A law stored for a drift that recurs is used as it is, or as the prior of new pilots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from scipy.optimize import minimize

from raycloud.retrain.law import Law, check_numbers, floor_share
from raycloud.retrain.pilots import Floats, Pilot, PilotTable
from raycloud.retrain.rival_laws import PowerLaw

_RANGE = 8.0
"""Farthest that a fitted logarithm moves from the prior's: a factor of 3,000."""

_Fitted = TypeVar("_Fitted", Law, PowerLaw)


def fit(pilots: Sequence[Pilot], prior: _Fitted, *, noise: float = 0.03, spread: float = 1.0) -> _Fitted:
    """Law that explains pilots best, starting from and pulled towards a prior law, by L-BFGS on its logarithms.

    What the pilots do not tell stays the prior's. An error above ``start_error`` counts as equal to it, because no law
    of this kind goes above; one below the floor lowers the floor.

    Args:
        pilots: short trainings of the same drift.
        prior: law before the pilots, with the measured error before training.
        noise: standard deviation of a pilot's error, as a share of the prior's excess error ``e_0 − e_∞``.
        spread: standard deviation of the logarithms of the parameters around the prior's.

    Raises:
        TrainingError: noise or spread is not above 0, or a pilot does not belong to the model.
    """
    check_numbers("noise and spread", (noise, spread))
    table = PilotTable.of(pilots, len(prior.omega))
    scale = noise * (prior.start_error - prior.floor)
    if not pilots or scale <= 0:
        return prior
    start = prior.logs()
    free = prior.free(table)

    def loss(change: Floats) -> tuple[float, Floats]:
        logs = start.copy()
        logs[free] += change
        misfit, slope = squared_misfit(logs, prior.total_values, table, prior.start_error, scale)
        return misfit + float(change @ change) / (2 * spread**2), slope[free] + change / spread**2

    change = minimum(loss, np.zeros(int(free.sum())))
    logs = start.copy()
    logs[free] += change
    return prior.with_logs(logs)


def mean_miss(law: Law | PowerLaw, pilots: Sequence[Pilot]) -> float:
    """Mean absolute difference between predicted and measured errors."""
    return float(np.mean(np.abs([_predicted(law, pilot) - pilot.error for pilot in pilots])))


def regret(law: Law | PowerLaw, pilots: Sequence[Pilot]) -> float:
    """Error of the pilot that the law predicts to be the best, less that of the best."""
    return min(pilots, key=lambda pilot: _predicted(law, pilot)).error - min(pilot.error for pilot in pilots)


def _predicted(law: Law | PowerLaw, pilot: Pilot) -> float:
    return law.error(pilot.trained, pilot.steps, pilot.samples)


def squared_misfit(
    logs: Floats,
    total_values: Callable[[Floats, PilotTable], tuple[Floats, Floats]],
    table: PilotTable,
    start_error: float,
    scale: float,
) -> tuple[float, Floats]:
    """Half the squared errors of predictions over their scale, and the gradient by ``logs``."""
    total, slopes = total_values(logs, table)
    share, left = floor_share(float(logs[0])), np.exp(-total)
    # In units of the scale, so that no error is too small to be squared.
    unit = start_error / scale
    residual = unit * (share + (1 - share) * left) - np.minimum(table.error, start_error) / scale
    slope = (residual * -unit * (1 - share) * left) @ slopes
    slope[0] += float(residual @ (1 - left)) * unit * share * (1 - share)
    return float(residual @ residual) / 2, slope


def minimum(loss: Callable[[Floats], tuple[float, Floats]], start: Floats) -> Floats:
    """Where a loss with its gradient is lowest, near the start."""
    bounds = [(one - _RANGE, one + _RANGE) for one in start]
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500}).x
