"""Pilots: wrong numbers are refused."""

from __future__ import annotations

import math

import pytest

from raycloud.errors import TrainingError
from raycloud.retrain.pilots import Pilot


def test_wrong_numbers_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match="error of a pilot must be finite and 0 or more, got nan"):
        Pilot((0,), 10, 10, math.nan)
    with pytest.raises(TrainingError, match="widths of a pilot must be above 0 and at most 1, one per block"):
        Pilot((0,), 10, 10, 0.5, (0.0,))
    with pytest.raises(TrainingError, match=r"blocks of a pilot must be different and 0 or more, got \(1, 1\)"):
        Pilot((1, 1), 10, 10, 0.5)
