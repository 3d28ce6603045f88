"""Law of retraining: the error left after training chosen blocks, as a curve in steps and in different samples.

``err = e_∞ + (e_0 − e_∞)·exp(−Z^β)`` with ``Z = ω_h(1 − e^{−q/τ_h}) + Σ_b ω_b κ_b^γ (1 − e^{−q/τ_b})(1 − e^{−n/ν_b})``
over the trained blocks ``b`` at widths ``κ_b``, after ``q`` steps on ``n`` different samples. The error falls with
steps, samples, widths and blocks, and stays between ``e_∞`` and ``e_0``. Values ``z_b`` add up over blocks, so that
the planner can choose blocks by them; with ``β`` below 1 a further block lowers the error less than alone. Pilots fit
a law (:mod:`raycloud.retrain.law_fit`), starting from the prior law that gradients give
(:mod:`raycloud.retrain.law_prior`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from raycloud.errors import TrainingError
from raycloud.retrain.pilots import Floats, PilotTable

SMALLEST = 1e-9
"""Smallest parameter whose logarithm is taken."""
SINGLE = 5
"""Number of a law's parameters that are of no block; three numbers of each block follow them."""


@dataclass(frozen=True)
class Law:
    """Saturating law: each block has a ceiling, and steps and samples that it needs to come near it."""

    start_error: float
    """Error before training, ``e_0``."""
    floor: float
    """Error that no training goes below, ``e_∞``."""
    head_omega: float
    """Ceiling of the head's value; values are falls of the error's excess over the floor, in nats if ``β`` is 1."""
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
    beta: float = 1.0
    """Exponent of the sum of all values, at most 1."""

    def __post_init__(self) -> None:
        check_errors(self.start_error, self.floor)
        check_numbers("omega", (self.head_omega, *self.omega), above=False)
        check_numbers("tau", (self.head_tau, *self.tau))
        if not 0 < self.beta <= 1:
            raise TrainingError(f"beta must be above 0 and at most 1, got {self.beta}")
        check_numbers("nu", self.nu)
        check_numbers("gamma", (self.gamma,), above=False)
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
        return omega * width_power(width, self.gamma) * _risen(steps, tau) * _risen(samples, nu)

    def head_value(self, steps: npt.ArrayLike) -> Floats:
        """Values of training the head."""
        return self.head_omega * _risen(steps, np.asarray(self.head_tau))

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> float:
        """Error after training blocks, given with their widths."""
        return error_left(self, total_value(self, trained, steps, samples) ** self.beta)

    def logs(self) -> Floats:
        """Parameters as unbounded numbers: floor, beta, head, gamma, and three numbers of each block."""
        single = [floor_logit(self.start_error, self.floor), floor_logit(1.0, self.beta)]
        single += [bounded_log(one) for one in (self.head_omega, self.head_tau, self.gamma)]
        return np.asarray([*single, *map(bounded_log, (*self.omega, *self.tau, *self.nu))])

    def with_logs(self, logs: Floats) -> Law:
        """Law of these parameters, for the same error before training."""
        head_omega, head_tau, gamma = (float(one) for one in np.exp(logs[2:SINGLE]))
        omega, tau, nu = (tuple(float(one) for one in row) for row in np.exp(logs[SINGLE:]).reshape(3, -1))
        return replace(
            self,
            floor=self.start_error * floor_share(float(logs[0])),
            head_omega=head_omega,
            head_tau=head_tau,
            omega=omega,
            tau=tau,
            nu=nu,
            gamma=gamma,
            beta=floor_share(float(logs[1])),
        )

    @staticmethod
    def free(table: PilotTable) -> npt.NDArray[np.bool_]:
        """Parameters that pilots tell: ``ν`` of a block only by two sizes, ``γ`` by two widths, ``β`` by pairs."""
        trained = table.width > 0
        sizes = np.asarray([len(set(table.samples[used])) > 1 for used in trained.T])
        single = [True, bool((trained.sum(1) > 1).any()), True, True, len(set(table.width[trained])) > 1]
        return np.concatenate((single, np.ones(2 * len(sizes), bool), sizes))

    @staticmethod
    def total_values(logs: Floats, table: PilotTable) -> tuple[Floats, Floats]:
        """Exponents ``Z^β`` of each pilot, shape ``[P]``, and their derivatives by ``logs``, ``[P, K]``."""
        beta, (head_omega, head_tau, gamma) = floor_share(float(logs[1])), np.exp(logs[2:SINGLE])
        omega, tau, nu = np.exp(logs[SINGLE:]).reshape(3, 1, -1)
        steps, samples = table.steps[:, None], table.samples[:, None]
        width = width_power(table.width, gamma)
        by_steps, by_samples = _risen(steps, tau), _risen(samples, nu)
        value = omega * width * by_steps * by_samples
        head = head_omega * _risen(table.steps, head_tau)
        total = np.maximum(head + value.sum(1), SMALLEST)
        slopes = [
            np.zeros_like(head),
            total * np.log(total) * (1 - beta),
            head,
            head_omega * _risen_slope(table.steps, head_tau),
            (value * gamma * np.log(np.where(table.width > 0, table.width, 1.0))).sum(1),
        ]
        by_tau = omega * width * by_samples * _risen_slope(steps, tau)
        by_nu = omega * width * by_steps * _risen_slope(samples, nu)
        by_logs = np.concatenate((np.stack(slopes, axis=1), value, by_tau, by_nu), axis=1)
        return total**beta, by_logs * (beta * total ** (beta - 1))[:, None]


