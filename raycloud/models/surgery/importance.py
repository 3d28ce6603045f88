"""Importance of blocks, heads and units: which of them a smaller model keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.models.segments import Segment
from raycloud.models.structure import blocks_of
from raycloud.models.surgery.axes import Axes


def evenly_spaced(total: int, keep: int) -> list[int]:
    """Indices of ``keep`` of ``total`` blocks at even distances, the first and the last among them.

    Raises:
        ValueError: ``keep`` is not from 1 to ``total``.
    """
    _check(total, keep)
    if keep == 1:
        return [0]
    return [round(index * (total - 1) / (keep - 1)) for index in range(keep)]


def most_important(distances: Tensor, keep: int) -> list[int]:
    """Indices of the ``keep`` blocks with the largest distances, in order.

    Raises:
        ValueError: ``keep`` is not from 1 to the number of blocks.
    """
    _check(len(distances), keep)
    return sorted(int(index) for index in distances.topk(keep).indices)


def _check(total: int, keep: int) -> None:
    if not 1 <= keep <= total:
        raise ValueError(f"can keep from 1 to {total} blocks, not {keep}")


@torch.no_grad()
def angular_distances(model: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Angular distance between input and output of each block, (blocks,), from 0 (same direction) to 1 (opposite).

    The mean over calibration tokens of arccos(cos(hidden state in, hidden state out)) / π (Gromov et al. 2024, arXiv
    2403.17887, with single blocks). A block with a small distance can be removed with little harm.

    Args:
        model: the model whose blocks are compared.
        batches: token ids (B, T) and a mask (B, T), False for padding.
    """
    total = len(blocks_of(model))
    embedding = Segment(model, 0, 0, head=False)
    parts = [Segment(model, index, index + 1, embed=False, head=False) for index in range(total)]
    sums, count = torch.zeros(total, dtype=torch.float64), 0
    for ids, valid in batches:
        mask = None if bool(valid.all()) else valid
        before = embedding.hidden(ids, valid=mask)
        count += int(valid.sum())
        for index, part in enumerate(parts):
            after = part.hidden(before, valid=mask)
            cosine = nn.functional.cosine_similarity(before[valid].float(), after[valid].float(), dim=-1)
            sums[index] += cosine.clamp(-1, 1).arccos().sum().double().cpu() / math.pi
            before = after
    return sums / max(count, 1)


def member_importance(block: nn.Module, axes: Axes) -> Tensor:
    """Importance of the groups of heads or the units of a part of a block, (members,), from its present gradients.

    The change of the loss to first order if a member's output became zero, |Σ a · ∂loss/∂a| over its outputs a and all
    tokens (Molchanov et al. 2017, arXiv 1611.06440). It is read off the weights that lead out: the sum over a unit's
    column of weight times gradient is the sum over tokens of its output times gradient.

    Args:
        block: block with gradients.
        axes: axes of an attention or a feed-forward network.
    """
    parameter = block.get_parameter(axes.output.name)
    if parameter.grad is None:
        raise ValueError(f"'{axes.output.name}' has no gradient")
    product = (parameter.detach() * parameter.grad).movedim(axes.output.dim, 0).flatten(1).sum(1)
    return product[axes.output.entries.to(product.device)].sum(1).abs()
