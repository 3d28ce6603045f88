"""Law of retraining: the error left after training chosen blocks, as a curve in steps and in different samples.

``err = e_∞ + (e_0 − e_∞)·exp(−Z)`` with ``Z = ω_h(1 − e^{−q/τ_h}) + Σ_b ω_b κ_b^γ (1 − e^{−q/τ_b})(1 − e^{−n/ν_b})``
over the trained blocks ``b`` at widths ``κ_b``, after ``q`` steps on ``n`` different samples. The error falls with
steps, samples, widths and blocks, and stays between ``e_∞`` and ``e_0``. Values ``z_b`` add up over blocks, so that
the planner can choose blocks by them.

A law is fitted to short trainings, the pilots, with a pull towards a prior law (:func:`fit`); the prior law of a drift
comes from gradients alone, by what was learnt from simulated drifts (:func:`fit_prior`). A law stored for a drift that
recurs is used as it is, or as the prior of new pilots. :class:`PowerLaw` and :class:`Score` are rivals with the same
interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from raycloud.errors import TrainingError

Floats = npt.NDArray[np.float64]

_SMALLEST = 1e-9
"""Smallest parameter whose logarithm is taken."""
_RANGE = 8.0
"""Farthest that a fitted logarithm moves from the prior's: a factor of 3,000."""

_FARTHEST = 5.0
"""Logarithm of the largest ratio of a gradient's number to its mean: beyond, the simulated drifts tell nothing."""


@dataclass(frozen=True)
class Pilot:
    """Short training of some blocks, and the error that it left."""

    blocks: tuple[int, ...]
    """Trained blocks; none if only the head was trained."""
    steps: int
    """Optimiser steps."""
    samples: int
    """Different samples that the steps drew from."""
    error: float
    """Error afterwards on samples that were held out: a share of wrong answers, or bits or nats of loss."""
    widths: tuple[float, ...] = ()
    """Width of each trained block; empty if all were whole."""

    def __post_init__(self) -> None:
        if not 0 <= self.error < math.inf:
            raise TrainingError(f"error of a pilot must be finite and 0 or more, got {self.error}")
        if self.steps < 0 or self.samples < 1:
            raise TrainingError(
                f"a pilot must have 0 or more steps and 1 or more samples, got {self.steps} and {self.samples}"
            )
        if len(set(self.blocks)) < len(self.blocks) or min(self.blocks, default=0) < 0:
            raise TrainingError(f"blocks of a pilot must be different and 0 or more, got {self.blocks}")
        if self.widths and (len(self.widths) != len(self.blocks) or not all(0 < one <= 1 for one in self.widths)):
            raise TrainingError(f"widths of a pilot must be above 0 and at most 1, one per block, got {self.widths}")

    @property
    def trained(self) -> dict[int, float]:
        """Width of each trained block."""
        return dict(zip(self.blocks, self.widths or (1.0,) * len(self.blocks), strict=True))


