"""Fast path of a segment: blocks are called one by one with masks, positions and rotary angles made here.

It costs less per token than the library's own forward. It is used for a model only where it was measured equal to that
(:mod:`raycloud.models.self_check`). A layout names the modules around the blocks, and embeds tokens as the base models
with these modules do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.models.attention import SDPA
from raycloud.models.cache import KVCache
from raycloud.models.rotary import RotaryTable
from raycloud.models.structure import ModelStructure, base_of, module_at

NamedModules = Mapping[str, nn.Module]
"""Modules of a base model by their dotted names."""

Embed = Callable[[NamedModules, Tensor, Tensor, Tensor | None], Tensor]
"""Function (parts, token ids, positions, token types) -> hidden states entering block 0, (B, T, d).

Token ids, positions and token types are (B, T). Token types distinguish the two texts of a pair in families that were
trained so; None if there is one text.
"""


@dataclass(frozen=True)
class Layout:
    """Names of the modules of a base model, and how it embeds tokens."""

    blocks: str
    embedding: tuple[str, ...]
    """Embedding modules; those that a model does not have are skipped, but not the first."""
    embed: Embed
    after: tuple[str, ...] = ()
    """Modules applied in turn after the last block; those that a model does not have are skipped."""
    rotary: str | None = None


def _tokens(parts: NamedModules, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    """Embed tokens where positions enter by rotation; Gemma's embedding module scales its output itself."""
    return parts["embed_tokens"](ids)


