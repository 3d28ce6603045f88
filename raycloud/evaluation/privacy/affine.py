"""Affine maps between hidden states, fitted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """Affine map ``(x - mean) / scale @ weight + bias``: (n, d) -> (n, m)."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """Map hidden states (n, d) to (n, m)."""
        return self.standard(hidden) @ self.weight + self.bias

    def standard(self, hidden: Tensor) -> Tensor:
        """Standardise hidden states (n, d) with the mean and deviation of the data that the map was fitted on."""
        return (hidden - self.mean) / self.scale


def ridge(inputs: Tensor, targets: Tensor, penalty: float = 1e-3, chunk: int = 4096) -> Affine:
    """Fit the affine map with the least squared error by ridge regression.

    Coordinates are standardised first: a few of a transformer's are hundreds of times larger than the others, so the
    penalty would not act on them equally.

    Args:
        inputs: (n, d).
        targets: (n, m).
        penalty: added to the diagonal of the inputs' correlation, per sample.
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