@dataclass(frozen=True)
class Law:
    """Saturating law: each block has a ceiling, and steps and samples that it needs to come near it."""

    start_error: float
    """Error before training, ``e_0``."""
    floor: float
    """Error that no training goes below, ``e_∞``."""
    head_omega: float
    """Ceiling of the head's value; values are falls of the error's excess over the floor, in nats."""
    head_tau: float
    """Steps after which the head has 63 % of its ceiling."""
    omega: tuple[float, ...]
    """Ceiling of each block's value."""
    tau: tuple[float, ...]
    """Steps after which a block has 63 % of its ceiling."""
    nu: tuple[float, ...]
    """Different samples that support 63 % of a block's ceiling."""
    gamma: float = 1.0
    """Exponent of a block's width."""

    def __post_init__(self) -> None:
        _check_errors(self.start_error, self.floor)
        _check_numbers("omega", (self.head_omega, *self.omega), above=False)
        _check_numbers("tau", (self.head_tau, *self.tau))
        _check_numbers("nu", self.nu)
        _check_numbers("gamma", (self.gamma,), above=False)
        if not len(self.omega) == len(self.tau) == len(self.nu):
            raise TrainingError(
                f"omega, tau and nu must have one number per block, got {len(self.omega)}, {len(self.tau)} and "
                f"{len(self.nu)}"
            )

    @classmethod
    def neutral(cls, start_error: float, blocks: int, steps: float, samples: float) -> Law:
        """Law that prefers no block, for steps and samples of usual size."""
        each = (1.0,) * blocks
        return cls(
            start_error,
            start_error / 4,
            0.5,
            steps / 3,
            tuple(0.5 for _ in each),
            tuple(steps / 2 for _ in each),
            tuple(samples / 2 for _ in each),
            0.5,
        )

    def value(self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: npt.ArrayLike) -> Floats:
        """Values of training blocks; the arguments broadcast together."""
        block = np.asarray(block, dtype=np.int64)
        omega, tau, nu = (np.asarray(one)[block] for one in (self.omega, self.tau, self.nu))
        return omega * _power(width, self.gamma) * _risen(steps, tau) * _risen(samples, nu)

    def head_value(self, steps: npt.ArrayLike) -> Floats:
        """Values of training the head."""
        return self.head_omega * _risen(steps, np.asarray(self.head_tau))

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> float:
        """Error after training blocks, given with their widths."""
        return _left(self, trained, steps, samples)

    def logs(self) -> Floats:
        """Parameters as unbounded numbers: floor, head, gamma, and three numbers of each block."""
        single = [_floor_log(self.start_error, self.floor)]
        single += [_log(one) for one in (self.head_omega, self.head_tau, self.gamma)]
        return np.asarray([*single, *map(_log, (*self.omega, *self.tau, *self.nu))])

    def with_logs(self, logs: Floats) -> Law:
        """Law of these parameters, for the same error before training."""
        head_omega, head_tau, gamma = (float(one) for one in np.exp(logs[1:4]))
        omega, tau, nu = (tuple(float(one) for one in row) for row in np.exp(logs[4:]).reshape(3, -1))
        return replace(
            self,
            floor=self.start_error * _share(float(logs[0])),
            head_omega=head_omega,
            head_tau=head_tau,
            omega=omega,
            tau=tau,
            nu=nu,
            gamma=gamma,
        )

    @staticmethod
    def free(table: PilotTable) -> npt.NDArray[np.bool_]:
        """Parameters that pilots tell: ``ν`` of a block only by two sizes, ``γ`` only by two widths."""
        trained = table.width > 0
        sizes = np.asarray([len(set(table.samples[used])) > 1 for used in trained.T])
        return np.concatenate(([True] * 3, [len(set(table.width[trained])) > 1], np.ones(2 * len(sizes), bool), sizes))

    @staticmethod
    def exponents(logs: Floats, table: PilotTable) -> tuple[Floats, Floats]:
        """Values of all that each pilot trained, shape ``[P]``, and their derivatives by ``logs``, ``[P, K]``."""
        head_omega, head_tau, gamma = np.exp(logs[1:4])
        omega, tau, nu = np.exp(logs[4:]).reshape(3, 1, -1)
        steps, samples = table.steps[:, None], table.samples[:, None]
        width = _power(table.width, gamma)
        by_steps, by_samples = _risen(steps, tau), _risen(samples, nu)
        value = omega * width * by_steps * by_samples
        head = head_omega * _risen(table.steps, head_tau)
        slopes = [
            np.zeros_like(head),
            head,
            head_omega * _risen_slope(table.steps, head_tau),
            (value * gamma * np.log(np.where(table.width > 0, table.width, 1.0))).sum(1),
        ]
        by_tau = omega * width * by_samples * _risen_slope(steps, tau)
        by_nu = omega * width * by_steps * _risen_slope(samples, nu)
        return head + value.sum(1), np.concatenate((np.stack(slopes, axis=1), value, by_tau, by_nu), axis=1)


