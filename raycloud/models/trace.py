"""Trace of a model's own forward: how its blocks are called, and which modules run before and after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.block_trace import named_arguments
from raycloud.models.chain import find_chain
from raycloud.models.structure import ModelStructure, Shape, base_of


@dataclass(frozen=True)
class Trace:
    """Structure of a model as one forward shows it, and what its blocks were called with."""

    structure: ModelStructure
    """Structure in which every module before block 0 belongs to the part with the embedding."""
    token_independent: tuple[str, ...]
    """Modules before block 0 whose outputs do not depend on token ids, such as learned positions."""
    block_arguments: tuple[dict[str, Tensor], ...] = field(repr=False)
    """Tensors that each block was called with, beside hidden states and cache, by argument."""

    @property
    def shared_structure(self) -> ModelStructure:
        """The same structure, in which every part has the modules that do not depend on token ids."""
        structure = self.structure
        early = {name: shape for name, shape in structure.early.items() if name not in self.token_independent}
        return structure.model_copy(update={"early": early, "shared": (*structure.shared, *self.token_independent)})


@dataclass
class _Call:
    """Call of a block."""

    hidden: Tensor
    others: dict[str, Tensor]


@torch.no_grad()
def trace(model: PreTrainedModel, ids: Tensor) -> Trace:
    """Trace forwards of a model over token ids (B, T).

    Raises:
        ModelError: there is not one chain of blocks, or blocks are not called once each with hidden states (B, T, d).
    """
    kind, chain, base = model.config.model_type, find_chain(model), base_of(model)
    path = next((name for name, module in base.named_modules() if module is chain.blocks), None)
    if path is None:
        raise ModelError(f"the blocks of a '{kind}' model are not in its base model; run it whole")
    total, changed = len(chain.blocks), ids.clone()
    changed[:, -1] -= 1
    with _recorded(base, path, chain.blocks) as record:
        outputs = hidden_of(base(input_ids=ids))
        calls, early, late, last = list(record.calls), dict(record.early), list(record.late), record.last
        record.clear()
        other = hidden_of(base(input_ids=changed))
        record.clear()
        base(input_ids=ids.flip(1))
        again = record.early
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
    weighted = _with_weights(base, path)
    # Only a module without others inside can be replaced by its output.
    single = {name: tensor for name, tensor in early.items() if not any(True for _ in weighted[name].children())}
    structure = ModelStructure(
        blocks=path,
        tuple_size=record.tuple_size,
        early={name: _symbolic(tensor.shape, ids, weighted[name]) for name, tensor in single.items()},
        shared=tuple(name for name in weighted if name not in single and name not in late),
        late=tuple(late),
        has_norm=last is None or last.shape != outputs.shape or not torch.equal(last, outputs),
        causal=torch.allclose(other[:, :-1], outputs[:, :-1], rtol=1e-4, atol=1e-4),
    )
    return Trace(
        structure,
        tuple(name for name, tensor in single.items() if torch.equal(tensor, again[name])),
        tuple(call.others for call in calls),
    )


def hidden_of(output: Any) -> Tensor:
    """Final hidden states (B, T, d) of a base model's output."""
    final: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return final


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Hidden states of a block's call, and the tensors of its other arguments by name, without the cache."""
    named = named_arguments(module, args, kwargs)
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


def _symbolic(shape: torch.Size, ids: Tensor, module: nn.Module) -> Shape:
    """Shape of a module's output with the sizes that differ between models or calls as symbols."""
    weight = next(module.parameters(recurse=False))
    # The last size is the output's width: of a linear map the first of its weight, of an embedding the last.
    sizes = list(enumerate(weight.shape))
    named = [f"w{at}" for at, size in (sizes if isinstance(module, nn.Linear) else sizes[::-1]) if size == shape[-1]]
    batch, tokens = ids.shape
    known = [
        "B" if at == 0 and size == batch else "T" if size == tokens else size for at, size in enumerate(shape[:-1])
    ]
    return (*known, named[0] if named else shape[-1])


def _with_weights(base: nn.Module, path: str) -> dict[str, nn.Module]:
    """Modules of a base model with weights of their own outside of the blocks and of a pooler, by name."""
    return {
        name: module
        for name, module in base.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        and not name.startswith(f"{path}.")
        and name.partition(".")[0] != "pooler"
    }


class _Record:
    """Record of the current forward."""

    def __init__(self, total: int) -> None:
        self.calls: list[_Call] = []
        self.early: dict[str, Tensor] = {}
        self.late: list[str] = []
        self.tuple_size, self._total, self._ended = 0, total, 0
        self.last: Tensor | None = None

    def clear(self) -> None:
        self.calls, self.early, self.late, self._ended = [], {}, [], 0

    def begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, others = arguments_of(module, args, kwargs)
        self.calls.append(_Call(hidden, {name: tensor.detach().clone() for name, tensor in others.items()}))

    def ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.tuple_size = len(output) if isinstance(output, tuple) else 0
        self._ended += 1
        self.last = output[0] if isinstance(output, tuple) else output

    def module(self, name: str) -> Any:
        def ran(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and not self.calls:
                self.early[name] = output.detach().clone()
            elif self._ended >= self._total and name not in self.early:
                self.late.append(name)

        return ran


@contextmanager
def _recorded(base: nn.Module, path: str, blocks: nn.ModuleList) -> Iterator[_Record]:
    record, hooks = _Record(len(blocks)), list[RemovableHandle]()
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(record.begins, with_kwargs=True))
        hooks.append(block.register_forward_hook(record.ends))
    for name, module in _with_weights(base, path).items():
        hooks.append(module.register_forward_hook(record.module(name)))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()
