"""Slices of a block: only some of its attention heads and of the units of its feed-forward network, as a module.

A slice computes what the block would with the weights of everything else set to zero, and it is checked that it does.
The width of the hidden states stays, so a slice takes the block's place in its model. Its parameters are its own; each
knows where its entries lie in the block's.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from raycloud.errors import ModelError
from raycloud.models.block_trace import (
    BlockCall,
    configurations,
    measuring_copy,
    measuring_dtype,
    named_arguments,
    tensors_in,
    through_softmax,
    trace_block,
)
from raycloud.models.roles import BlockRoles
from raycloud.models.surgery.axes import Axes, Axis, attention_axes, feed_forward_axes

_COUNTS = re.compile(r"(^|_)(n|num)_.*head")
"""Names of attributes that hold numbers of heads."""
_WIDTHS = re.compile(r"all_head_size|embed_dim|hidden_size|inner_dim|split_size|d_model")
"""Names of attributes that hold the width of all heads together."""
_WHOLE = "raycloud_whole"
"""Attribute of the selected heads of an argument that holds the whole argument."""
_EQUAL = 1e-5
"""Relative error of a slice that is rounding: some blocks compute a part in ``float32`` whatever their weights are."""


@dataclass(frozen=True)
class SliceIndex:
    """Parts that a slice keeps of a block, in ascending order; None, or nothing said, for all of it."""

    groups: Sequence[Sequence[int] | None] = ()
    """Key-value groups of each attention of the block; without grouping, its heads."""
    units: Sequence[Sequence[int] | None] = ()
    """Units of each feed-forward network of the block."""


@dataclass(frozen=True)
class Kept:
    """Entries of a block's parameter that its slice keeps."""

    dim: int
    entries: Tensor
    """Entries along the dimension, ascending."""


@dataclass(frozen=True)
class SlicedBlock:
    """Slice of a block."""

    module: nn.Module
    """Module of the block's class with parameters of its own."""
    kept: Mapping[str, Kept]
    """Entries that the slice keeps of each parameter that it does not keep whole, by name below the block."""


def slice_block(block: nn.Module, call: BlockCall, roles: BlockRoles, index: SliceIndex) -> SlicedBlock:
    """Make a slice of a block; the block itself is left as it is.

    Args:
        block: a block of a model.
        call: arguments of a call of it, on which the slice is checked.
        roles: roles of its linear maps.
        index: what the slice keeps.

    Raises:
        ModelError: the index names what the block does not have, the block cannot be sliced so, or the slice does not
            compute what the block would with everything else zero.
    """
    parts = _parts(block, call, roles, index)
    error: ModelError | None = None
    for own_configuration in (False, True):  # few blocks read numbers of heads from their configuration
        made = _sliced_copy(block, parts, own_configuration)
        try:
            _check(block, made, call, parts)
        except ModelError as raised:
            error = error or raised
            continue
        kept = {
            axis.name: Kept(axis.dim, _kept_entries(block.get_parameter(axis.name).shape[axis.dim], axis, part.members))
            for part in parts
            for axis in part.axes.parameters
        }
        return SlicedBlock(made, kept)
    assert error is not None
    raise error


def scatter_deltas(block: nn.Module, sliced: SlicedBlock, deltas: Mapping[str, Tensor]) -> None:
    """Add changes of a slice's parameters to the block's, in place, where the slice's entries lie.

    Args:
        block: the block that the slice was made of, or an equal one.
        sliced: the slice.
        deltas: changes by name of parameter, in the shapes of the slice's parameters.
    """
    with torch.no_grad():
        for name, delta in deltas.items():
            parameter, kept = block.get_parameter(name), sliced.kept.get(name)
            delta = delta.to(parameter)
            if kept is None:
                parameter.add_(delta)
            else:
                parameter.index_add_(kept.dim, kept.entries.to(parameter.device), delta)