@dataclass(frozen=True)
class PowerLaw:
    """Rival law with one power of the steps for all parts: ``Z = (ω_h + Σ_b ω_b κ_b^γ)·(q/q_1)^β``.

    It is of the kind of the published law (method sheet, §1.5). Which of two blocks is worth more, at equal steps or
    at equal FLOPs, does not depend on the budget.
    """

    start_error: float
    """Error before training."""
    floor: float
    """Error that no training goes below."""
    head_omega: float
    """Value of the head at ``unit_steps``."""
    omega: tuple[float, ...]
    """Value of each block at ``unit_steps``."""
    beta: float
    """Exponent of the steps."""
    unit_steps: float
    """Steps ``q_1``."""
    gamma: float = 1.0
    """Exponent of a block's width."""

    def __post_init__(self) -> None:
        _check_errors(self.start_error, self.floor)
        _check_numbers("omega", (self.head_omega, *self.omega), above=False)
        _check_numbers("beta and gamma", (self.beta, self.gamma), above=False)
        _check_numbers("unit_steps", (self.unit_steps,))

    @classmethod
    def neutral(cls, start_error: float, blocks: int, steps: float) -> PowerLaw:
        """Law that prefers no block, for steps of usual size."""
        return cls(start_error, start_error / 4, 0.5, (0.5,) * blocks, 0.5, steps)

    def value(self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: npt.ArrayLike) -> Floats:
        """Values of training blocks; samples make no difference."""
        omega = np.asarray(self.omega)[np.asarray(block, dtype=np.int64)]
        return omega * _power(width, self.gamma) * self._grown(steps)

    def head_value(self, steps: npt.ArrayLike) -> Floats:
        """Values of training the head."""
        return self.head_omega * self._grown(steps)

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> float:
        """Error after training blocks, given with their widths."""
        return _left(self, trained, steps, samples)

    def logs(self) -> Floats:
        """Parameters as unbounded numbers; the unit of steps is left out."""
        single = [_floor_log(self.start_error, self.floor), _log(self.head_omega), _log(self.beta), _log(self.gamma)]
        return np.asarray([*single, *map(_log, self.omega), math.log(self.unit_steps)])

    def with_logs(self, logs: Floats) -> PowerLaw:
        """Law of these parameters, for the same error before training."""
        head_omega, beta, gamma, *omega = (float(one) for one in np.exp(logs[1:-1]))
        floor = self.start_error * _share(float(logs[0]))
        return replace(self, floor=floor, head_omega=head_omega, omega=tuple(omega), beta=beta, gamma=gamma)

    @staticmethod
    def free(table: PilotTable) -> npt.NDArray[np.bool_]:
        """Parameters that pilots tell: ``γ`` only by two widths."""
        trained = table.width > 0
        wide = len(set(table.width[trained])) > 1
        return np.concatenate(([True] * 3, [wide], np.ones(trained.shape[1], bool), [False]))

    @staticmethod
    def exponents(logs: Floats, table: PilotTable) -> tuple[Floats, Floats]:
        """Values of all that each pilot trained, shape ``[P]``, and their derivatives by ``logs``, ``[P, K]``."""
        head_omega, beta, gamma = np.exp(logs[1:4])
        ratio = np.log(np.maximum(table.steps, _SMALLEST)) - logs[-1]
        grown = np.exp(beta * ratio)
        value = np.exp(logs[4:-1]) * _power(table.width, gamma) * grown[:, None]
        head = head_omega * grown
        total = head + value.sum(1)
        by_gamma = (value * gamma * np.log(np.where(table.width > 0, table.width, 1.0))).sum(1)
        zero = np.zeros_like(head)
        slopes = np.stack((zero, head, total * beta * ratio, by_gamma), axis=1)
        return total, np.concatenate((slopes, value, zero[:, None]), axis=1)

    def _grown(self, steps: npt.ArrayLike) -> Floats:
        return np.power(np.asarray(steps, dtype=np.float64) / self.unit_steps, self.beta)


