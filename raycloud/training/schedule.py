"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def lr_factor(step: int, total: int, warmup: int, schedule: Schedule, floor: float = 0.0) -> float:
    """Factor of the peak learning rate at ``step``, counted from 0.

    It rises linearly to 1 at step ``warmup``, then follows the schedule down to ``floor`` at step ``total``
    (``constant`` stays at 1).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    fall = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (1.0 - floor) * fall