def _gpt2(parts: NamedModules, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    return parts["drop"](parts["wte"](ids) + parts["wpe"](positions))


def _opt(parts: NamedModules, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    hidden = parts["decoder.embed_tokens"](ids)
    if "decoder.project_in" in parts:
        hidden = parts["decoder.project_in"](hidden)
    return hidden + parts["decoder.embed_positions"](None, position_ids=positions)


def _bert(parts: NamedModules, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
    return parts["embeddings"](input_ids=ids, position_ids=positions, token_type_ids=types)


LAYOUTS: dict[str, Layout] = {
    "rotary": Layout("layers", ("embed_tokens",), _tokens, ("norm",), "rotary_emb"),
    "gpt2": Layout("h", ("wte", "wpe", "drop"), _gpt2, ("ln_f",)),
    "opt": Layout(
        "decoder.layers",
        ("decoder.embed_tokens", "decoder.project_in", "decoder.embed_positions"),
        _opt,
        ("decoder.final_layer_norm", "decoder.project_out"),
    ),
    "bert": Layout("encoder.layer", ("embeddings",), _bert),
}


def layout_of(model: PreTrainedModel, structure: ModelStructure) -> str | None:
    """Name of the layout that a model may have by the names of its modules; None if there is none.

    Whether its numbers are the model's must be measured.
    """
    base = base_of(model)
    for name, layout in LAYOUTS.items():
        known = (*layout.embedding, *layout.after)
        if (
            layout.blocks == structure.blocks
            and module_at(base, layout.embedding[0]) is not None
            and (layout.rotary is None or module_at(base, layout.rotary) is not None)
            and all(
                any(f"{path}.".startswith(f"{one}.") for one in known) for path in (*structure.early, *structure.late)
            )
            and not structure.tuple_size
        ):
            return name
    return None


def layer_type(config: PretrainedConfig, index: int) -> str:
    """Attention type of block ``index``, such as ``full_attention`` or ``sliding_attention``."""
    types = getattr(config, "layer_types", None)
    if types:
        return str(types[index])
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def attention_window(config: PretrainedConfig, index: int) -> int | None:
    """Number of latest tokens that block ``index`` attends to (the token itself included), or None for all."""
    return config.sliding_window if layer_type(config, index) == "sliding_attention" else None


class FastPath:
    """Forward of a segment with masks, positions and rotary angles of our own.

    Args:
        model: model whose modules are shared, not copied.
        structure: its structure, with a layout.
        lo: first block.
        blocks: the segment's blocks, from ``lo``. They may be replaced in the list.
    """

    def __init__(self, model: PreTrainedModel, structure: ModelStructure, lo: int, blocks: nn.ModuleList) -> None:
        base, layout = base_of(model), LAYOUTS[str(structure.layout)]
        self._config, self._causal, self._lo, self._blocks = base.config, structure.causal, lo, blocks
        self._embed = layout.embed
        self.embedding = _present(base, layout.embedding)
        """Modules that embed tokens, by path."""
        self.after = _present(base, layout.after)
        """Modules after the last block, by path."""
        # Read once: access to a configuration is slow.
        self._kinds = [
            (attention_window(self._config, index), layer_type(self._config, index))
            for index in range(lo, lo + len(blocks))
        ]
        rotary = module_at(base, layout.rotary) if layout.rotary else None
        self.rotary: nn.Module | None = rotary
        self._angles = RotaryTable(rotary, _takes_layer_type(rotary)) if rotary is not None else None

    def new_cache(self) -> KVCache:
        """Empty cache of one batch."""
        return KVCache()

    def train(self, mode: bool) -> None:
        """Do nothing: all modules that this path runs belong to the segment."""

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """Hidden states (B, T, d) entering block 0 for token ids, positions and token types, each (B, T)."""
        return self._embed(self.embedding, ids, positions, types)

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply what follows the last block."""
        for module in self.after.values():
            hidden = module(hidden)
        return hidden

    def through(self, hidden: Tensor, store: KVCache, start: int, lo: int, hi: int, *, remember: bool) -> Tensor:
        """Apply blocks ``[lo, hi)`` to hidden states (B, T, d) of the tokens ``[start, start + T)``."""
        begin, end = lo - self._lo, hi - self._lo
        known: dict[tuple[int | None, str], dict[str, Any]] = {}
        # Iterating is many times cheaper than indexing a list of modules, and this runs for every token.
        for kind, block in zip(self._kinds[begin:end], islice(self._blocks, begin, end), strict=True):
            if kind not in known:
                known[kind] = self._arguments(kind, hidden, store, start)
                known[kind]["past_key_values"] = store if remember else None
            hidden = block(hidden, **known[kind])
        return hidden

    def _arguments(self, kind: tuple[int | None, str], hidden: Tensor, store: KVCache, past: int) -> dict[str, Any]:
        """Arguments of every block of a kind for the tokens from ``past``, without hidden states and cache."""
        span, type_ = kind
        total = past + hidden.shape[1]
        positions = store.positions(past, total)
        arguments: dict[str, Any] = {
            "attention_mask": self._mask(store, past, total, span, hidden.dtype),
            "position_ids": positions,
        }
        if self._angles is not None:
            where = range(past, total) if store.all_valid else positions
            arguments["position_embeddings"] = self._angles.at(where, total, type_, hidden)
        return arguments

    def _mask(self, store: KVCache, past: int, total: int, span: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask (B, 1, T, past + T) of tokens [past, total) over [0, total), None if no mask is needed.

        With sdpa a missing mask means causal attention aligned to the first key, which is right only for a text from
        its beginning; with eager attention it means that every token sees every other.
        """
        unbounded = span is None or span >= total
        one_token = total - past == 1
        if store.all_valid and unbounded:
            if not self._causal or one_token:
                return None
            if past == 0 and self._config._attn_implementation in ("sdpa", SDPA):
                return None
        keys = store.positions(0, total)
        queries = keys[:, past:]
        allowed = torch.ones(keys.shape[0], total - past, total, dtype=torch.bool, device=keys.device)
        if self._causal:
            distance = queries[:, :, None] - keys[:, None, :]
            allowed &= distance >= 0
            if span is not None:
                allowed &= distance < span
        if store.valid is not None:
            allowed &= store.valid[:, None, :total]
            # A padding token sees itself: a query without any key would be NaN in some kernels.
            slots = torch.arange(total, device=keys.device)
            allowed |= slots[past:, None] == slots[None, :]
        blocked = torch.finfo(dtype).min
        return torch.zeros(allowed.shape, dtype=dtype, device=keys.device).masked_fill_(~allowed, blocked)[:, None]


def _present(base: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
    return {path: module for path in paths if (module := module_at(base, path)) is not None}


def _takes_layer_type(rotary: nn.Module) -> bool:
    return "layer_type" in inspect.signature(type(rotary).forward).parameters