@dataclass(frozen=True)
class Score:
    """Rival value without a curve: one number per block, whatever the steps and samples.

    With magnitudes or signal-to-noise ratios of gradients it is the choice by a one-shot score. With the first-order
    (Taylor) gain of each block, ``Σ ∂ℓ/∂θ·Δθ``, it is that of GreenTrainer (Huang et al., ICLR 2024). More steps add
    nothing to it, so the steps have to be set elsewhere: :func:`raycloud.retrain.planner.taylor` does.
    """

    scores: tuple[float, ...]
    """Score of each whole block, 0 or more."""

    def __post_init__(self) -> None:
        _check_numbers("scores", self.scores, above=False)

    def value(self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: npt.ArrayLike) -> Floats:
        """Scores of blocks times their widths, in the shape of all arguments."""
        scores = np.asarray(self.scores)[np.asarray(block, dtype=np.int64)] * np.asarray(width, dtype=np.float64)
        return np.broadcast_arrays(scores, steps, samples)[0]

    def head_value(self, steps: npt.ArrayLike) -> Floats:
        """Zeros: the head is always trained."""
        return np.zeros(np.shape(steps))

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> None:
        """No prediction."""
        return


@dataclass(frozen=True)
class PilotTable:
    """Pilots as arrays."""

    width: Floats
    """Width of each block in each pilot, 0 if it was not trained, shape ``[P, L]``."""
    steps: Floats
    """Steps, shape ``[P]``."""
    samples: Floats
    """Different samples, shape ``[P]``."""
    error: Floats
    """Errors afterwards, shape ``[P]``."""

    @classmethod
    def of(cls, pilots: Sequence[Pilot], blocks: int) -> PilotTable:
        """Table of pilots of a model with so many blocks.

        Raises:
            TrainingError: a pilot trained a block that the model lacks.
        """
        width = np.zeros((len(pilots), blocks))
        for row, pilot in enumerate(pilots):
            if max(pilot.blocks, default=0) >= blocks:
                raise TrainingError(f"blocks of a pilot must be below {blocks}, got {pilot.blocks}")
            for block, share in pilot.trained.items():
                width[row, block] = share
        columns = ([getattr(pilot, name) for pilot in pilots] for name in ("steps", "samples", "error"))
        return cls(width, *(np.asarray(column, dtype=np.float64) for column in columns))


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
    _check_numbers("noise and spread", (noise, spread))
    table = PilotTable.of(pilots, len(prior.omega))
    scale = noise * (prior.start_error - prior.floor)
    if not pilots or scale <= 0:
        return prior
    start = prior.logs()
    free = prior.free(table)

    def loss(change: Floats) -> tuple[float, Floats]:
        logs = start.copy()
        logs[free] += change
        misfit, slope = _misfit(logs, prior.exponents, table, prior.start_error, scale)
        return misfit + float(change @ change) / (2 * spread**2), slope[free] + change / spread**2

    change = _minimum(loss, np.zeros(int(free.sum())))
    logs = start.copy()
    logs[free] += change
    return prior.with_logs(logs)


def _misfit(
    logs: Floats,
    exponents: Callable[[Floats, PilotTable], tuple[Floats, Floats]],
    table: PilotTable,
    start_error: float,
    scale: float,
) -> tuple[float, Floats]:
    """Half the squared errors of predictions over their scale, and the gradient by ``logs``."""
    total, slopes = exponents(logs, table)
    share, left = _share(float(logs[0])), np.exp(-total)
    # In units of the scale, so that no error is too small to be squared.
    unit = start_error / scale
    residual = unit * (share + (1 - share) * left) - np.minimum(table.error, start_error) / scale
    slope = (residual * -unit * (1 - share) * left) @ slopes
    slope[0] += float(residual @ (1 - left)) * unit * share * (1 - share)
    return float(residual @ residual) / 2, slope


def _minimum(loss: Callable[[Floats], tuple[float, Floats]], start: Floats) -> Floats:
    """Where a loss with its gradient is lowest, near the start."""
    bounds = [(one - _RANGE, one + _RANGE) for one in start]
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500}).x


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
        _check_errors(self.start_error, 0.0)
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
        _check_errors(start_error, 0.0)
        logs = self.typical.logs() + _shifts(self, magnitude, snr) @ (self.rho, self.tau_power, self.nu_power)
        return replace(self.typical, start_error=start_error, floor=0.0).with_logs(logs)


