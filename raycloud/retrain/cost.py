"""Costs of retraining chosen blocks: FLOPs, peak memory and bytes on the wire, from measured costs of each block.

Backward stops at the lowest trained block, and the hidden states before it may be cached: block retraining is cheaper
than full fine-tuning by just these two. All costs of blocks are per sample, which is all tokens of one example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from raycloud.errors import ModelError, RecipeError


def _check(record: object, names: Sequence[str], error: type[ModelError] | type[RecipeError], most: float) -> None:
    """Refuse a field that is no number from 0 to ``most``, which it may equal."""
    for name in names:
        value = getattr(record, name)
        if not 0 <= value <= most:
            allowed = "0 or more" if most == math.inf else "finite and 0 or more"
            raise error(f"{name} of {type(record).__name__} must be {allowed}, got {value}")


_FINITE = 1.7e308


@dataclass(frozen=True)
class WidthCost:
    """Costs of one block at one kept share of its inner width; FLOPs and activations are per sample."""

    width: float
    """Kept share: 1 for the whole block, 0 for a dropped one, which is the identity and costs nothing."""
    forward: float
    """FLOPs of the forward pass."""
    input_gradient: float
    """FLOPs of the gradient with respect to the block's inputs, gradients inside the block included."""
    weight_gradient: float
    """FLOPs of the gradient with respect to the block's weights."""
    weights: float
    """Bytes of the weights."""
    trained_state: float
    """Bytes of gradients, moments and main copies if the block is trained."""
    frozen_activations: float
    """Bytes per sample kept for backward if the block is frozen and gradients pass through it."""
    trained_activations: float
    """Bytes per sample kept for backward if the block is trained."""
    down: float
    """Bytes of the slice sent to the edge; 0 where the edge has it."""
    up: float
    """Bytes of the deltas sent to the cloud if the block is trained."""
    lowest_saving: float = 0.0
    """FLOPs of input gradients that are not needed if the block is the lowest trained one, as nothing below is
    trained. A block whose norms come first still needs those inside it."""

    def __post_init__(self) -> None:
        _check(self, [field.name for field in fields(self)], ModelError, _FINITE)
        if self.lowest_saving > self.input_gradient:
            raise ModelError(
                f"lowest_saving of WidthCost must be at most input_gradient, got {self.lowest_saving} and "
                f"{self.input_gradient}"
            )
        if self.width > 1:
            raise ModelError(f"width of WidthCost must be 0 to 1, got {self.width}")


@dataclass(frozen=True)
class ModelCost:
    """Costs of a model's parts: a menu of widths for each block, stem and head, and what is always held and sent."""

    blocks: tuple[tuple[WidthCost, ...], ...]
    """Widths that each of the ``L`` blocks may have."""
    stem_forward: float
    """FLOPs per sample of what runs before and between the blocks."""
    head_forward: float
    """FLOPs per sample of final norm and head."""
    head_gradient: float
    """FLOPs per sample of the head's gradients, with respect to weights and inputs."""
    head_activations: float
    """Bytes per sample that the head keeps for backward."""
    fixed_memory: float
    """Bytes always held in training: weights of stem and head, gradients and moments of the head."""
    fixed_bytes: float
    """Bytes always sent, such as the head's deltas."""
    boundary: tuple[float, ...]
    """Bytes per sample of the hidden states before each block and, last, before the head: ``L + 1`` numbers."""

    def __post_init__(self) -> None:
        single = ["stem_forward", "head_forward", "head_gradient", "head_activations", "fixed_memory", "fixed_bytes"]
        _check(self, single, ModelError, _FINITE)
        if not self.blocks or not all(self.blocks):
            raise ModelError(f"blocks of ModelCost must be 1 or more menus of 1 or more widths, got {self.blocks}")
        for block, menu in enumerate(self.blocks):
            if len({option.width for option in menu}) < len(menu):
                widths = [option.width for option in menu]
                raise ModelError(f"widths of block {block} must differ from each other, got {widths}")
        if len(self.boundary) != len(self.blocks) + 1 or not all(0 <= size <= _FINITE for size in self.boundary):
            raise ModelError(
                f"boundary of ModelCost must be {len(self.blocks) + 1} numbers of 0 or more, one before each block and "
                f"one before the head, got {self.boundary}"
            )

    def option(self, block: int, width: float) -> WidthCost:
        """Costs of a block at a width of its menu.

        Raises:
            ModelError: the menu lacks this width.
        """
        for option in self.blocks[block]:
            if option.width == width:
                return option
        widths = [option.width for option in self.blocks[block]]
        raise ModelError(f"width {width} of block {block} must be one of {widths}")

    @property
    def whole(self) -> tuple[float, ...]:
        """Largest width of each block's menu."""
        return tuple(max(option.width for option in menu) for menu in self.blocks)


