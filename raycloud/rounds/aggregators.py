"""Aggregators: functions from the contributions of a round, in the order of its members, to new weights.

All compute in float32, or in float64 for float64 tensors, and return each tensor in its own dtype. Tensors that are not
floating-point (coordinates, equal in all contributions) are taken from the first one. :func:`coverage_mean` needs the
former weights too and leaves such tensors as they were, so recipes do not offer it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from raycloud.models.weights import Weights
from raycloud.rounds.contribution import Contribution, TensorIndex
from raycloud.rounds.recipe import AggregatorName

Aggregator = Callable[[Sequence[Contribution]], dict[str, Tensor]]
TRIM = 0.2
"""Share of the contributions that the trimmed mean drops at each end."""


def mean(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Mean by samples, Σ samples · weights / Σ samples: federated averaging (McMahan et al. 2017, arXiv 1602.05629).

    Args:
        contributions: at least one, all with the same tensors.
    """
    total = float(sum(one.samples for one in contributions))
    first, *others = contributions
    merged = dict(first.weights)
    for name, tensor in first.weights.items():
        if tensor.is_floating_point():
            computed = tensor.to(_dtype(tensor)) * (first.samples / total)
            for one in others:
                computed.add_(one.weights[name].to(computed.dtype), alpha=one.samples / total)
            merged[name] = computed.to(tensor.dtype)
    return merged


def trimmed_mean(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Mean of each number without the lowest and highest ⌊:data:`TRIM` · n⌋ of n (Yin et al. 2018, arXiv 1803.01498).

    It bounds the influence of a few edges with wrong weights. Samples are not counted: an edge tells its own number.
    Below five contributions nothing is dropped.

    Args:
        contributions: at least one, all with the same tensors.
    """
    return _middle_mean(contributions, int(TRIM * len(contributions)))


def median(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """Median of each number (Yin et al. 2018); the mean of the two in the middle if n is even.

    Args:
        contributions: at least one, all with the same tensors.
    """
    return _middle_mean(contributions, (len(contributions) - 1) // 2)


def coverage_mean(contributions: Sequence[Contribution], former: Weights) -> dict[str, Tensor]:
    """Mean by samples of each number, over the contributions that have it.

    Contributions may lack tensors, and may have parts of tensors, by ``Contribution.index``. Numbers that nobody has
    stay, bit for bit.

    Args:
        contributions: contributions whose names, parts and dtypes fit ``former``.
        former: whole weights that the edges began with.

    Returns:
        Whole tensors that at least one contribution has.
    """
    merged = {}
    for name, whole in former.items():
        having = [one for one in contributions if name in one.weights]
        if not having or not whole.is_floating_point():
            continue
        total, samples = (torch.zeros_like(whole, dtype=_dtype(whole)) for _ in range(2))
        for one in having:
            at = _positions(whole, one.index.get(name, {}))
            total[at] += one.samples * one.weights[name].to(total.dtype)
            samples[at] += one.samples
        merged[name] = torch.where(samples > 0, total / samples, whole.to(total.dtype)).to(whole.dtype)
    return merged


AGGREGATORS: Mapping[AggregatorName, Aggregator] = {"mean": mean, "trimmed_mean": trimmed_mean, "median": median}
"""Aggregators that recipes offer."""


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _middle_mean(contributions: Sequence[Contribution], dropped: int) -> dict[str, Tensor]:
    """Mean of each number without the ``dropped`` lowest and highest."""
    first = contributions[0].weights
    merged = dict(first)
    for name, tensor in first.items():
        if tensor.is_floating_point():
            sorted_ = torch.stack([one.weights[name].to(_dtype(tensor)) for one in contributions]).sort(dim=0).values
            merged[name] = sorted_[dropped : len(contributions) - dropped].mean(dim=0).to(tensor.dtype)
    return merged


def _positions(whole: Tensor, index: TensorIndex) -> tuple[Tensor, ...]:
    """Positions of a part within the whole tensor, one index tensor per dimension, broadcast against each other."""
    return tuple(
        index.get(dimension, torch.arange(size)).reshape([-1 if at == dimension else 1 for at in range(whole.ndim)])
        for dimension, size in enumerate(whole.shape)
    )