def fit_prior(drifts: Sequence[SimulatedDrift], *, noise: float = 0.05, spread: float = 1.5) -> Prior:
    """Prior from trainings under simulated drifts of source samples; at least 20 drifts of several kinds are of use.

    Args:
        drifts: simulated drifts with their pilots.
        noise: standard deviation of a pilot's error, as a share of the drift's error before training.
        spread: standard deviation of the logarithms of the typical law around a neutral one.

    Raises:
        TrainingError: there is no drift with a pilot, or drifts differ in the number of blocks.
    """
    _check_numbers("noise and spread", (noise, spread))
    used = [drift for drift in drifts if drift.pilots and drift.start_error > 0]
    if not used:
        raise TrainingError("simulated drifts must have pilots and errors before training above 0, got none")
    blocks = len(used[0].magnitude)
    for drift in used:
        _check_gains(drift.magnitude, drift.snr, blocks)
    pilots = [pilot for drift in used for pilot in drift.pilots]
    steps, samples = (float(np.median([getattr(pilot, name) for pilot in pilots])) for name in ("steps", "samples"))
    neutral = Law.neutral(1.0, blocks, max(steps, 1.0), samples)
    means = (np.exp(np.mean([_logs_of(getattr(one, name)) for one in used], axis=0)) for name in ("magnitude", "snr"))
    magnitude, snr = (tuple(float(one) for one in mean) for mean in means)
    prior = Prior(neutral, magnitude, snr, 0.5, 0.25, 0.25)
    tables = [PilotTable.of(drift.pilots, blocks) for drift in used]
    shifts = [_shifts(prior, drift.magnitude, drift.snr) for drift in used]
    start = neutral.logs()
    powers = np.asarray([prior.rho, prior.tau_power, prior.nu_power])
    size = len(start)
    deviation = np.concatenate((np.full(size, spread), np.full(3, 0.5)))

    def loss(change: Floats) -> tuple[float, Floats]:
        value, slope = float(np.sum((change / deviation) ** 2)) / 2, change / deviation**2
        for drift, table, shift in zip(used, tables, shifts, strict=True):
            logs = start + change[:size] + shift @ (powers + change[size:])
            misfit, by_logs = _misfit(logs, Law.exponents, table, drift.start_error, noise * drift.start_error)
            value += misfit
            slope = slope + np.concatenate((by_logs, by_logs @ shift))
        return value, slope

    change = _minimum(loss, np.zeros(size + 3))
    rho, tau_power, nu_power = (float(one) for one in powers + change[size:])
    return replace(
        prior, typical=neutral.with_logs(start + change[:size]), rho=rho, tau_power=tau_power, nu_power=nu_power
    )


def leave_one_kind_out(drifts: Sequence[SimulatedDrift]) -> dict[str, float]:
    """Mean absolute error of what priors predict for each kind of drift when they are fitted to the other kinds.

    Raises:
        TrainingError: there are fewer than two kinds.
    """
    kinds = sorted({drift.kind for drift in drifts})
    if len(kinds) < 2:
        raise TrainingError(f"drifts must be of 2 or more kinds to leave one out, got {kinds}")
    missed = {}
    for kind in kinds:
        prior = fit_prior([drift for drift in drifts if drift.kind != kind])
        held_out = [drift for drift in drifts if drift.kind == kind and drift.pilots]
        if held_out:
            laws = [prior.law(drift.magnitude, drift.snr, drift.start_error) for drift in held_out]
            missed[kind] = float(
                np.mean([mean_miss(law, drift.pilots) for law, drift in zip(laws, held_out, strict=True)])
            )
    return missed


def mean_miss(law: Law | PowerLaw, pilots: Sequence[Pilot]) -> float:
    """Mean absolute difference between predicted and measured errors."""
    return float(np.mean(np.abs([_predicted(law, pilot) - pilot.error for pilot in pilots])))


def regret(law: Law | PowerLaw, pilots: Sequence[Pilot]) -> float:
    """Error of the pilot that the law predicts to be the best, less that of the best."""
    return min(pilots, key=lambda pilot: _predicted(law, pilot)).error - min(pilot.error for pilot in pilots)