@dataclass(frozen=True)
class _Part:
    """Attention or feed-forward network of which only some members are kept."""

    axes: Axes
    members: Tensor
    attention: str | None = None
    """Path of the module with all the maps of an attention; None for a feed-forward network."""


def _parts(block: nn.Module, call: BlockCall, roles: BlockRoles, index: SliceIndex) -> list[_Part]:
    if roles.fused_experts and any(units is not None for units in index.units):
        raise ModelError(
            f"'{roles.fused_experts[0]}' holds the matrices of several experts; units of such a block cannot be sliced"
        )
    for name, wanted, has in (
        ("groups", index.groups, len(roles.attentions)),
        ("units", index.units, len(roles.feed_forwards)),
    ):
        if len(wanted) > has:
            raise ModelError(f"{name} are given for {len(wanted)} parts of a {type(block).__name__}; it has {has}")
    traced, parts = trace_block(block, call), list[_Part]()
    for attention, groups in zip(roles.attentions, index.groups, strict=False):
        if groups is not None:
            axes = attention_axes(traced, attention)
            parent = _common_parent((*attention.inputs, attention.output))
            parts.append(_Part(axes, _members("groups", groups, axes.members), parent))
    for network, units in zip(roles.feed_forwards, index.units, strict=False):
        if units is not None:
            axes = feed_forward_axes(traced, network)
            parts.append(_Part(axes, _members("units", units, axes.members)))
    return parts


def _members(name: str, kept: Sequence[int], total: int) -> Tensor:
    if not kept or list(kept) != sorted({member for member in kept if 0 <= member < total}):
        raise ModelError(f"{name} is {str(list(kept))[:60]}; allowed: at least one of 0 to {total - 1}, ascending")
    return torch.tensor(list(kept))


def _kept_entries(size: int, axis: Axis, members: Tensor) -> Tensor:
    """Entries along an axis that stay: those of kept members, and those of no member."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[axis.entries.flatten()] = False
    stays[axis.entries[members].flatten()] = True
    return stays.nonzero().flatten()


def _sliced_copy(block: nn.Module, parts: Sequence[_Part], own_configuration: bool) -> nn.Module:
    shared = {} if own_configuration else {id(config): config for config in configurations(block)}
    made = copy.deepcopy(block, shared)
    selections: dict[str, _Selection] = {}
    for part in parts:
        axes, members = part.axes, part.members
        for axis in axes.parameters:
            _slice_parameter(made, axis, members)
        for axis in axes.arguments:
            heads = axes.members * axes.heads
            selections[axis.name] = _Selection(axis.dim, heads, axis.entries[members].flatten())
        if part.attention is not None:
            width = axes.output.entries.shape[1]
            sizes = {
                kind: (axes.members * each, len(members) * each)
                for kind, each in (("heads", axes.heads), ("groups", 1), ("width", width))
            }
            _set_sizes(made.get_submodule(part.attention), sizes, own_configuration)
    if selections:
        made.register_forward_pre_hook(partial(_select_arguments, selections), with_kwargs=True)
        made.register_forward_hook(_restore_arguments)
    return made


def _slice_parameter(made: nn.Module, axis: Axis, members: Tensor) -> None:
    path, _, name = axis.name.rpartition(".")
    module = made.get_submodule(path)
    whole: nn.Parameter = getattr(module, name)
    entries = _kept_entries(whole.shape[axis.dim], axis, members).to(whole.device)
    part = nn.Parameter(whole.detach().index_select(axis.dim, entries), requires_grad=whole.requires_grad)
    setattr(module, name, part)
    if name != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = part.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = part.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = part.shape


def _common_parent(paths: Sequence[str]) -> str:
    parents = [path.split(".")[:-1] for path in paths]
    depth = 0
    while all(len(parent) > depth and parent[depth] == parents[0][depth] for parent in parents):
        depth += 1
    return ".".join(parents[0][:depth])


def _set_sizes(parent: nn.Module, sizes: Mapping[str, tuple[int, int]], configuration: bool) -> None:
    """Set the attributes that hold numbers of heads and widths of all heads to those of a slice."""
    owners: list[Any] = list(parent.modules())
    if configuration:
        owners += configurations(parent)
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if not isinstance(value, int) or isinstance(value, bool) or isinstance(owner, (nn.Linear, Conv1D)):
                continue
            if _COUNTS.search(name):
                kind = "groups" if "key_value" in name or "kv" in name else "heads"
            elif _WIDTHS.search(name) and not isinstance(owner, PretrainedConfig):
                kind = "width"
            else:
                continue
            if value == sizes[kind][0]:
                setattr(owner, name, sizes[kind][1])


@dataclass(frozen=True)
class _Selection:
    """Heads that are kept of an argument of a block."""

    dim: int
    heads: int
    """Number of heads before; the dimension holds them once, or once for each text."""
    kept: Tensor

    def of(self, value: Tensor) -> Tensor:
        """Select the kept heads, and remember the whole argument."""
        entries = (torch.arange(value.shape[self.dim]) % self.heads).unsqueeze(1).eq(self.kept).any(1).nonzero()
        part = value.index_select(self.dim, entries.flatten().to(value.device))
        setattr(part, _WHOLE, value)
        return part


def _select_arguments(
    selections: Mapping[str, _Selection], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Select the kept heads of a block's arguments, as a hook before its forward."""
    named = named_arguments(block, args, kwargs)
    chosen = {
        name: choice.of(named[name]) for name, choice in selections.items() if isinstance(named.get(name), Tensor)
    }
    return (), {**named, **chosen}


