"""Trace of a model's own forward: how its blocks are called, and what runs before the first of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.chain import BlockChain

Shape = tuple[int | str, ...]
"""Shape of a tensor; ``B`` and ``T`` stand for the numbers of texts and of tokens."""


@dataclass(frozen=True)
class TracedStructure:
    """Structure of a model, as found by tracing its forward."""

    chain: BlockChain
    tuple_size: int
    """0 if a block returns its hidden states, otherwise the size of the tuple that they are the first of."""
    token_leaves: Mapping[str, Shape]
    """Modules with weights that run before block 0 and depend on token ids, by path, with the shapes of their outputs:
    only the part with the embedding has them."""
    causal: bool
    """True if a token does not change the outputs for earlier ones."""
    block_arguments: tuple[dict[str, Tensor], ...] = field(repr=False)
    """Tensors that each block was called with, beside hidden states and cache, by argument."""


@dataclass
class _Call:
    """Call of a block."""

    hidden: Tensor
    others: dict[str, Tensor]


@torch.no_grad()
def trace(model: PreTrainedModel, chain: BlockChain, ids: Tensor) -> TracedStructure:
    """Trace forwards of a model over token ids (B, T).

    Raises:
        ModelError: blocks are not called once each with hidden states (B, T, d).
    """
    kind, total = model.config.model_type, len(chain.blocks)
    changed, flipped = ids.clone(), ids.flip(1)
    changed[:, -1] -= 1
    with _recorded(model, chain) as record:
        outputs = final_of(model(input_ids=ids))
        calls, leaves = list(record.calls), dict(record.leaves)
        record.clear()
        other = final_of(model(input_ids=changed))
        record.clear()
        model(input_ids=flipped)
        again = record.leaves
    if len(calls) != total:
        raise ModelError(
            f"a '{kind}' model makes {len(calls)} calls of its {total} blocks in a forward; blocks that run more or "
            "less than once cannot be cut"
        )
    if any(call.hidden.shape[:-1] != ids.shape for call in calls):
        dimensions = calls[0].hidden.dim()
        raise ModelError(
            f"a '{kind}' model hands its blocks hidden states of {dimensions} dimensions, which are not (texts, "
            "tokens, width)"
        )
    token_leaves = {
        name: _symbolic(output.shape, ids) for name, output in leaves.items() if not torch.equal(output, again[name])
    }
    return TracedStructure(
        chain=chain,
        tuple_size=record.tuple_size,
        token_leaves=token_leaves,
        causal=torch.allclose(other[:, :-1], outputs[:, :-1], rtol=1e-4, atol=1e-4),
        block_arguments=tuple(call.others for call in calls),
    )


def final_of(output: Any) -> Tensor:
    """Logits of a model's output, or the final hidden states of a model without a head."""
    logits: Tensor | None = getattr(output, "logits", None)
    final: Tensor = output.last_hidden_state if logits is None else logits
    return final


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Hidden states of a block's call, and the tensors of its other arguments by name, without the cache."""
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden = next(name for name, value in named.items() if isinstance(value, Tensor))
    others = {name: value for name, value in named.items() if name not in (hidden, "past_key_values", "cache_params")}
    return named[hidden], dict(_tensors(others, ""))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _tensors(one, f"{name}.{key}" if name else str(key))
    elif isinstance(value, tuple | list):
        for index, one in enumerate(value):
            yield from _tensors(one, f"{name}[{index}]")


def _symbolic(shape: torch.Size, ids: Tensor) -> Shape:
    names = {0: ("B", ids.shape[0]), 1: ("T", ids.shape[1])}
    return tuple(names[at][0] if at in names and size == names[at][1] else size for at, size in enumerate(shape))


class _Record:
    """Record of the current forward."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.leaves: dict[str, Tensor] = {}
        self.tuple_size = 0

    def clear(self) -> None:
        self.calls, self.leaves = [], {}

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, others = arguments_of(module, args, kwargs)
        self.calls.append(_Call(hidden, {name: tensor.detach().clone() for name, tensor in others.items()}))

    def ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.tuple_size = len(output) if isinstance(output, tuple) else 0

    def leaf(self, name: str) -> Any:
        def ran(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and not self.calls:
                self.leaves[name] = output.detach().clone()

        return ran


@contextmanager
def _recorded(model: nn.Module, chain: BlockChain) -> Iterator[_Record]:
    record, hooks = _Record(), list[RemovableHandle]()
    for block in chain.blocks:
        hooks.append(block.register_forward_pre_hook(record.begins, with_kwargs=True))
        hooks.append(block.register_forward_hook(record.ends))
    for name, module in model.named_modules():
        leaf = not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))
        if leaf and not name.startswith(chain.path + "."):
            hooks.append(module.register_forward_hook(record.leaf(name)))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()
