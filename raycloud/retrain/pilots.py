"""Pilots: short trainings under a drift, from which its law is fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raycloud.errors import TrainingError

Floats = npt.NDArray[np.float64]


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
