"""Stage: one side of a split model with its blocks and KV caches, which fills skipped blocks when the cuts change."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from raycloud.models.segments import Segment


class Stage:
    """State of the edge or the cloud for one batch of texts.

    Whenever a block runs, its cache is first filled for all earlier tokens, so a block only ever lacks the last tokens:
    append-only caches suffice, and hidden states are kept only at the indices where plans may cut.

    Args:
        segments: blocks this side may have to run; overlapping segments share their modules.
        kept: indices whose hidden states are kept, to fill blocks that skipped tokens; none if the plan is fixed.
    """

    def __init__(self, segments: Sequence[Segment], kept: Collection[int] = ()) -> None:
        self._segments, self._kept = tuple(segments), frozenset(kept)
        self._saved: dict[int, Tensor] = {}
        self.cache = self._segments[0].new_cache()

    @property
    def tokens(self) -> int:
        """Number of known tokens."""
        return self.cache.length

    def held(self, index: int) -> int:
        """Number of tokens whose hidden states at ``index`` need not be given again: this side has or used them."""
        saved = self._saved.get(index)
        return max(0 if saved is None else saved.shape[1], self.cache.filled(index))

    def extend(self, batch: int, count: int, valid: Tensor | None, device: torch.device) -> Tensor:
        """Add ``count`` tokens and return their positions (B, count)."""
        self.cache.extend(batch, count, valid, device)
        return self.cache.positions(self.tokens - count, self.tokens)

    def run(self, lo: int, hi: int, hidden: Tensor, start: int) -> tuple[Tensor, int]:
        """Run blocks ``[lo, hi)`` up to the last token of ``hidden``.

        Args:
            lo: first block.
            hi: block after the last one.
            hidden: hidden states (B, T, d) entering block ``lo`` for the tokens ``[start, start + T)``.
            start: first token, at most ``held(lo)``.

        Returns:
            The hidden states that leave block ``hi - 1``, and their first token. It is before ``start`` if the last
            block had skipped tokens, and after it if the block was ahead.

        Raises:
            ValueError: hidden states before ``start`` are needed and not kept.
        """
        block = lo
        while block < hi:
            hidden, start = self._aligned(block, hidden, start)
            self._save(block, hidden, start)
            end = block + 1
            while end < hi and end not in self._kept and self.cache.filled(end) == start:
                end += 1
            if hidden.shape[1]:
                hidden = self._segment(block, end).through(hidden, self.cache, start, block, end)
            block = end
        self._save(hi, hidden, start)
        return hidden, start

    def last(self, index: int, count: int, hidden: Tensor, start: int) -> Tensor:
        """Hidden states at ``index`` of the last ``count`` tokens, from the result of :meth:`run` and those kept."""
        begin = start + hidden.shape[1] - count
        return self._hidden_from(index, begin, hidden, start)

    def rollback(self, keep: int) -> None:
        """Discard everything but the first ``keep`` tokens.

        Raises:
            ValueError: fewer tokens are known.
        """
        self.cache.crop(keep)
        self._saved = {index: hidden[:, :keep] for index, hidden in self._saved.items()}

    def _aligned(self, block: int, hidden: Tensor, start: int) -> tuple[Tensor, int]:
        filled = self.cache.filled(block)
        return self._hidden_from(block, filled, hidden, start), filled

    def _hidden_from(self, index: int, begin: int, hidden: Tensor, start: int) -> Tensor:
        if begin >= start:
            return hidden[:, begin - start :]
        saved = self._saved.get(index)
        if saved is None or saved.shape[1] < start:
            raise ValueError(f"hidden states of the tokens [{begin}, {start}) at block {index} are missing")
        return torch.cat([saved[:, begin:start], hidden], dim=1)

    def _save(self, index: int, hidden: Tensor, start: int) -> None:
        if index not in self._kept:
            return
        saved = self._saved.get(index)
        if saved is None:
            saved = hidden[:, :0]
        if saved.shape[1] < start:
            raise ValueError(f"hidden states of the tokens [{saved.shape[1]}, {start}) at block {index} are missing")
        self._saved[index] = torch.cat([saved, hidden[:, saved.shape[1] - start :]], dim=1)

    def _segment(self, lo: int, hi: int) -> Segment:
        for segment in self._segments:
            if segment.lo <= lo and hi <= segment.hi:
                return segment
        raise ValueError(f"this side does not hold the blocks [{lo}, {hi})")
