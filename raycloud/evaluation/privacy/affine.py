"""Affine maps between rows, fitted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """``(x - mean) / scale @ weight + bias``: (n, d) -> (n, m)."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """The image (n, m) of rows (n, d)."""
        return self.standard(rows) @ self.weight + self.bias

    def standard(self, rows: Tensor) -> Tensor:
        """Rows with mean 0 and variance 1 in every coordinate, as far as they are like those it was fitted on."""
        return (rows - self.mean) / self.scale


def ridge(inputs: Tensor, targets: Tensor, penalty: float = 1e-3, chunk: int = 4096) -> Affine:
    """The affine map with the least squared error, its weight held back by ``penalty`` per sample.

    Coordinates are standardised first: a few of a transformer's are hundreds of times larger than the others and would
    hide them from the penalty.

    Args:
        inputs: (n, d).
        targets: (n, m).
        penalty: added to the diagonal of the inputs' correlation.
        chunk: samples whose products are summed at a time, in float64.
    """
    mean, bias = inputs.double().mean(0), targets.double().mean(0)
    scale = inputs.double().std(0).clamp_min(1e-6)
    width = inputs.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=inputs.device)
    cross = torch.zeros(width, targets.shape[1], dtype=torch.float64, device=inputs.device)
    for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
        x = (x.double() - mean) / scale
        gram += x.T @ x
        cross += x.T @ (y.double() - bias)
    gram.diagonal().add_(penalty * len(inputs))
    weight = torch.linalg.solve(gram, cross)
    return Affine(mean.float(), scale.float(), weight.float(), bias.float())
