"""Cost of a block and of its slices: parameters and operations, as functions of how many heads and units are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from raycloud.models.block_trace import LINEAR
from raycloud.models.surgery.axes import Axes


@dataclass(frozen=True)
class MemberCost:
    """Cost of one key-value group of an attention with its query heads, or of one unit of a feed-forward network."""

    members: int
    """Number of groups or units of the whole block."""
    parameters: int
    weights: int
    """Parameters that are entries of weights of linear maps: one multiplication and addition for each token."""
    attention_width: int
    """Width of the values of the query heads of a group; 0 for a unit."""


@dataclass(frozen=True)
class BlockCost:
    """Cost of a block."""

    parameters: int
    weights: int
    """Entries of the weights of its linear maps; experts in fused tensors are not counted."""
    parts: tuple[MemberCost, ...]
    """Attentions and feed-forward networks that can be sliced."""


def block_cost(block: nn.Module, axes: Sequence[Axes]) -> BlockCost:
    """Cost of a block whose attentions and feed-forward networks have these axes."""
    maps = {f"{path}.weight": module for path, module in block.named_modules() if isinstance(module, LINEAR)}
    sizes = {name: parameter.shape for name, parameter in block.named_parameters()}

    def cost(one: Axes) -> MemberCost:
        entries = {
            axis.name: sizes[axis.name].numel() // sizes[axis.name][axis.dim] * axis.entries.shape[1]
            for axis in one.parameters
        }
        weights = sum(count for name, count in entries.items() if name in maps)
        attention_width = one.output.entries.shape[1] if one.heads else 0
        return MemberCost(one.members, sum(entries.values()), weights, attention_width)

    return BlockCost(
        parameters=sum(map(math.prod, sizes.values())),
        weights=sum(math.prod(sizes[name]) for name in maps),
        parts=tuple(map(cost, axes)),
    )


def sliced_parameters(cost: BlockCost, kept: Sequence[int]) -> int:
    """Number of parameters of a slice that keeps this many members of each part."""
    return cost.parameters - sum(
        _dropped(part, count) * part.parameters for part, count in zip(cost.parts, kept, strict=True)
    )


def forward_flops(cost: BlockCost, kept: Sequence[int], seen: float) -> float:
    """Floating-point operations for one token in a forward of a slice.

    Linear maps and attention are counted, with keys as wide as values; norms and activations are not.

    Args:
        cost: cost of the block.
        kept: number of members that the slice keeps of each part.
        seen: number of tokens that a token attends to, as the kernel computes it: all of a text, unless the kernel
            leaves out those that a mask hides.
    """
    weights = cost.weights - sum(
        _dropped(part, count) * part.weights for part, count in zip(cost.parts, kept, strict=True)
    )
    attention = sum(count * part.attention_width for part, count in zip(cost.parts, kept, strict=True))
    return 2 * weights + 4 * seen * attention


def _dropped(part: MemberCost, kept: int) -> int:
    if not 0 < kept <= part.members:
        raise ValueError(f"a slice keeps from 1 to {part.members} members, not {kept}")
    return part.members - kept
