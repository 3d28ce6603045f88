"""Slices of a cloud's model for an edge: narrower blocks, and blocks left out, whose changes go back by index."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.block_trace import block_calls
from raycloud.models.chain import block_list_of
from raycloud.models.frozen_prefix import FrozenPrefix
from raycloud.models.roles import roles_of
from raycloud.models.shell import StandIn
from raycloud.models.surgery.slicing import SliceIndex, slice_block


@dataclass(frozen=True)
class SlicedModel:
    """Model of an edge, and where its parameters lie in the cloud's."""

    model: PreTrainedModel
    index: Mapping[str, Mapping[int, Tensor]]
    """Entries that are kept of each parameter that is not kept whole: by name and dimension, as in an update."""
    dropped: tuple[int, ...]
    """Numbers of the blocks that hand on their input."""


def slice_model(
    model: PreTrainedModel, indices: Mapping[int, SliceIndex | None], inputs: Mapping[str, Tensor]
) -> SlicedModel:
    """Copy of a model with slices of some blocks; the model itself is left as it is.

    The width of the hidden states stays, so every other block and the head are as they were.

    Args:
        model: the cloud's model.
        indices: what is kept of blocks, by number; None leaves a block out.
        inputs: arguments of the model's forward, on which slices are checked.

    Raises:
        ModelError: there is no such block, or it cannot be sliced so.
    """
    blocks = block_list_of(model).blocks
    paths = list(blocks)
    if unknown := [number for number in indices if not 0 <= number < len(paths)]:
        raise ModelError(f"block {unknown[0]} is to be sliced; allowed: 0 to {len(paths) - 1}")
    sliced = {paths[number]: blocks[paths[number]] for number, index in indices.items() if index is not None}
    made, index = copy.deepcopy(model), dict[str, Mapping[int, Tensor]]()
    if sliced:
        calls, roles = block_calls(model, blocks, inputs), roles_of(model, sliced)
        for number, kept in indices.items():
            if kept is not None:
                path = paths[number]
                part = slice_block(blocks[path], calls[path], roles[path], kept)
                made.set_submodule(path, part.module)
                index |= {f"{path}.{name}": {one.dim: one.entries} for name, one in part.kept.items()}
    dropped = tuple(sorted(number for number, kept in indices.items() if kept is None))
    for number, size in _tuple_sizes(blocks, dropped, model, inputs).items():
        made.set_submodule(paths[number], _PassingBlock(made.get_submodule(paths[number]), size))
    return SlicedModel(made, index, dropped)


def _tuple_sizes(
    blocks: Mapping[str, nn.Module], numbers: Sequence[int], model: PreTrainedModel, inputs: Mapping[str, Tensor]
) -> dict[int, int]:
    """Sizes of the tuples that blocks return, 0 for hidden states alone.

    Raises:
        ModelError: a block hands on more than hidden states.
    """
    if not numbers:
        return {}
    prefix = FrozenPrefix(model, len(blocks))
    prefix.record(inputs)
    sizes = dict[int, int]()
    for number in numbers:
        path = list(blocks)[number]
        output = prefix.call.found[path]
        if isinstance(output, tuple) and any(one is not None for one in output[1:]):
            raise ModelError(f"block {number} hands on more than hidden states; allowed to be left out: other blocks")
        sizes[number] = prefix.tuple_sizes[path]
    return sizes


class _PassingBlock(StandIn):
    """Block that hands on its hidden states; it owns no weights."""

    def __init__(self, block: nn.Module, tuple_size: int) -> None:
        plain = {name: value for name, value in vars(block).items() if isinstance(value, (int, float, str))}
        super().__init__(SimpleNamespace(**plain))  # the block's weights are freed
        self._tuple_size = tuple_size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states, in the form of the block's output."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (self._tuple_size - 1)) if self._tuple_size else hidden
