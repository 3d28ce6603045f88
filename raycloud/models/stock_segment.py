"""Segments of any model: the library's own forward runs, with stand-ins for the blocks that a segment does not have.

Masks, positions, scales and the head stay the library's. The stand-in before the segment's first block replaces the
hidden states by the given ones; the one behind its last block ends the forward.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from raycloud.models.trace import Shape, TracedStructure, final_of

_PER_MODULE = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


class StockCache(DynamicCache):
    """The library's cache with every key kept; it knows its number of tokens even if block 0 is elsewhere.

    Args:
        config: configuration of the text model.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [DynamicLayer() if isinstance(one, DynamicSlidingWindowLayer) else one for one in self.layers]
        self.length = 0
        """Number of tokens."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the next token."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys after ``query_length`` more tokens, and the first key's position."""
        return self.length + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether there are tokens."""
        return self.length > 0


class _Stop(Exception):
    """End of a segment's forward."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class _AbsentBlock(nn.Module):
    """Stand-in for a block of another segment."""

    _segment: StockSegment

    def __init__(self, segment: StockSegment, index: int, block: nn.Module) -> None:
        super().__init__()
        # Not registered: a stand-in owns no weights.
        object.__setattr__(self, "_segment", segment)
        object.__setattr__(self, "_block", block)
        self._index = index

    def __getattr__(self, name: str) -> Any:
        """Return plain attributes of the block, such as its kind of attention, which the base model reads."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["_block"], name)
            if name.startswith("_") or isinstance(found, nn.Module):
                raise
            return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        segment = self._segment
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._index == segment.hi:
            raise _Stop(hidden)
        if segment.given is not None and self._index == segment.lo - 1:
            hidden = segment.given
        size = segment.structure.tuple_size
        return (hidden, *[None] * (size - 1)) if size else hidden


class _AbsentLeaf(nn.Module):
    """Stand-in for an embedding, or what follows it, of another segment: zeros of the right shape."""

    _segment: StockSegment

    def __init__(self, segment: StockSegment, shape: Shape) -> None:
        super().__init__()
        object.__setattr__(self, "_segment", segment)
        self._shape = shape
        self.weight = torch.empty(0)  # some models ask the embedding for its dtype

    def forward(self, *_: Any, **__: Any) -> Tensor:
        given = self._segment.given
        assert given is not None, "only segments without embedding have stand-ins for it"
        sizes = {"B": given.shape[0], "T": given.shape[1]}
        return given.new_zeros([sizes[size] if isinstance(size, str) else size for size in self._shape])


class StockSegment(nn.Module):
    """Blocks ``[lo, hi)`` of any model, with the embedding if ``embed`` and the norm and head if ``head``.

    The modules are shared with the model, not copied. One forward at a time.

    Args:
        model: model of any family.
        structure: its structure, from :func:`~raycloud.models.trace.trace`.
        lo: first block.
        hi: block after the last one.
        embed: whether the segment holds the embedding; ``lo == 0`` if None.
        head: whether it holds what follows the last block; ``hi`` is the number of blocks if None.
    """

    _shell: nn.Module

    def __init__(
        self,
        model: PreTrainedModel,
        structure: TracedStructure,
        lo: int,
        hi: int,
        *,
        embed: bool | None = None,
        head: bool | None = None,
    ) -> None:
        super().__init__()
        blocks = structure.chain.blocks
        if not 0 <= lo <= hi <= len(blocks):
            raise ValueError(f"need 0 <= lo <= hi <= {len(blocks)}, got lo={lo}, hi={hi}")
        self.structure, self.lo, self.hi = structure, lo, hi
        self.is_first = lo == 0 if embed is None else embed
        self.is_last = hi == len(blocks) if head is None else head
        self.blocks = nn.ModuleList(blocks[lo:hi])
        self.given: Tensor | None = None
        """Hidden states of the current forward; None for token ids."""
        object.__setattr__(self, "_shell", self._shell_of(model))
        base = base_model_of(model, structure.chain.path)
        self._accepted = set(inspect.signature(type(base).forward).parameters)
        self.keeps_cache = structure.causal and bool({"past_key_values", "cache_params"} & self._accepted)
        """True if the model can keep the tokens of one call for the next."""
        self._takes_positions = self.keeps_cache and "position_ids" in self._accepted

    def _shell_of(self, model: PreTrainedModel) -> nn.Module:
        """Copy of the model's module tree that shares all weights, with stand-ins for what is elsewhere."""
        blocks = self.structure.chain.blocks
        mine: list[nn.Module] = [
            block if self.lo <= index < self.hi else _AbsentBlock(self, index, block)
            for index, block in enumerate(blocks)
        ]
        if not self.is_first and self.lo == 0 and self.hi:  # no stand-in comes before block 0
            mine[0] = _shell(blocks[0])
            mine[0].register_forward_pre_hook(self._inject, with_kwargs=True)
        if not self.is_last and self.hi == len(blocks) and self.lo < self.hi:  # none comes behind the last block
            mine[-1] = _shell(mine[-1])
            mine[-1].register_forward_hook(_stop)
        shell = _shell(model)
        _replace(shell, self.structure.chain.path, nn.ModuleList(mine))
        if not self.is_first:
            for path, shape in self.structure.token_leaves.items():
                _replace(shell, path, _AbsentLeaf(self, shape))
        return shell

    def forward(self, x: Tensor, *, valid: Tensor | None = None, cache: StockCache | None = None) -> Tensor:
        """Logits if this segment holds the head (final hidden states of a model without one), else hidden states.

        Args:
            x: token ids (B, T) if the segment holds the embedding, else hidden states (B, T, d).
            valid: (B, T + cached tokens), False for padding; None if there is none.
            cache: cache that keeps these tokens for the next call; None for none.
        """
        tokens = x.shape[1]
        if self.is_first or self.is_last or len(self.blocks):
            x = self._run(x, self._arguments(x, valid, cache))
        if cache is not None:
            cache.length += tokens
        return x

    def text_arguments(self, valid: Tensor, past: int, tokens: int) -> dict[str, Tensor]:
        """Arguments of the model's forward for padded texts.

        Args:
            valid: (B, past + tokens), False for padding.
            past: number of cached tokens.
            tokens: number of tokens of this call.
        """
        arguments = {"attention_mask": valid.long()}
        if self._takes_positions:
            arguments["position_ids"] = (valid.long().cumsum(1) - 1).clamp_min(0)[:, past : past + tokens]
        return arguments

    def _arguments(self, x: Tensor, valid: Tensor | None, cache: StockCache | None) -> dict[str, Any]:
        """Arguments of the model's forward beside token ids."""
        batch, tokens = x.shape[:2]
        past = 0 if cache is None else cache.length
        arguments: dict[str, Any] = {}
        if valid is not None:
            arguments = dict(self.text_arguments(valid, past, tokens))
        elif self._takes_positions and cache is not None:
            arguments["position_ids"] = torch.arange(past, past + tokens, device=x.device)[None].expand(batch, -1)
        if self.keeps_cache:
            arguments["cache_params" if "cache_params" in self._accepted else "past_key_values"] = cache
            arguments["use_cache"] = cache is not None
        return arguments

    def _run(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        ids = x if self.is_first else x.new_zeros(x.shape[:2], dtype=torch.long)
        self.given = None if self.is_first else x
        try:
            return final_of(self._shell(input_ids=ids, **arguments))
        except _Stop as stop:
            return stop.hidden
        finally:
            self.given = None

    def _inject(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.given, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.given}


def base_model_of(model: PreTrainedModel, path: str) -> nn.Module:
    """Largest library model below ``model`` that holds the blocks at ``path``: what the task head reads."""
    if model.get_output_embeddings() is None:
        return model
    names = path.split(".")
    for count in range(1, len(names) + 1):
        found = model.get_submodule(".".join(names[:count]))
        if isinstance(found, PreTrainedModel):
            return found
    return model


def _stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    raise _Stop(output[0] if isinstance(output, tuple) else output)


def _shell(module: nn.Module) -> nn.Module:
    """Copy of a module that shares its submodules and weights; replacing one of its submodules leaves it unchanged."""
    shell = copy.copy(module)
    for name in _PER_MODULE:
        shell.__dict__[name] = copy.copy(module.__dict__[name])
    shell.__dict__["_is_shell"] = True
    return shell


def _replace(root: nn.Module, path: str, new: nn.Module) -> None:
    """Replace a submodule of a shell; modules in between become shells."""
    *between, last = path.split(".")
    for name in between:
        child = root._modules[name]
        assert child is not None
        if not child.__dict__.get("_is_shell"):
            child = root._modules[name] = _shell(child)
        root = child
    root._modules[last] = new
