"""One set of weights from several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raycloud.models.weights import Weights


def weighted_average(models: Sequence[Weights], shares: Sequence[float]) -> dict[str, Tensor]:
    """Σ share · weights / Σ share, tensor by tensor, in float32 and back in each tensor's own type.

    Federated averaging (McMahan et al. 2017, arXiv 1602.05629) where the shares are numbers of tokens.

    Raises:
        ValueError: nothing to average, shares that are not positive, or models with different tensors.
    """
    if not models or len(models) != len(shares) or min(shares) <= 0:
        raise ValueError(f"need as many positive shares as models, got {len(models)} models and shares {list(shares)}")
    if any(one.keys() != models[0].keys() for one in models):
        raise ValueError("models to average must have the same tensors")
    total = float(sum(shares))
    merged = {}
    for name, first in models[0].items():
        kind = torch.promote_types(first.dtype, torch.float32)
        mean = first.to(kind) * (shares[0] / total)
        for one, share in zip(models[1:], shares[1:], strict=True):
            mean.add_(one[name].to(kind), alpha=share / total)
        merged[name] = mean.to(first.dtype)
    return merged
