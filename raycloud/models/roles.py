"""Roles of the linear maps of a block, found in a traced forward without knowing the model's family or its names.

An attention output reads a softmax of products of earlier maps: the queries, whose tokens stay apart, and the keys;
the values are the maps that the softmax weights. The last map of a feed-forward network reads the outputs of one or
two maps of hidden states element by element. Everything else has no role.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.autograd.graph import Node
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.block_trace import (
    LINEAR,
    LinearCall,
    TracedBlock,
    block_calls,
    gradients,
    is_odd,
    leaves_of,
    nodes_of,
    through_softmax,
    trace_block,
    units_of_rows,
)
from raycloud.models.chain import block_list_of
from raycloud.models.twin import twin_model

Role = Literal["query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down"]
"""Role of a linear map in a block; a fused map has several."""
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class AttentionRoles:
    """Linear maps of one attention of a block, by dotted path below the block.

    A fused map is in several roles. A role has several maps where its vectors are put together from them.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    """Empty, as is ``value``, where a block uses the keys and values of an earlier one."""
    value: tuple[str, ...]
    output: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Maps of queries, keys and values, each once."""
        return tuple(dict.fromkeys((*self.query, *self.key, *self.value)))


@dataclass(frozen=True)
class FeedForwardRoles:
    """Linear maps of one feed-forward network of a block, by dotted path below the block."""

    up: tuple[str, ...]
    gate: tuple[str, ...]
    """Maps that go through the activation of a gated network; empty without gate, and the same as ``up`` if fused."""
    down: str
    units: int
    """Width of the input of ``down``."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Maps of the hidden states, each once."""
        return tuple(dict.fromkeys((*self.gate, *self.up)))


@dataclass(frozen=True)
class BlockRoles:
    """Roles of the linear maps of one block."""

    attentions: tuple[AttentionRoles, ...]
    """Attentions in the order of execution; a decoder with an encoder has two in a block."""
    feed_forwards: tuple[FeedForwardRoles, ...]
    """Feed-forward networks of linear maps; experts in fused tensors are not among them."""
    other: tuple[str, ...]
    """Linear maps without a role."""
    fused_experts: tuple[str, ...]
    """Parameters that hold the matrices of several experts."""

    def paths(self, role: Role) -> tuple[str, ...]:
        """Paths of the maps with a role, in the order of execution."""
        found: list[str] = []
        for attention in self.attentions:
            named = {
                "query": attention.query,
                "key": attention.key,
                "value": attention.value,
                "attention_output": (attention.output,),
            }
            found += named.get(role, ())
        for network in self.feed_forwards:
            found += {"ffn_gate": network.gate, "ffn_up": network.up, "ffn_down": (network.down,)}.get(role, ())
        return tuple(dict.fromkeys(found))


def roles_of(model: PreTrainedModel, blocks: Mapping[str, nn.Module]) -> dict[str, BlockRoles]:
    """Find the roles of the linear maps of blocks of a model, by the paths of the blocks.

    Raises:
        ModelError: the model or a block cannot be traced, or the maps of an attention cannot be told apart.
    """
    calls = block_calls(model, blocks)
    return {path: roles_in(trace_block(block, calls[path])) for path, block in blocks.items()}


def role_paths(config: PretrainedConfig) -> dict[Role, tuple[str, ...]]:
    """Paths below a block of the maps with each role, of a text model's configuration, from a small twin of it.

    No weights are needed. Blocks of several kinds count together; a map that has a role in some of them has it in all.

    Raises:
        ModelError: the twin cannot be built or traced, or a map's role differs between blocks.
    """
    with torch.random.fork_rng(devices=[]):  # making the twin seeds the generator
        model = twin_model(config.get_text_config(), "eager")
    blocks = block_list_of(model).blocks
    found = roles_of(model, blocks)
    paths: dict[Role, tuple[str, ...]] = {}
    for role in ROLES:
        held = {path: set(one.paths(role)) for path, one in found.items()}
        paths[role] = tuple(dict.fromkeys(name for path in held for name in found[path].paths(role)))
        for name in paths[role]:
            for path, block in blocks.items():
                if name not in held[path] and any(name == own for own, _ in block.named_modules()):
                    raise ModelError(
                        f"'{name}' of a '{config.model_type}' model is {role} in some blocks only; name maps, not roles"
                    )
    return paths


def roles_in(traced: TracedBlock) -> BlockRoles:
    """Find the roles of the linear maps of a traced block.

    Raises:
        ModelError: the maps of an attention cannot be told apart.
    """
    attentions, networks = list[AttentionRoles](), list[FeedForwardRoles]()
    for call in traced.calls:
        node = call.input.grad_fn
        if node is None or traced.reads_hidden(node):
            continue  # the first map of a chain
        if through_softmax(node):
            attentions.append(_attention(traced, call))
        elif (network := _feed_forward(traced, call)) is not None:
            networks.append(network)
    named = {path for one in attentions for path in (*one.inputs, one.output)}
    named |= {path for one in networks for path in (*one.inputs, one.down)}
    linear = [path for path, module in traced.block.named_modules() if isinstance(module, LINEAR)]
    return BlockRoles(
        attentions=tuple(dict.fromkeys(attentions)),
        feed_forwards=tuple(dict.fromkeys(networks)),
        other=tuple(path for path in linear if path not in named),
        fused_experts=tuple(stacked_matrices(traced.block)),
    )


