"""Axes of a block's parameters that run over its attention heads or the units of its feed-forward networks.

Which entries of a parameter belong to a head or a unit is measured by gradients, not read from names. So the rows of a
fused map, the columns of a table of position biases and the scale of a head are found alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from transformers.pytorch_utils import Conv1D

from raycloud.errors import ModelError
from raycloud.models.block_trace import LinearCall, TracedBlock, gradients, leaves_of, units_of_rows
from raycloud.models.roles import AttentionRoles, FeedForwardRoles, attention_core


@dataclass(frozen=True)
class Axis:
    """Dimension of a tensor that is divided among members: key-value groups of heads, or units."""

    name: str
    """Dotted name of a parameter below the block, or name of an argument of the block."""
    dim: int
    entries: Tensor
    """Entries of each member along the dimension, (members, entries)."""


@dataclass(frozen=True)
class Axes:
    """All the axes of one attention or one feed-forward network."""

    inputs: tuple[Axis, ...]
    """Axes of the parameters that lead in: rows of maps, biases, scales and tables of heads."""
    output: Axis
    """Axis of the weight of the map that leads out."""
    arguments: tuple[Axis, ...] = ()
    """Axes of the block's arguments, such as position biases that an earlier block made; their entries are heads, and
    a dimension of texts and heads together repeats them for each text."""
    heads: int = 0
    """Number of query heads in a group; 0 for the units of a feed-forward network."""

    @property
    def members(self) -> int:
        """Number of key-value groups of the attention, or of units of the feed-forward network."""
        return len(self.output.entries)

    @property
    def parameters(self) -> tuple[Axis, ...]:
        """Axes of all parameters."""
        return (*self.inputs, self.output)


def attention_axes(traced: TracedBlock, roles: AttentionRoles) -> Axes:
    """Find the axes of an attention, divided among key-value groups; without grouping each head is a group.

    Raises:
        ModelError: a part of the attention mixes its heads, or it has no values of its own.
    """
    refused = f"the heads before '{roles.output}' cannot be sliced"
    call = _only_call(traced, roles.output)
    leaves = [leaf for leaf in leaves_of(call.input.grad_fn) if leaf is not traced.hidden]
    columns = _head_columns(call)
    reached = [_reached(call.input, head, leaves) for head in columns]
    outputs = {id(one.output): one.path for one in traced.calls}
    paths = [outputs.get(id(leaf)) for leaf in leaves]
    values = [index for index, path in enumerate(paths) if path in roles.value]
    if not values:
        raise ModelError(f"{refused}: the block uses the keys and values of an earlier one")
    groups = _overlapping([torch.cat([head[index][-1] for index in values]) for head in reached])
    if len({len(group) for group in groups}) > 1:
        raise ModelError(f"{refused}: they are in groups of different sizes")
    arguments = {id(leaf): name for name, leaf in traced.arguments.items()}
    parameters = {id(leaf): name for name, leaf in traced.block.named_parameters()}
    into, given = list[Axis](), list[Axis]()
    for index, (leaf, path) in enumerate(zip(leaves, paths, strict=True)):
        name = path or arguments.get(id(leaf)) or parameters[id(leaf)]
        divided = dict[int, Tensor]()
        for dim in range(leaf.dim()) if path is None else (leaf.dim() - 1,):
            members = torch.stack(
                [torch.stack([reached[head][index][dim] for head in group]).any(0) for group in groups]
            )
            if (entries := _entries_of(members)) is not None:
                divided[dim] = entries
            elif not torch.equal(members, members[:1].expand_as(members)):
                raise ModelError(f"{refused}: '{name}' mixes them")
        if len(divided) > 1 or (path in roles.query and not divided and len(groups) > 1):
            raise ModelError(f"{refused}: they are mixed after '{name}'")
        for dim, entries in divided.items():
            if path is not None:
                into += _rows(traced, path, entries)
            elif id(leaf) in arguments:
                given.append(Axis(name, dim, _by_head(name, leaf.shape[dim], entries, len(columns))))
            else:
                into.append(Axis(name, dim, entries))
    entries = torch.stack([torch.cat([columns[head] for head in group]).sort().values for group in groups])
    return Axes(tuple(into), _columns(traced, roles.output, entries), tuple(given), len(groups[0]))


def feed_forward_axes(traced: TracedBlock, roles: FeedForwardRoles) -> Axes:
    """Find the axes of a feed-forward network, divided among its units.

    Raises:
        ModelError: a map of the network runs more than once.
    """
    call, into = _only_call(traced, roles.down), list[Axis]()
    for path in roles.inputs:
        units = units_of_rows(call, _only_call(traced, path).output)
        if units is None:
            raise ModelError(f"the units before '{roles.down}' cannot be sliced: they are mixed after '{path}'")
        into += _rows(traced, path, units.argsort(stable=True).view(roles.units, -1))
    return Axes(tuple(into), _columns(traced, roles.down, torch.arange(roles.units).view(-1, 1)))


def _only_call(traced: TracedBlock, path: str) -> LinearCall:
    found = [call for call in traced.calls if call.path == path]
    if len(found) != 1:
        raise ModelError(f"'{path}' runs {len(found)} times in its block; what it feeds cannot be sliced")
    return found[0]


def _head_columns(call: LinearCall) -> list[Tensor]:
    """Columns of the input of an attention output that come from each head, in the order of heads.

    Gradients of two weighted sums of the input, one with its columns also weighted by their numbers, have this number
    as their ratio at the attention's own output.
    """
    edge = GradientEdge(attention_core(call).output, 0)
    weights = 0.5 + torch.rand(call.input.shape, generator=torch.Generator().manual_seed(3)).to(call.input)
    numbers = torch.arange(1, call.input.shape[-1] + 1).to(weights)
    plain, numbered = (gradients(call.input, weights * factor, [edge])[0] for factor in (1, numbers))
    assert plain is not None and numbered is not None
    ratio = numbered / plain
    found = ratio.round()
    # The attention's output is (..., tokens, size of a head): each of its vectors is one head's.
    heads = found.reshape(-1, found.shape[-1]).sort(-1).values.unique(dim=0)
    exact = bool((ratio - found).abs().max() < 0.2)  # False where it is not a number
    if not exact or not torch.equal(heads.flatten().sort().values, numbers):
        raise ModelError(f"the heads before '{call.path}' cannot be sliced: something mixes them before it")
    return list(heads.long().cpu() - 1)


def _reached(output: Tensor, columns: Tensor, leaves: Sequence[Tensor]) -> list[list[Tensor]]:
    """Entries of each leaf, by dimension, that some columns of an output depend on; True where they do."""
    weights = torch.zeros_like(output)
    random = torch.rand((*output.shape[:-1], len(columns)), generator=torch.Generator().manual_seed(4))
    weights[..., columns] = 0.5 + random.to(output)
    found = []
    for leaf, slope in zip(leaves, gradients(output, weights, leaves), strict=True):
        some = torch.zeros_like(leaf, dtype=torch.bool) if slope is None else slope != 0
        found.append(
            [
                some.transpose(0, dim).flatten(1).any(1).cpu() if leaf.dim() > 1 else some.cpu()
                for dim in range(leaf.dim())
            ]
        )
    return found


def _overlapping(sets: Sequence[Tensor]) -> list[list[int]]:
    """Group sets, given as (entries,) of True and False, so that sets of different groups have nothing in common."""
    groups: list[tuple[list[int], Tensor]] = []
    for index, one in enumerate(sets):
        members, union, apart = [index], one, []
        for group, held in groups:
            if bool((held & one).any()):
                members, union = [*group, *members], union | held
            else:
                apart.append((group, held))
        groups = [*apart, (members, union)]
    return sorted(sorted(members) for members, _ in groups)


def _entries_of(members: Tensor) -> Tensor | None:
    """Entries of each member, (members, entries), of a table (members, size); None if they do not divide the size."""
    counts = members.sum(1)
    if len(members) == 1 or bool((members.sum(0) > 1).any()) or counts.unique().numel() > 1 or not bool(counts[0]):
        return None
    return members.nonzero()[:, 1].view(len(members), -1)


def _by_head(name: str, size: int, entries: Tensor, heads: int) -> Tensor:
    """Heads of each member, of an argument that has one entry for each head, or for each text and head.

    Raises:
        ModelError: the argument is laid out in another way.
    """
    found = torch.stack([(member % heads).unique() for member in entries])
    laid_out = [(torch.arange(size) % heads).unsqueeze(1).eq(member).any(1).nonzero().flatten() for member in found]
    if size % heads or not torch.equal(torch.stack(laid_out), entries):
        raise ModelError(f"the heads in the argument '{name}' are laid out in an unknown way; they cannot be sliced")
    return found


def _rows(traced: TracedBlock, path: str, entries: Tensor) -> list[Axis]:
    """Axes of the outputs of a linear map."""
    module = traced.block.get_submodule(path)
    axes = [Axis(f"{path}.weight", 1 if isinstance(module, Conv1D) else 0, entries)]
    return [*axes, Axis(f"{path}.bias", 0, entries)] if getattr(module, "bias", None) is not None else axes


def _columns(traced: TracedBlock, path: str, entries: Tensor) -> Axis:
    """Axis of the inputs of a linear map."""
    return Axis(f"{path}.weight", 0 if isinstance(traced.block.get_submodule(path), Conv1D) else 1, entries)
