"""Segments: blocks [lo, hi) of a transformer as a separate module.

The blocks of ``transformers`` are called one by one with masks, positions and a KV cache made here, so blocks may hold
caches of different lengths, and a segment in the middle of a model gets the right positions.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.models.attention import SDPA
from raycloud.models.cache import KVCache
from raycloud.models.rotary import RotaryTable
from raycloud.models.structure import attention_window, base_of, blocks_of, layer_type, module_at, structure_of


class Segment(nn.Module):
    """Blocks ``[lo, hi)`` with the embedding if ``lo == 0`` and final norm and head if ``hi`` is the number of blocks.

    The modules are shared with ``model``, not copied: training a segment trains the model it was taken from.

    Args:
        model: a ``transformers`` model of a family with a structure record.
        lo: first block.
        hi: block after the last one; the number of blocks if None.
        embed: whether the segment holds the embedding; ``lo == 0`` if None. The middle of an edge-cloud-edge model
            with an empty first part starts at block 0 without it.
        head: whether the segment holds final norm and head; ``hi == len(blocks)`` if None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lo: int = 0,
        hi: int | None = None,
        *,
        embed: bool | None = None,
        head: bool | None = None,
    ) -> None:
        super().__init__()
        blocks = blocks_of(model)
        hi = len(blocks) if hi is None else hi
        if not 0 <= lo <= hi <= len(blocks):
            raise ValueError(f"need 0 <= lo <= hi <= {len(blocks)}, got lo={lo}, hi={hi}")
        base, self.anatomy = base_of(model), structure_of(model.config)
        self.config, self.lo, self.hi = model.config, lo, hi
        self.is_first = lo == 0 if embed is None else embed
        self.is_last = hi == len(blocks) if head is None else head
        self.blocks = nn.ModuleList(blocks[lo:hi])
        # Read once: access to a configuration is slow.
        self._kinds = [
            (attention_window(self.config, index), layer_type(self.config, index)) for index in range(lo, hi)
        ]
        self._embedding = self._register(base, self.anatomy.embedding) if self.is_first else {}
        self._after = self._register(base, self.anatomy.after) if self.is_last else {}
        rotary = module_at(base, self.anatomy.rotary) if self.anatomy.rotary else None
        self.rotary: nn.Module | None = rotary
        self._angles = RotaryTable(rotary, self.anatomy.rotary_per_layer_type) if rotary is not None else None
        self.head: nn.Module | None = module_at(model, self.anatomy.head) if self.is_last else None

    def _register(self, base: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
        found = {path: module for path in paths if (module := module_at(base, path)) is not None}
        for path, module in found.items():
            self.add_module(path.replace(".", "_"), module)
        return found

    def forward(self, x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits if this segment holds a head, hidden states otherwise; see :meth:`hidden` for the arguments."""
        hidden = self.hidden(x, valid=valid, cache=cache)
        return self.logits(hidden) if self.head is not None else hidden

    def hidden(
        self, x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None, types: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, d) after block ``hi - 1``, after the final norm if this is the last segment.

        Args:
            x: token ids (B, T) if the segment holds the embedding, else hidden states (B, T, d) entering block ``lo``.
            valid: (B, T), False for padding on either side; None if there is none.
            cache: KV cache that keeps these tokens for the next call; inference only.
            types: token types (B, T), see :data:`~raycloud.models.structure.Embed`.
        """
        store = KVCache() if cache is None else cache
        past = store.length
        store.extend(x.shape[0], x.shape[1], valid, x.device)
        hidden = self.embed(x, store.positions(past, store.length), types) if self.is_first else x
        return self.finish(self._through(hidden, store, past, self.lo, self.hi, remember=cache is not None))

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, d) entering block 0 for token ids, token types and positions, each (B, T)."""
        return self.anatomy.embed(self._embedding, ids, positions, types)

    def through(self, hidden: Tensor, cache: KVCache, start: int, lo: int, hi: int) -> Tensor:
        """Apply blocks ``[lo, hi)`` of this segment to hidden states (B, T, d) of tokens ``[start, start + T)``.

        ``cache`` must know these tokens, and each of the blocks must hold the keys of exactly the tokens before them.
        Nothing is embedded, and the modules after the last block are left to :meth:`finish`.
        """
        return self._through(hidden, cache, start, lo, hi, remember=True)

    def finish(self, hidden: Tensor) -> Tensor:
        """Apply the modules after the last block, such as the final norm; none if this is not the last segment."""
        for module in self._after.values():
            hidden = module(hidden)
        return hidden

    def _through(self, hidden: Tensor, store: KVCache, past: int, lo: int, hi: int, *, remember: bool) -> Tensor:
        begin, end = lo - self.lo, hi - self.lo
        known: dict[tuple[int | None, str], dict[str, Any]] = {}
        # Iterating is many times cheaper than indexing a list of modules, and this runs for every token.
        for kind, block in zip(self._kinds[begin:end], islice(self.blocks, begin, end), strict=True):
            if kind not in known:
                known[kind] = self._arguments(kind, hidden, store, past)
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

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., d), soft-capped if the family does so."""
        if self.head is None:
            raise ValueError(f"segment [{self.lo}, {self.hi}) holds no head")
        logits: Tensor = self.head(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def _mask(self, store: KVCache, past: int, total: int, span: int | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask (B, 1, T, past + T) of tokens [past, total) over [0, total), None if no mask is needed.

        With sdpa a missing mask means causal attention aligned to the first key, which is right only for a text from
        its beginning; with eager attention it means that every token sees every other.
        """
        unbounded = span is None or span >= total
        one_token = total - past == 1
        if store.all_valid and unbounded:
            if not self.anatomy.causal or one_token:
                return None
            if past == 0 and self.config._attn_implementation in ("sdpa", SDPA):
                return None
        keys = store.positions(0, total)
        queries = keys[:, past:]
        allowed = torch.ones(keys.shape[0], total - past, total, dtype=torch.bool, device=keys.device)
        if self.anatomy.causal:
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


def cut_segments(model: PreTrainedModel, start_block: int, end_block: int) -> tuple[Segment, Segment, Segment]:
    """Cut a model into three segments: before ``start_block``, from there to ``end_block``, and the rest."""
    return (
        Segment(model, 0, start_block, head=False),
        Segment(model, start_block, end_block, embed=False, head=False),
        Segment(model, end_block, embed=False),
    )