def _predicted(law: Law | PowerLaw, pilot: Pilot) -> float:
    return law.error(pilot.trained, pilot.steps, pilot.samples)


def _left(law: Law | PowerLaw, trained: Mapping[int, float], steps: int, samples: int) -> float:
    """Error that a law predicts."""
    total = float(law.head_value(steps)) + float(
        np.sum(law.value(list(trained), list(trained.values()), steps, samples))
    )
    # In this form the rounded error too stays between the floor and the error before training.
    return max(law.floor, law.start_error + (law.start_error - law.floor) * math.expm1(-total))


def _shifts(prior: Prior, magnitude: Sequence[float], snr: Sequence[float]) -> Floats:
    """Derivatives of a law's logarithms by the three exponents of a prior, shape ``[K, 3]``."""
    blocks = len(prior.magnitude)
    shifts = np.zeros((4 + 3 * blocks, 3))
    shifts[4 : 4 + blocks, 0] = np.clip(_logs_of(magnitude) - _logs_of(prior.magnitude), -_FARTHEST, _FARTHEST)
    noisier = np.clip(_logs_of(prior.snr) - _logs_of(snr), -_FARTHEST, _FARTHEST)
    shifts[4 + blocks : 4 + 2 * blocks, 1] = noisier
    shifts[4 + 2 * blocks :, 2] = noisier
    return shifts


def _risen(amount: npt.ArrayLike, constant: Floats | float) -> Floats:
    """Share ``1 − e^{−x/c}`` of a ceiling."""
    return -np.expm1(-np.asarray(amount, dtype=np.float64) / constant)


def _risen_slope(amount: npt.ArrayLike, constant: Floats | float) -> Floats:
    """Derivative of :func:`_risen` by the logarithm of the constant."""
    ratio = np.asarray(amount, dtype=np.float64) / constant
    return -ratio * np.exp(-ratio)


def _power(width: npt.ArrayLike, gamma: float) -> Floats:
    """Widths to a power; 0 stays 0 whatever the power."""
    width = np.asarray(width, dtype=np.float64)
    return np.where(width > 0, np.power(np.where(width > 0, width, 1.0), gamma), 0.0)


def _share(logit: float) -> float:
    """Share of the error before training that is the floor."""
    return 1 / (1 + math.exp(-logit))


def _floor_log(start_error: float, floor: float) -> float:
    """Logit of the floor's share, kept away from none and all."""
    share = min(max(floor / start_error if start_error > 0 else 0.5, 1e-6), 1 - 1e-6)
    return math.log(share / (1 - share))


def _log(number: float) -> float:
    return math.log(max(number, _SMALLEST))


def _logs_of(numbers: Sequence[float]) -> Floats:
    return np.log(np.maximum(np.asarray(numbers, dtype=np.float64), 1e-12))


def _check_errors(start_error: float, floor: float) -> None:
    """Refuse errors that are not finite, or a floor above the error before training."""
    if not 0 <= floor <= start_error < math.inf:
        raise TrainingError(
            f"start_error must be finite and at least floor, and floor 0 or more, got {start_error} and {floor}"
        )


def _check_numbers(name: str, numbers: Sequence[float], above: bool = True) -> None:
    """Refuse numbers that are not finite, or not above 0, or not 0 or more."""
    for number in numbers:
        if not math.isfinite(number) or number < 0 or (above and number == 0):
            raise TrainingError(f"{name} must be finite and {'above 0' if above else '0 or more'}, got {number}")


def _check_gains(magnitude: Sequence[float], snr: Sequence[float], blocks: int | None = None) -> None:
    """Refuse gradients' numbers that are not finite and 0 or more, or of a wrong number of blocks."""
    _check_numbers("magnitude", magnitude, above=False)
    _check_numbers("snr", snr, above=False)
    expected = len(magnitude) if blocks is None else blocks
    if not len(magnitude) == len(snr) == expected:
        raise TrainingError(f"magnitude and snr must be {expected} numbers each, got {len(magnitude)} and {len(snr)}")