@dataclass(frozen=True)
class Budget:
    """Limits of a retraining window; ``math.inf`` is no limit."""

    flops: float = math.inf
    """FLOPs of everything that the edge computes in the window."""
    memory: float = math.inf
    """Bytes of the peak of training memory."""
    bytes: float = math.inf
    """Bytes on the wire in both directions."""

    def __post_init__(self) -> None:
        _check(self, ["flops", "memory", "bytes"], RecipeError, math.inf)


@dataclass(frozen=True)
class Cost:
    """Cost of a window in the three resources of a budget."""

    flops: float = 0.0
    memory: float = 0.0
    bytes: float = 0.0

    def within(self, budget: Budget) -> bool:
        """Return whether no limit is exceeded."""
        return self.flops <= budget.flops and self.memory <= budget.memory and self.bytes <= budget.bytes

    def after(self, spent: Cost) -> Cost:
        """Cost of ``spent`` and then this: FLOPs and bytes add up, memory is the higher of the two peaks."""
        return Cost(self.flops + spent.flops, max(self.memory, spent.memory), self.bytes + spent.bytes)


NOTHING = Cost()
"""Cost of nothing."""


@dataclass(frozen=True)
class BlockChoice:
    """Choice for one block in a window."""

    width: float
    """Kept share of the block's inner width; 0 drops the block."""
    trained: bool
    """True if the block is retrained; a dropped block cannot be."""

    def __post_init__(self) -> None:
        if self.trained and self.width == 0:
            raise ModelError("a block of width 0 is dropped and cannot be trained")


def lowest_trained(choices: Sequence[BlockChoice]) -> int:
    """Number of blocks below the lowest trained one: all of them if only the head is trained."""
    return next((block for block, choice in enumerate(choices) if choice.trained), len(choices))


def training_cost(
    model: ModelCost,
    choices: Sequence[BlockChoice],
    *,
    steps: int,
    batch: int,
    samples: int,
    cached: bool = True,
    spent: Cost | None = None,
) -> Cost:
    """Cost of retraining the chosen blocks and the head for ``steps`` steps, and of what was spent before.

    Each step computes the stem, forward and input gradient of every block from the lowest trained block ``j`` on,
    weight gradients of the trained blocks, and the head. With the cache, the blocks below ``j`` are computed once for
    all samples, and the hidden states before ``j`` are held; there is no cache for ``j = 0``, where it would save
    nothing. Without the cache they are computed in each step. With no trained block the head alone is trained, as for
    ``j = L``. 0 steps cost nothing: nothing is cached, held or sent.

    Args:
        model: costs of the parts.
        choices: width and training of each block.
        steps: optimiser steps.
        batch: samples of each step.
        samples: different samples of the window, which the cache holds.
        cached: whether the hidden states before the lowest trained block are cached.
        spent: cost of what the window has done before, such as statistics of drift and estimates of gain.

    Raises:
        ModelError: there are not as many choices as blocks, or a width is not in the block's menu.
        RecipeError: steps are negative, or batch or samples are below 1.
    """
    if len(choices) != len(model.blocks):
        raise ModelError(f"choices must be {len(model.blocks)}, one per block, got {len(choices)}")
    if steps < 0 or batch < 1 or samples < 1:
        raise RecipeError(
            f"steps must be 0 or more, batch and samples 1 or more, got steps={steps}, batch={batch}, samples={samples}"
        )
    lowest = lowest_trained(choices)
    once = 0.0
    each = model.stem_forward + model.head_forward + model.head_gradient
    memory, activations, wire = model.fixed_memory, model.head_activations, model.fixed_bytes
    for block, choice in enumerate(choices):
        option = model.option(block, choice.width)
        memory += option.weights
        wire += option.down
        if block < lowest:
            if cached:
                once += option.forward
            else:
                each += option.forward
            continue
        each += option.forward + option.input_gradient
        if choice.trained:
            each += option.weight_gradient - (option.lowest_saving if block == lowest else 0.0)
            memory += option.trained_state
            activations += option.trained_activations
            wire += option.up
        else:
            activations += option.frozen_activations
    if cached and lowest:
        once += model.stem_forward
        memory += samples * model.boundary[lowest]
    if steps == 0:
        return spent or NOTHING
    cost = Cost(samples * once + steps * (batch * each), memory + batch * activations, wire)
    return cost.after(spent or NOTHING)
