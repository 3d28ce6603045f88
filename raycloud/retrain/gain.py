"""Estimates of what retraining a block would gain, from gradients of current samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.errors import DataError, TrainingError
from raycloud.models.frozen_prefix import FrozenPrefix
from raycloud.retrain.meter import measured
from raycloud.retrain.parts import RetrainParts, trainable_only
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import LossOf


@dataclass(frozen=True)
class BlockGain:
    """Estimates for one block. Neither ranks blocks alone: they are inputs of the scaling law."""

    magnitude: float
    """Norm of the mean gradient."""
    snr: float
    """Signal-to-noise ratio: squared norm of the mean gradient over the variance of the mean, summed over its
    coordinates; it does not change with the scale of the loss."""
    taylor: float
    """First-order drop of the loss by a step against the gradient, the squared norm of the mean gradient."""


@dataclass(frozen=True)
class Gains:
    """Estimates of all blocks, and what they cost."""

    blocks: tuple[BlockGain, ...]
    head: BlockGain
    loss: float
    """Mean loss of the samples."""
    flops: int
    memory: int
    """Largest number of bytes held, as for training."""


def block_gains(
    model: PreTrainedModel,
    parts: RetrainParts,
    samples: Samples,
    loss: LossOf,
    *,
    micro_batches: int = 8,
    together: int | None = None,
) -> Gains:
    """Estimate the gain of each block by one forward and backward over the samples.

    Args:
        model: the edge's model; it does not change.
        parts: its parts.
        samples: current samples, at least as many as micro-batches.
        loss: loss of logits and labels.
        micro_batches: number of parts of the samples whose gradients are compared, 2 or more.
        together: number of blocks whose gradients are held at a time; None for all. With fewer, less memory is held and
            more operations are paid, as the blocks behind run again.

    Raises:
        DataError: there are fewer samples than micro-batches.
        TrainingError: a gradient is not finite.
    """
    if len(samples) < micro_batches:
        raise DataError(
            f"{len(samples)} samples are given for {micro_batches} micro-batches; allowed: one each or more"
        )
    size, total = len(samples) // micro_batches, len(parts.blocks)
    batches = list(samples.select(slice(0, size * micro_batches)).batches(size))
    width = together or total
    found: dict[int, BlockGain] = {}
    mean_loss, flops, memory = 0.0, 0, 0
    model.eval()
    weights = sum(one.nbytes for one in model.parameters())
    state = 0
    for lo in range(0, total, width):
        groups = {
            index: list(parts.blocks[parts.paths[index]].parameters()) for index in range(lo, min(lo + width, total))
        }
        if lo == 0:
            groups[total] = list(parts.head.values())
        prefix = FrozenPrefix(model, lo)
        with trainable_only(model, [one for group in groups.values() for one in group]):
            sums = {index: [torch.zeros_like(one) for one in group] for index, group in groups.items()}
            squares = dict.fromkeys(groups, 0.0)
            for batch in batches:
                with measured(model) as cost:
                    boundary = prefix.record(batch.inputs)
                    value = loss(prefix.run(boundary, batch.inputs).logits, batch.labels)
                    mean = value.sum / max(value.count, 1)
                    mean.backward()
                flops += cost.flops
                mean_loss += float(mean.detach()) / micro_batches if lo == 0 else 0.0
                memory = max(memory, cost.kept + boundary.nbytes)
                for index, group in groups.items():
                    for added, parameter in zip(sums[index], group, strict=True):
                        if (slope := parameter.grad) is not None:
                            added.add_(slope, alpha=1 / micro_batches)
                            squares[index] += float(slope.square().sum()) / micro_batches
                model.zero_grad(set_to_none=True)
            for index in groups:
                found[index] = _gain(sums[index], squares[index], micro_batches)
            state = max(state, 8 * sum(one.numel() for group in groups.values() for one in group))
    return Gains(
        tuple(found[index] for index in range(total)), found[total], mean_loss, flops, weights + memory + state
    )


def _gain(mean: Sequence[Tensor], square: float, count: int) -> BlockGain:
    squared = sum(float(one.square().sum()) for one in mean)
    # The mean of squared norms is the squared norm of the mean plus the variance; unbiased over ``count`` draws.
    variance = max(square - squared, 0.0) * count / (count - 1)
    if not math.isfinite(square):
        raise TrainingError("the gradient of a block is not finite on the current samples")
    snr = squared / (variance / count) if variance > 0 else math.inf if squared > 0 else 0.0
    return BlockGain(math.sqrt(squared), snr, squared)