@dataclass(frozen=True)
class AttentionCore:
    """Places of one attention in the graph."""

    output: Node
    """Node whose output is the attention-weighted sum of values; its first axis, or first two, are texts and heads."""
    value: Node | None
    scores: tuple[tuple[Node | None, Node | None], ...]
    """Both factors of each product of queries and keys."""


def attention_core(call: LinearCall) -> AttentionCore:
    """Places of the attention that an attention output reads.

    Raises:
        ModelError: there is not exactly one.
    """
    found: list[AttentionCore] = []
    for node in nodes_of(call.input.grad_fn):
        if "ScaledDotProduct" in node.name():
            query, key, value = (before for before, _ in node.next_functions[:3])
            found.append(AttentionCore(node, value, ((query, key),)))
        elif (factors := _factors(node)) is not None:
            weights = [factor for factor in factors if through_softmax(factor)]
            if len(weights) != 1:
                continue
            (value,) = (factor for factor in factors if factor is not weights[0])
            products = (_factors(one) for one in nodes_of(weights[0]))
            found.append(AttentionCore(node, value, tuple(one for one in products if one)))
    if len(found) != 1:
        raise ModelError(f"'{call.path}' reads {len(found)} attentions; its roles are not known")
    return found[0]


def _attention(traced: TracedBlock, call: LinearCall) -> AttentionRoles:
    core = attention_core(call)
    query: set[str] = set()
    key: set[str] = set()
    for one, other in core.scores:
        first, second = traced.feeding(one), traced.feeding(other)
        if _keeps_tokens_apart(call, [source for source in second if source not in first]):
            first, second = second, first
        elif not (
            _keeps_tokens_apart(call, [source for source in first if source not in second])
            or {source.path for source in first} == {source.path for source in second}
        ):
            continue  # such as a product with positions
        query |= {source.path for source in first}
        key |= {source.path for source in second}
    value = {source.path for source in traced.feeding(core.value)}
    if not query or bool(key) != bool(value):
        missing = next(name for name, found in (("query", query), ("key", key), ("value", value)) if not found)
        raise ModelError(f"no linear map makes the {missing} of the attention before '{call.path}'")
    if query & key and query != key:
        raise ModelError(
            f"'{min(query & key)}' makes both queries and keys of the attention before '{call.path}', and other maps "
            "one of them; its roles are not known"
        )
    order = list(dict.fromkeys(source.path for source in traced.calls))
    q, k, v = (tuple(sorted(found, key=order.index)) for found in (query, key, value))
    return AttentionRoles(q, k, v, call.path)


def _keeps_tokens_apart(call: LinearCall, sources: Iterable[LinearCall]) -> bool:
    """Tell whether a token of the attention's output depends on no other token of one of the sources."""
    tokens = call.input[..., 0].numel()
    aligned = [source for source in sources if source.output[..., 0].numel() == tokens]
    # The last token of a text sees the others whether or not the attention is causal.
    weights = torch.zeros_like(call.input).view(tokens, -1)
    weights[-1] = torch.rand(weights.shape[-1], generator=torch.Generator().manual_seed(2)).to(weights)
    found = gradients(call.input, weights.view_as(call.input), [source.output for source in aligned]) if aligned else []
    return any(one is not None and not bool(one.reshape(tokens, -1)[:-1].any()) for one in found)


def _feed_forward(traced: TracedBlock, call: LinearCall) -> FeedForwardRoles | None:
    sources, leaves = traced.feeding(call.input.grad_fn), leaves_of(call.input.grad_fn)
    if any(leaf is argument for leaf in leaves for argument in traced.arguments.values()):
        return None
    widths = {call.output.shape[-1], *(source.input.shape[-1] for source in sources)}
    if widths != {traced.width} or not all(_follows_hidden(traced, source) for source in sources):
        return None
    units = [units_of_rows(call, source.output) for source in sources]
    count = call.input.shape[-1]
    if any(one is None or len(one.unique()) != count for one in units):
        return None
    rows = [len(one) // count for one in units if one is not None]
    if rows == [2]:  # gate and up in one map
        return FeedForwardRoles((sources[0].path,), (sources[0].path,), call.path, count)
    if rows == [1]:  # without activation it is one map of low rank
        return None if is_odd(traced, call, sources[0]) else FeedForwardRoles((sources[0].path,), (), call.path, count)
    if rows != [1, 1]:
        return None
    gates = tuple(source.path for source in sources if not is_odd(traced, call, source))
    ups = tuple(source.path for source in sources if source.path not in gates)
    return FeedForwardRoles(ups, gates, call.path, count) if len(gates) < 2 else None


def _follows_hidden(traced: TracedBlock, call: LinearCall) -> bool:
    node = call.input.grad_fn
    return traced.reads_hidden(node) or bool(traced.feeding(node))


def _factors(node: Node) -> tuple[Node | None, Node | None] | None:
    """Both factors of a product of matrices."""
    name, edges = node.name(), [before for before, _ in node.next_functions]
    if name.startswith(("BmmBackward", "MmBackward")):
        return edges[0], edges[1]
    return (edges[1], edges[2]) if name.startswith(("BaddbmmBackward", "AddbmmBackward")) else None


def stacked_matrices(block: nn.Module) -> Iterable[str]:
    """Paths below a block of the parameters that hold the matrices of several experts."""
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            counts = {value for key, value in vars(module).items() if "expert" in key and isinstance(value, int)}
            if parameter.dim() == 3 and parameter.shape[0] in counts:
                yield f"{path}.{name}" if path else name
