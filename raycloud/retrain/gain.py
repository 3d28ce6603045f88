"""Estimates of what retraining a block would gain, from gradients of current samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from raycloud.errors import DataError, TrainingError
from raycloud.models.frozen_prefix import FrozenPrefix
from raycloud.retrain.cost import Budget, ModelCost, training_cost
from raycloud.retrain.meter import measured
from raycloud.retrain.parts import RetrainParts, trainable_only
from raycloud.retrain.plans import training_choices
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import LossOf

MICRO_BATCHES = 8
"""Number of parts of the samples whose gradients are compared."""
MOST_SAMPLES, SHARE = 64, 0.05
"""Largest number of samples whose gradients are compared, and the largest share of a budget's operations for them."""


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
    micro_batches: int = MICRO_BATCHES,
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
    model.eval()
    found, spent = dict[int, BlockGain](), list[_Pass]()
    for lo in range(0, total, together or total):
        blocks = range(lo, min(lo + (together or total), total))
        groups = {index: list(parts.blocks[parts.paths[index]].parameters()) for index in blocks}
        if not lo:
            groups[total] = list(parts.head.values())
        sums = {index: _GradientSums(group) for index, group in groups.items()}
        spent.append(_sum_gradients(model, FrozenPrefix(model, lo), batches, loss, sums))
        found |= {index: one.gain(micro_batches) for index, one in sums.items()}
    held = sum(one.nbytes for one in model.parameters()) + max(one.memory for one in spent)
    head = found.pop(total)
    return Gains(tuple(found[index] for index in range(total)), head, spent[0].loss, sum(p.flops for p in spent), held)


def gain_samples(cost: ModelCost, budget: Budget, samples: int) -> int:
    """Number of samples whose gradients are compared: within their share of the budget, but one per micro-batch."""
    blocks = sum(menu[0].forward + menu[0].input_gradient + menu[0].weight_gradient for menu in cost.blocks)
    each = cost.stem_forward + cost.head_forward + cost.head_gradient + blocks
    most = min(MOST_SAMPLES, samples, max(MICRO_BATCHES, SHARE * budget.flops / each))
    return int(most) // MICRO_BATCHES * MICRO_BATCHES


def blocks_together(cost: ModelCost, budget: Budget, samples: int) -> int:
    """Number of blocks whose gradients may be held at a time within a budget's memory; 0 if not even one's may.

    Args:
        cost: costs of the model's parts.
        budget: budget of the window.
        samples: number of samples whose gradients are compared.
    """
    total = len(cost.blocks)

    def held(first: int, size: int) -> float:
        choices = training_choices(cost, range(first, min(first + size, total)))
        return training_cost(cost, choices, steps=1, batch=max(1, samples // MICRO_BATCHES), samples=1).memory

    size = total
    while size and max(held(first, size) for first in range(0, total, size)) > budget.memory:
        size //= 2
    return size


@dataclass(frozen=True)
class _Pass:
    """Cost and mean loss of a pass over the samples."""

    loss: float
    flops: int
    memory: int


class _GradientSums:
    """Sum of the gradients of a group of parameters over micro-batches, and of their squared norms."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self._sum = [torch.zeros_like(one) for one in parameters]
        self._squares = 0.0

    def add(self) -> None:
        """Add the present gradients."""
        for added, parameter in zip(self._sum, self.parameters, strict=True):
            if (slope := parameter.grad) is not None:
                added.add_(slope)
                self._squares += float(slope.square().sum())

    def gain(self, count: int) -> BlockGain:
        """Estimates from the gradients of ``count`` micro-batches.

        Raises:
            TrainingError: a gradient is not finite.
        """
        if not math.isfinite(self._squares):
            raise TrainingError("the gradient of a block is not finite on the current samples")
        squared = sum(float(one.square().sum()) for one in self._sum) / count**2
        # The mean of squared norms is the squared norm of the mean plus the variance; unbiased over ``count`` draws.
        variance = max(self._squares / count - squared, 0.0) * count / (count - 1)
        snr = squared / (variance / count) if variance > 0 else math.inf if squared > 0 else 0.0
        return BlockGain(math.sqrt(squared), snr, squared)


def _sum_gradients(
    model: PreTrainedModel,
    prefix: FrozenPrefix,
    batches: Sequence[Samples],
    loss: LossOf,
    sums: Mapping[int, _GradientSums],
) -> _Pass:
    """Run the micro-batches forward and backward, and add the gradients of each group."""
    parameters = [parameter for one in sums.values() for parameter in one.parameters]
    mean_loss, flops, kept = 0.0, 0, 0
    with trainable_only(model, parameters):
        for batch in batches:
            with measured(model) as cost:
                boundary = prefix.record(batch.inputs)
                value = loss(prefix.run(boundary, batch.inputs).logits, batch.labels)
                mean = value.sum / max(value.count, 1)
                mean.backward()
            for one in sums.values():
                one.add()
            model.zero_grad(set_to_none=True)
            mean_loss += float(mean.detach()) / len(batches)
            flops, kept = flops + cost.flops, max(kept, cost.kept + boundary.nbytes)
    # Gradients and their sums, in float32.
    return _Pass(mean_loss, flops, kept + 8 * sum(one.numel() for one in parameters))
