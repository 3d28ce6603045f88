"""Data set ``builtin:digits``: 1,797 images of handwritten digits, 8 × 8 pixels (Alpaydin & Kaynak 1998, UCI)."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from raycloud.fetch import fetch


def digits(notify: Callable[[str], None] = lambda line: None) -> tuple[Tensor, Tensor]:
    """Images (1797, 8, 8) with values from 0 to 1, and classes (1797,) from 0 to 9."""
    with gzip.open(fetch("digits", notify) / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    return torch.tensor(table[:, :-1].reshape(-1, 8, 8) / 16, dtype=torch.float32), torch.tensor(table[:, -1]).long()
