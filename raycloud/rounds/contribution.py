"""Contribution of an edge to a round, and the check that its tensors are those of the round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from raycloud.models.weights import Weights

TensorIndex = Mapping[int, Tensor]
"""Part of a tensor: for each dimension that is cut, the int64 indices (distinct) that the part has of it."""
WeightsForm = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of each tensor, by name."""


@dataclass(frozen=True)
class Contribution:
    """Contribution of an edge to a round."""

    weights: Weights
    samples: int
    """Number of samples or tokens that the weights were trained on in this round."""
    index: Mapping[str, TensorIndex] = field(default_factory=dict)
    """Index of each tensor that is only a part of the whole one; for coverage-weighted means."""


def form_of(weights: Weights) -> WeightsForm:
    """Return the dtype and shape of each tensor."""
    return {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in weights.items()}


def differing(contribution: Contribution, form: WeightsForm, *, partial: bool) -> list[str]:
    """Names of the tensors that do not fit a form, sorted.

    Args:
        contribution: contribution to check.
        form: form of the whole weights.
        partial: True if tensors may be missing or be parts of the whole ones.
    """
    mine = form_of(contribution.weights)
    if not partial:
        if contribution.index:
            return sorted(contribution.index)
        return sorted(mine.keys() ^ form.keys()) or sorted(name for name in mine if mine[name] != form[name])
    unknown = sorted((mine.keys() - form.keys()) | (contribution.index.keys() - mine.keys()))
    return unknown or sorted(
        name for name in mine if mine[name] != _part_form(form[name], contribution.index.get(name, {}))
    )


def _part_form(whole: tuple[str, tuple[int, ...]], index: TensorIndex) -> tuple[str, tuple[int, ...]] | None:
    """Form of the part of a tensor; None if the tensor has no such part."""
    dtype, shape = whole
    part = list(shape)
    for dimension, at in index.items():
        if not 0 <= dimension < len(shape) or at.ndim != 1 or str(at.dtype) != "torch.int64":
            return None
        if len(at) and (int(at.min()) < 0 or int(at.max()) >= shape[dimension] or len(at.unique()) < len(at)):
            return None
        part[dimension] = len(at)
    return dtype, tuple(part)