def _restore_arguments(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Hand on the whole of an argument that a block returns for the next one, as a hook behind its forward."""
    if not isinstance(output, tuple):
        return output
    return tuple(getattr(one, _WHOLE, one) for one in output)


def _check(block: nn.Module, sliced: nn.Module, call: BlockCall, parts: Sequence[_Part]) -> None:
    """Check a slice against the block with the outputs of everything else zero.

    Raises:
        ModelError: it does not run, hands on something else, or its hidden states differ.
    """
    whole, part = measuring_copy(block), measuring_copy(sliced)
    kind, dtype = type(block).__name__, measuring_dtype(block)
    with torch.no_grad():
        for one in parts:
            axis = one.axes.output
            weight = whole.get_parameter(axis.name)
            gone = torch.ones(weight.shape[axis.dim], dtype=torch.bool)
            gone[_kept_entries(len(gone), axis, one.members)] = False
            weight.index_fill_(axis.dim, gone.nonzero().flatten().to(weight.device), 0)
    with torch.enable_grad():
        arguments = call.to(dtype)
        given = len(tensors_in(list(arguments.values())))
        wanted = tensors_in(whole(**arguments))
        if len(tensors_in(list(arguments.values()))) != given and any(one.attention is not None for one in parts):
            raise ModelError(f"the heads of a {kind} cannot be sliced: later blocks use its keys and values")
        try:
            found = tensors_in(part(**call.to(dtype)))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as raised:
            why = (str(raised).splitlines() or [type(raised).__name__])[0][:120]
            raise ModelError(f"a {kind} cannot be sliced: {why}") from raised
    for before, after in zip(wanted[1:], found[1:], strict=True):
        # Attention weights are for the reader; anything else goes on to the next block.
        if before.shape != after.shape and not through_softmax(before.grad_fn):
            raise ModelError(
                f"the heads of a {kind} cannot be sliced: later blocks use a tensor {tuple(before.shape)} of all"
            )
    error = float((wanted[0] - found[0]).detach().norm() / wanted[0].detach().norm())
    if not error <= _EQUAL:
        raise ModelError(f"a {kind} cannot be sliced: its slice is off by {error:.1e}")
