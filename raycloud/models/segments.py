"""Segments: blocks [lo, hi) of a transformer as a module of its own.

The library's own blocks are called one by one with our masks, positions and KV store, so layers may hold caches of
different lengths and a part in the middle never has to guess where it stands.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.models.anatomy import anatomy_of, base_of, blocks_of, find, layer_type, window
from raycloud.models.attention import PLAIN
from raycloud.models.cache import KVCache
from raycloud.models.rotary import Angles


class Segment(nn.Module):
    """Blocks ``[lo, hi)`` with the embedding if ``lo == 0`` and final norm and head if ``hi`` is the number of blocks.

    The modules are shared with ``model``, not copied: training a segment trains the model it was taken from.

    Args:
        model: a ``transformers`` model of a family with an anatomy record.
        lo: first block.
        hi: block after the last one; the number of blocks if None.
        embed: whether it holds the embedding; ``lo == 0`` if None. The middle of an edge-cloud-edge model with an
            empty first part starts at block 0 without it.
        head: whether it holds final norm and head; ``hi == len(blocks)`` if None.
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
        base, self.anatomy = base_of(model), anatomy_of(model.config)
        self.config, self.lo, self.hi = model.config, lo, hi
        self.is_first = lo == 0 if embed is None else embed
        self.is_last = hi == len(blocks) if head is None else head
        self.blocks = nn.ModuleList(blocks[lo:hi])
        # Asked once: configurations are slow to answer.
        self._kinds = [(window(self.config, index), layer_type(self.config, index)) for index in range(lo, hi)]
        self._embedding = self._register(base, self.anatomy.embedding) if self.is_first else {}
        self._after = self._register(base, self.anatomy.after) if self.is_last else {}
        rotary = find(base, self.anatomy.rotary) if self.anatomy.rotary else None
        self.rotary: nn.Module | None = rotary
        self._angles = Angles(rotary, self.anatomy.rotary_per_layer_type) if rotary is not None else None
        self.head: nn.Module | None = find(model, self.anatomy.head) if self.is_last else None

    def _register(self, base: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
        found = {path: module for path in paths if (module := find(base, path)) is not None}
        for path, module in found.items():
            self.add_module(path.replace(".", "_"), module)
        return found

    def forward(self, x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits if this segment holds a head, rows otherwise; see :meth:`rows` for the arguments."""
        rows = self.rows(x, valid=valid, cache=cache)
        return self.logits(rows) if self.head is not None else rows

    def rows(
        self, x: Tensor, *, valid: Tensor | None = None, cache: KVCache | None = None, types: Tensor | None = None
    ) -> Tensor:
        """The rows (B, T, d) that leave block ``hi - 1``, after the final norm if this is the last segment.

        Args:
            x: token ids (B, T) if it holds the embedding, rows (B, T, d) entering block ``lo`` otherwise.
            valid: (B, T), False for padding on either side; None if there is none.
            cache: remembers these tokens for the next call; inference only.
            types: (B, T) of token ids, see :data:`~raycloud.models.anatomy.Embed`.
        """
        store = KVCache() if cache is None else cache
        past = store.length
        store.extend(x.shape[0], x.shape[1], valid, x.device)
        rows = self.embed(x, store.positions(past, store.length), types) if self.is_first else x
        return self.finish(self._through(rows, store, past, self.lo, self.hi, remember=cache is not None))

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """Rows (B, T, d) entering block 0 for token ids (B, T) of some types (B, T) at positions (B, T)."""
        return self.anatomy.embed(self._embedding, ids, positions, types)

    def through(self, rows: Tensor, cache: KVCache, start: int, lo: int, hi: int) -> Tensor:
        """Blocks ``[lo, hi)`` of this segment on the rows (B, T, d) of the tokens ``[start, start + T)`` of ``cache``.

        The cache must know these tokens, and each of the blocks must hold the keys of exactly those before them;
        nothing is embedded, and what follows the last block is left to :meth:`finish`.
        """
        return self._through(rows, cache, start, lo, hi, remember=True)

    def finish(self, rows: Tensor) -> Tensor:
        """What follows the last block, such as the final norm; nothing if this is not the last segment."""
        for module in self._after.values():
            rows = module(rows)
        return rows

    def _through(self, rows: Tensor, store: KVCache, past: int, lo: int, hi: int, *, remember: bool) -> Tensor:
        begin, end = lo - self.lo, hi - self.lo
        known: dict[tuple[int | None, str], dict[str, Any]] = {}
        # Iterating is many times cheaper than indexing a list of modules, and this runs for every token.
        for kind, block in zip(self._kinds[begin:end], islice(self.blocks, begin, end), strict=True):
            if kind not in known:
                known[kind] = self._arguments(kind, rows, store, past)
                known[kind]["past_key_values"] = store if remember else None
            rows = block(rows, **known[kind])
        return rows

    def _arguments(self, kind: tuple[int | None, str], rows: Tensor, store: KVCache, past: int) -> dict[str, Any]:
        """What every block of a kind is given for the tokens from ``past`` on, beside their rows and its cache."""
        span, type_ = kind
        total = past + rows.shape[1]
        positions = store.positions(past, total)
        arguments: dict[str, Any] = {
            "attention_mask": self._mask(store, past, total, span, rows.dtype),
            "position_ids": positions,
        }
        if self._angles is not None:
            where = range(past, total) if store.all_valid else positions
            arguments["position_embeddings"] = self._angles.at(where, total, type_, rows)
        return arguments

    def logits(self, rows: Tensor) -> Tensor:
        """Logits (..., V) of final rows (..., d), soft-capped where the family does so."""
        if self.head is None:
            raise ValueError(f"segment [{self.lo}, {self.hi}) holds no head")
        logits: Tensor = self.head(rows)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def _mask(self, store: KVCache, past: int, total: int, span: int | None, dtype: torch.dtype) -> Tensor | None:
        """The additive mask (B, 1, T, past + T) of tokens [past, total) over [0, total), None where it says nothing.

        With sdpa a missing mask means causal attention aligned to the first key, which is right only for a text from
        its beginning; with eager attention it means that every token sees every other.
        """
        unbounded = span is None or span >= total
        one_row = total - past == 1
        if store.all_valid and unbounded:
            if not self.anatomy.causal or one_row:
                return None
            if past == 0 and self.config._attn_implementation in ("sdpa", PLAIN):
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
            # A padding token sees itself: a row without any key would be NaN in some kernels.
            slots = torch.arange(total, device=keys.device)
            allowed |= slots[past:, None] == slots[None, :]
        blocked = torch.finfo(dtype).min
        return torch.zeros(allowed.shape, dtype=dtype, device=keys.device).masked_fill_(~allowed, blocked)[:, None]