class _Curve(Protocol):
    """Law whose error falls from that before training to a floor, by the sum of its values."""

    @property
    def start_error(self) -> float: ...

    @property
    def floor(self) -> float: ...

    def value(
        self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: npt.ArrayLike
    ) -> Floats: ...

    def head_value(self, steps: npt.ArrayLike) -> Floats: ...


def total_value(law: _Curve, trained: Mapping[int, float], steps: int, samples: int) -> float:
    """Sum of the values of the head and of trained blocks, given with their widths."""
    blocks = law.value(list(trained), list(trained.values()), steps, samples)
    return float(law.head_value(steps)) + float(np.sum(blocks))


def error_left(law: _Curve, exponent: float) -> float:
    """Error that a law predicts."""
    # In this form the rounded error too stays between the floor and the error before training.
    return max(law.floor, law.start_error + (law.start_error - law.floor) * math.expm1(-exponent))


def _risen(amount: npt.ArrayLike, constant: Floats | float) -> Floats:
    """Share ``1 − e^{−x/c}`` of a ceiling."""
    return -np.expm1(-np.asarray(amount, dtype=np.float64) / constant)


def _risen_slope(amount: npt.ArrayLike, constant: Floats | float) -> Floats:
    """Derivative of :func:`_risen` by the logarithm of the constant."""
    ratio = np.asarray(amount, dtype=np.float64) / constant
    return -ratio * np.exp(-ratio)


def width_power(width: npt.ArrayLike, gamma: float) -> Floats:
    """Widths to a power; 0 stays 0 whatever the power."""
    width = np.asarray(width, dtype=np.float64)
    return np.where(width > 0, np.power(np.where(width > 0, width, 1.0), gamma), 0.0)


def floor_share(logit: float) -> float:
    """Share of the error before training that is the floor, or another share, from its logit."""
    return 1 / (1 + math.exp(-logit))


def floor_logit(start_error: float, floor: float) -> float:
    """Logit of the floor's share, kept away from none and all."""
    share = min(max(floor / start_error if start_error > 0 else 0.5, 1e-6), 1 - 1e-6)
    return math.log(share / (1 - share))


def bounded_log(number: float) -> float:
    """Logarithm of a parameter, that of the smallest for 0."""
    return math.log(max(number, SMALLEST))


def check_errors(start_error: float, floor: float) -> None:
    """Refuse errors that are not finite, or a floor above the error before training."""
    if not 0 <= floor <= start_error < math.inf:
        raise TrainingError(
            f"start_error must be finite and at least floor, and floor 0 or more, got {start_error} and {floor}"
        )


def check_numbers(name: str, numbers: Sequence[float], above: bool = True) -> None:
    """Refuse numbers that are not finite, or not above 0, or not 0 or more."""
    for number in numbers:
        if not math.isfinite(number) or number < 0 or (above and number == 0):
            raise TrainingError(f"{name} must be finite and {'above 0' if above else '0 or more'}, got {number}")
