"""Prior law of a drift, from its gradients alone, by what was learnt from simulated drifts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from raycloud.errors import TrainingError
from raycloud.retrain.law import SINGLE, Law, check_errors, check_numbers
from raycloud.retrain.law_fit import mean_miss, minimum, squared_misfit
from raycloud.retrain.pilots import Floats, Pilot, PilotTable
from raycloud.retrain.rival_laws import PowerLaw

_AnyLaw = TypeVar("_AnyLaw", Law, PowerLaw)

_FARTHEST = 5.0
"""Logarithm of the largest ratio of a gradient's number to its mean: beyond, the simulated drifts tell nothing."""
_BETA = 0.7
"""Exponent ``β`` before any drift is simulated: further blocks add less."""


@dataclass(frozen=True)
class SimulatedDrift:
    """Drift made from source samples: the estimates of gain before training, and what training then left."""

    kind: str
    """What was done to the samples, such as ``"blur"``; the drifts of one kind are held out together."""
    start_error: float
    """Error before training."""
    magnitude: tuple[float, ...]
    """Norm of each block's mean gradient."""
    snr: tuple[float, ...]
    """Signal-to-noise ratio of each block's gradient."""
    pilots: tuple[Pilot, ...]
    """Trainings of chosen blocks."""

    def __post_init__(self) -> None:
        check_errors(self.start_error, 0.0)
        _check_gains(self.magnitude, self.snr)


@dataclass(frozen=True)
class Prior:
    """What simulated drifts tell of a new drift's law, given its gradients alone.

    ``ω_b = c_b·(M_b/M̄_b)^ρ``, ``τ_b = t_b·(S_b/S̄_b)^−σ`` and ``ν_b = s_b·(S_b/S̄_b)^−ς`` for magnitudes ``M`` and
    signal-to-noise ratios ``S``, whose geometric means over the simulated drifts are ``M̄`` and ``S̄``.
    """

    typical: Law
    """Law of a drift whose gradients are as in the mean; only the ratio of its two errors counts."""
    magnitude: tuple[float, ...]
    """Mean magnitude of each block."""
    snr: tuple[float, ...]
    """Mean signal-to-noise ratio of each block."""
    rho: float
    """Exponent of magnitudes in the ceilings."""
    tau_power: float
    """Exponent of inverse signal-to-noise ratios in the steps."""
    nu_power: float
    """Exponent of inverse signal-to-noise ratios in the samples."""

    def law(self, magnitude: Sequence[float], snr: Sequence[float], start_error: float) -> Law:
        """Prior law of a drift, from the gradients of its blocks and its error before training.

        Raises:
            TrainingError: a gradient's number is not finite, or there are not as many as blocks.
        """
        _check_gains(magnitude, snr, len(self.magnitude))
        check_errors(start_error, 0.0)
        logs = self.typical.logs() + _shifts(self, magnitude, snr) @ (self.rho, self.tau_power, self.nu_power)
        return replace(self.typical, start_error=start_error, floor=0.0).with_logs(logs)

    def typical_law(self, start_error: float) -> Law:
        """Law of a drift whose gradients are as in the mean, or are not known."""
        return self.law(self.magnitude, self.snr, start_error)


def mean_misses(law_of: Callable[[float], _AnyLaw], drifts: Sequence[SimulatedDrift]) -> dict[tuple[int, ...], float]:
    """Mean of measured less predicted errors of each set of blocks that pilots trained.

    Where values do not add up over blocks, no sum of them tells which of two good sets is better; the pilots of all
    drifts together do.

    Args:
        law_of: law of a drift from its error before training.
        drifts: simulated drifts, all with the same budget.
    """
    missed = dict[tuple[int, ...], list[float]]()
    for drift in drifts:
        law = law_of(drift.start_error)
        for pilot in drift.pilots:
            predicted = law.error(pilot.trained, pilot.steps, pilot.samples)
            missed.setdefault(pilot.blocks, []).append(pilot.error - predicted)
    return {blocks: float(np.mean(misses)) for blocks, misses in missed.items()}


