"""General path of a segment: the library's own forward runs, with stand-ins for the blocks that the segment lacks.

Masks, positions and scales stay the library's. The stand-in before a segment's first block replaces the hidden states
by the given ones; the one behind its last block ends the forward.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.models.block_trace import without_cache
from raycloud.models.cache import KVCache
from raycloud.models.shell import StandIn, replace_module, shell_of
from raycloud.models.stock_cache import StockCache, cache_argument
from raycloud.models.structure import ModelStructure, Shape, base_of, module_at
from raycloud.models.trace import hidden_of


@dataclass(frozen=True)
class _Call:
    """Current forward of a shell."""

    lo: int
    hi: int
    given: Tensor | None
    """Hidden states that enter block ``lo``; None if they come from the embedding."""
    stops: bool
    """True if the forward ends behind block ``hi - 1``."""


_current: ContextVar[_Call] = ContextVar("current forward of a shell")


class _Stop(Exception):
    """End of a segment's forward."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class AbsentBlock(StandIn):
    """Stand-in for a block of another segment.

    Args:
        index: number of the block.
        block: the block.
        tuple_size: see :class:`~raycloud.models.structure.ModelStructure`.
    """

    def __init__(self, index: int, block: nn.Module, tuple_size: int) -> None:
        super().__init__(block)
        self._index, self._tuple_size = index, tuple_size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass hidden states through, replace them by the given ones, or end the forward."""
        call = _current.get()
        hidden = args[0] if args else kwargs["hidden_states"]
        if call.stops and self._index == call.hi:
            raise _Stop(hidden)
        if call.given is not None and self._index == call.lo - 1:
            hidden = call.given
        return (hidden, *[None] * (self._tuple_size - 1)) if self._tuple_size else hidden


class _OuterBlock(nn.Module):
    """Block at an end of a forward that has no stand-in there: it takes the given hidden states, or ends the forward.

    It calls the block itself, not a copy, so that hooks and modes that the block gets later count.

    Args:
        block: the block, whose attributes the base model may read.
        begins: the forward begins with it.
        ends: the forward ends behind it.
    """

    def __init__(self, block: nn.Module, *, begins: bool, ends: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not registered: its mode is that of its segment
        self._begins, self._ends = begins, ends

    def __getattr__(self, name: str) -> Any:
        """Return attributes of the block, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block."""
        if self._begins:
            given = _current.get().given
            args, kwargs = ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})
        output = self.__dict__["_block"](*args, **kwargs)
        if self._ends:
            raise _Stop(output[0] if isinstance(output, tuple) else output)
        return output


class _AbsentModule(nn.Module):
    """Stand-in for a module before block 0: zeros of the shape of its output."""

    def __init__(self, module: nn.Module, shape: Shape) -> None:
        super().__init__()
        weight = next(module.parameters(recurse=False))
        self._shape = tuple(
            weight.shape[int(size[1])] if isinstance(size, str) and size[0] == "w" else size for size in shape
        )
        self.weight = torch.empty(0, dtype=weight.dtype)  # some models ask the embedding for its dtype

    def forward(self, *_: Any, **__: Any) -> Tensor:
        given = _current.get().given
        assert given is not None, "only forwards that begin after the embedding have stand-ins for it"
        sizes = {"B": given.shape[0], "T": given.shape[1]}
        return given.new_zeros([sizes[size] if isinstance(size, str) else size for size in self._shape])


class StockPath:
    """Forward of a segment by the library's own code.

    Args:
        model: model of any family; its modules are shared, not copied.
        structure: its structure.
        lo: first block.
        blocks: the segment's blocks, from ``lo``. They may be replaced in the list.
    """

    def __init__(self, model: PreTrainedModel, structure: ModelStructure, lo: int, blocks: nn.ModuleList) -> None:
        self._base, self._structure, self._lo, self._blocks = base_of(model), structure, lo, blocks
        self._total = len(module_at(self._base, structure.blocks))
        self._accepted = frozenset(inspect.signature(type(self._base).forward).parameters)
        self._shells: dict[tuple[int, int, bool], tuple[list[nn.Module], nn.Module]] = {}
        self._training: bool | None = None  # None: as the modules are

    def new_cache(self) -> KVCache:
        """Empty cache of one batch."""
        return StockCache(self._base.config, rolls_back=self._structure.rolls_back)

    def train(self, mode: bool) -> None:
        """Set the modules around the blocks to training or evaluation mode."""
        self._training = mode
        for _, shell in self._shells.values():
            _set_mode(shell, mode)

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Hidden states (B, T, d) entering block 0 for token ids, positions and token types, each (B, T)."""
        arguments = without_cache(self._base)
        if types is not None and "token_type_ids" in self._accepted:
            arguments["token_type_ids"] = types
        if self._structure.causal and "position_ids" in self._accepted:
            arguments["position_ids"] = positions
        return self._run(_Call(0, 0, None, stops=True), ids, arguments)

    def through(self, hidden: Tensor, store: KVCache, start: int, lo: int, hi: int, *, remember: bool) -> Tensor:
        """Apply blocks ``[lo, hi)`` to hidden states (B, T, d) of the tokens ``[start, start + T)``."""
        if lo == hi:
            return hidden
        if not (self._structure.chunks or start == 0 or not remember):
            steps = [
                self._forward(some, store, start + at, lo, hi, remember=True)
                for at, some in enumerate(hidden.split(1, dim=1))
            ]
            return torch.cat(steps, dim=1)
        return self._forward(hidden, store, start, lo, hi, remember=remember)

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply what follows the last block."""
        if not self._structure.has_norm or not hidden.shape[1]:
            return hidden
        return self._run(_Call(self._total, self._total, hidden, stops=False), hidden, without_cache(self._base))

    def _forward(self, hidden: Tensor, store: KVCache, start: int, lo: int, hi: int, *, remember: bool) -> Tensor:
        total = start + hidden.shape[1]
        arguments = self._text_arguments(store, start, total)
        if self._structure.causal:
            arguments[cache_argument(self._accepted)] = store if remember else None
            arguments["use_cache"] = remember
        call = _Call(lo, hi, hidden, stops=True)
        if not isinstance(store, StockCache):
            return self._run(call, hidden, arguments)
        with store.at(start, range(lo, hi), total):
            return self._run(call, hidden, arguments)

    def _text_arguments(self, store: KVCache, start: int, total: int) -> dict[str, Any]:
        """Arguments of the base model that tell padding and positions of the tokens ``[start, total)``."""
        arguments: dict[str, Any] = {}
        if store.valid is not None:
            arguments["attention_mask"] = store.valid[:, :total].long()
        if self._structure.causal and "position_ids" in self._accepted:
            arguments["position_ids"] = store.positions(start, total)
        return arguments

    def _run(self, call: _Call, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        shell = self._shell(call)
        ids = x if call.given is None else x.new_zeros(x.shape[:2], dtype=torch.long)
        token = _current.set(call)
        try:
            return hidden_of(shell(input_ids=ids, **arguments))
        except _Stop as stop:
            return stop.hidden
        finally:
            _current.reset(token)

    def _shell(self, call: _Call) -> nn.Module:
        """Copy of the base model's module tree that shares all weights, with stand-ins for what a forward lacks."""
        key = (call.lo, call.hi, call.given is None)
        held = list(self._blocks)[call.lo - self._lo : call.hi - self._lo] if call.lo < call.hi else []
        known = self._shells.get(key)
        if known is None or any(old is not new for old, new in zip(known[0], held, strict=True)):
            known = self._shells[key] = (held, self._new_shell(call, held))
        return known[1]

    def _new_shell(self, call: _Call, held: list[nn.Module]) -> nn.Module:
        structure, whole = self._structure, module_at(self._base, self._structure.blocks)
        mine: list[nn.Module] = [
            held[index - call.lo] if call.lo <= index < call.hi else AbsentBlock(index, block, structure.tuple_size)
            for index, block in enumerate(whole)
        ]
        if call.lo < call.hi:  # no stand-in comes before block 0, and none behind the last block
            begins, ends = call.lo == 0, call.stops and call.hi == self._total
            if begins:
                mine[0] = _OuterBlock(mine[0], begins=True, ends=ends and call.hi == 1)
            if ends and not (begins and call.hi == 1):
                mine[-1] = _OuterBlock(mine[-1], begins=False, ends=True)
        shell = shell_of(self._base)
        if getattr(shell, "pooler", None) is not None:
            shell.pooler = None  # type: ignore[assignment]  # no part of a segment
        replace_module(shell, structure.blocks, nn.ModuleList(mine))
        if call.given is not None:
            for path, shape in structure.early.items():
                replace_module(shell, path, _AbsentModule(module_at(self._base, path), shape))
        if self._training is not None:
            _set_mode(shell, self._training)
        return shell


def _set_mode(shell: nn.Module, training: bool) -> None:
    """Set the mode of a shell's modules without the blocks, which have that of their segment."""
    blocks = {id(one) for child in shell.modules() if isinstance(child, nn.ModuleList) for one in child.modules()}
    for module in shell.modules():
        if id(module) not in blocks:
            module.training = training
