"""Rival laws of retraining, with the interface of the law: a power of the steps, and scores without a curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from raycloud.retrain.law import (
    SMALLEST,
    bounded_log,
    check_errors,
    check_numbers,
    error_left,
    floor_logit,
    floor_share,
    total_value,
    width_power,
)
from raycloud.retrain.pilots import Floats, PilotTable

_FARTHEST = 50.0
"""Largest logarithm of a power of the steps while a law is fitted."""


@dataclass(frozen=True)
class PowerLaw:
    """Rival law with one power of the steps for all parts: ``Z = (ω_h + Σ_b ω_b κ_b^γ)·(q/q_1)^β``.

    It is of the kind of the published law (BlockTrainer, doi 10.12263/DZXB.20240518). Which of two blocks is worth
    more, at equal steps or at equal FLOPs, does not depend on the budget.
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
        check_errors(self.start_error, self.floor)
        check_numbers("omega", (self.head_omega, *self.omega), above=False)
        check_numbers("beta and gamma", (self.beta, self.gamma), above=False)
        check_numbers("unit_steps", (self.unit_steps,))

    @classmethod
    def neutral(cls, start_error: float, blocks: int, steps: float) -> PowerLaw:
        """Law that prefers no block, for steps of usual size."""
        return cls(start_error, start_error / 4, 0.5, (0.5,) * blocks, 0.5, steps)

    def value(self, block: npt.ArrayLike, width: npt.ArrayLike, steps: npt.ArrayLike, samples: npt.ArrayLike) -> Floats:
        """Values of training blocks; samples make no difference."""
        omega = np.asarray(self.omega)[np.asarray(block, dtype=np.int64)]
        return omega * width_power(width, self.gamma) * self._grown(steps)

    def head_value(self, steps: npt.ArrayLike) -> Floats:
        """Values of training the head."""
        return self.head_omega * self._grown(steps)

    def error(self, trained: Mapping[int, float], steps: int, samples: int) -> float:
        """Error after training blocks, given with their widths."""
        return error_left(self, total_value(self, trained, steps, samples))

    def scaled(self, start_error: float) -> PowerLaw:
        """Law of another error before training, with the same share of it as the floor."""
        share = self.floor / self.start_error if self.start_error else 0.0
        return replace(self, start_error=start_error, floor=share * start_error)

    def logs(self) -> Floats:
        """Parameters as unbounded numbers; the unit of steps is left out."""
        single = [
            floor_logit(self.start_error, self.floor),
            bounded_log(self.head_omega),
            bounded_log(self.beta),
            bounded_log(self.gamma),
        ]
        return np.asarray([*single, *map(bounded_log, self.omega), math.log(self.unit_steps)])

    def with_logs(self, logs: Floats) -> PowerLaw:
        """Law of these parameters, for the same error before training."""
        head_omega, beta, gamma, *omega = (float(one) for one in np.exp(logs[1:-1]))
        floor = self.start_error * floor_share(float(logs[0]))
        return replace(self, floor=floor, head_omega=head_omega, omega=tuple(omega), beta=beta, gamma=gamma)

    @staticmethod
    def free(table: PilotTable) -> npt.NDArray[np.bool_]:
        """Parameters that pilots tell: ``γ`` only by two widths."""
        trained = table.width > 0
        wide = len(set(table.width[trained])) > 1
        return np.concatenate(([True] * 3, [wide], np.ones(trained.shape[1], bool), [False]))

    @staticmethod
    def total_values(logs: Floats, table: PilotTable) -> tuple[Floats, Floats]:
        """Values of all that each pilot trained, shape ``[P]``, and their derivatives by ``logs``, ``[P, K]``."""
        head_omega, beta, gamma = np.exp(logs[1:4])
        ratio = np.log(np.maximum(table.steps, SMALLEST)) - logs[-1]
        grown = np.exp(np.clip(beta * ratio, -_FARTHEST, _FARTHEST))
        value = np.exp(logs[4:-1]) * width_power(table.width, gamma) * grown[:, None]
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
    nothing to it, so the steps have to be set elsewhere: :func:`raycloud.retrain.plan_rivals.taylor` does.
    """

    scores: tuple[float, ...]
    """Score of each whole block, 0 or more."""

    def __post_init__(self) -> None:
        check_numbers("scores", self.scores, above=False)

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