def fit_prior(
    drifts: Sequence[SimulatedDrift], *, gradients: bool = True, noise: float = 0.05, spread: float = 1.5
) -> Prior:
    """Prior from trainings under simulated drifts of source samples; at least 20 drifts of several kinds are of use.

    Args:
        drifts: simulated drifts with their pilots.
        gradients: False leaves gradients out: all drifts have the typical law, from their own errors on.
        noise: standard deviation of a pilot's error, as a share of the mean error before training; it is the same for
            all drifts, so that those with next to no error do not outweigh the others.
        spread: standard deviation of the logarithms of the typical law around a neutral one.

    Raises:
        TrainingError: there is no drift with a pilot, or drifts differ in the number of blocks.
    """
    check_numbers("noise and spread", (noise, spread))
    used = [drift for drift in drifts if drift.pilots and drift.start_error > 0]
    if not used:
        raise TrainingError("simulated drifts must have pilots and errors before training above 0, got none")
    blocks = len(used[0].magnitude)
    for drift in used:
        _check_gains(drift.magnitude, drift.snr, blocks)
    pilots = [pilot for drift in used for pilot in drift.pilots]
    steps, samples = (float(np.median([getattr(pilot, name) for pilot in pilots])) for name in ("steps", "samples"))
    neutral = replace(Law.neutral(1.0, blocks, max(steps, 1.0), samples), beta=_BETA)
    means = (np.exp(np.mean([_logs_of(getattr(one, name)) for one in used], axis=0)) for name in ("magnitude", "snr"))
    magnitude, snr = (tuple(float(one) for one in mean) for mean in means)
    prior = Prior(neutral, magnitude, snr, *((0.5, 0.25, 0.25) if gradients else (0.0, 0.0, 0.0)))
    tables = [PilotTable.of(drift.pilots, blocks) for drift in used]
    shifts = [_shifts(prior, drift.magnitude, drift.snr) for drift in used]
    start = neutral.logs()
    powers = np.asarray([prior.rho, prior.tau_power, prior.nu_power])
    scale = noise * float(np.mean([drift.start_error for drift in used]))
    size = len(start)
    fitted = 3 if gradients else 0
    deviation = np.concatenate((np.full(size, spread), np.full(fitted, 0.5)))

    def loss(change: Floats) -> tuple[float, Floats]:
        value, slope = float(np.sum((change / deviation) ** 2)) / 2, change / deviation**2
        for drift, table, shift in zip(used, tables, shifts, strict=True):
            shift = shift[:, :fitted]
            logs = start + change[:size] + shift @ (powers[:fitted] + change[size:])
            misfit, by_logs = squared_misfit(logs, Law.total_values, table, drift.start_error, scale)
            value += misfit
            slope = slope + np.concatenate((by_logs, by_logs @ shift))
        return value, slope

    change = minimum(loss, np.zeros(size + fitted))
    powers[:fitted] += change[size:]
    rho, tau_power, nu_power = (float(one) for one in powers)
    return replace(
        prior, typical=neutral.with_logs(start + change[:size]), rho=rho, tau_power=tau_power, nu_power=nu_power
    )


def leave_one_kind_out(drifts: Sequence[SimulatedDrift], *, gradients: bool = True) -> dict[str, float]:
    """Mean absolute error of what priors predict for each kind of drift when they are fitted to the other kinds.

    Raises:
        TrainingError: there are fewer than two kinds.
    """
    kinds = sorted({drift.kind for drift in drifts})
    if len(kinds) < 2:
        raise TrainingError(f"drifts must be of 2 or more kinds to leave one out, got {kinds}")
    missed = {}
    for kind in kinds:
        prior = fit_prior([drift for drift in drifts if drift.kind != kind], gradients=gradients)
        held_out = [drift for drift in drifts if drift.kind == kind and drift.pilots]
        if held_out:
            laws = [prior.law(drift.magnitude, drift.snr, drift.start_error) for drift in held_out]
            missed[kind] = float(
                np.mean([mean_miss(law, drift.pilots) for law, drift in zip(laws, held_out, strict=True)])
            )
    return missed


def _shifts(prior: Prior, magnitude: Sequence[float], snr: Sequence[float]) -> Floats:
    """Derivatives of a law's logarithms by the three exponents of a prior, shape ``[K, 3]``."""
    blocks = len(prior.magnitude)
    shifts = np.zeros((SINGLE + 3 * blocks, 3))
    larger = np.clip(_logs_of(magnitude) - _logs_of(prior.magnitude), -_FARTHEST, _FARTHEST)
    shifts[SINGLE : SINGLE + blocks, 0] = larger
    noisier = np.clip(_logs_of(prior.snr) - _logs_of(snr), -_FARTHEST, _FARTHEST)
    shifts[SINGLE + blocks : SINGLE + 2 * blocks, 1] = noisier
    shifts[SINGLE + 2 * blocks :, 2] = noisier
    return shifts


def _logs_of(numbers: Sequence[float]) -> Floats:
    return np.log(np.maximum(np.asarray(numbers, dtype=np.float64), 1e-12))


def _check_gains(magnitude: Sequence[float], snr: Sequence[float], blocks: int | None = None) -> None:
    """Refuse gradients' numbers that are not finite and 0 or more, or of a wrong number of blocks."""
    check_numbers("magnitude", magnitude, above=False)
    check_numbers("snr", snr, above=False)
    expected = len(magnitude) if blocks is None else blocks
    if not len(magnitude) == len(snr) == expected:
        raise TrainingError(f"magnitude and snr must be {expected} numbers each, got {len(magnitude)} and {len(snr)}")
