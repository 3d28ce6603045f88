"""One side of a cut model: its blocks, their caches, and how it catches up when the cuts move."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from raycloud.models.cache import KVCache
from raycloud.models.segments import Segment


class Side:
    """What the edge or the cloud holds of one batch of texts.

    Whenever a block runs, it is first filled for all earlier tokens, so what a block lacks is always a contiguous tail:
    append-only caches suffice, and rows are kept only at the indices where plans may cut.

    Args:
        segments: the blocks this side may have to run; where two overlap they share their modules.
        kept: indices whose rows are kept, so that blocks behind in the text can catch up; none if the plan is fixed.
    """

    def __init__(self, segments: Sequence[Segment], kept: Collection[int] = ()) -> None:
        self._segments, self._kept = tuple(segments), frozenset(kept)
        self._saved: dict[int, Tensor] = {}
        self.cache = KVCache()

    @property
    def tokens(self) -> int:
        """Tokens known."""
        return self.cache.length

    def held(self, index: int) -> int:
        """Tokens whose rows at ``index`` this side needs no more, as it has them or has used them."""
        saved = self._saved.get(index)
        return max(0 if saved is None else saved.shape[1], self.cache.filled(index))

    def extend(self, batch: int, count: int, valid: Tensor | None, device: torch.device) -> Tensor:
        """Make ``count`` more tokens known; their positions (B, count)."""
        self.cache.extend(batch, count, valid, device)
        return self.cache.positions(self.tokens - count, self.tokens)

    def run(self, lo: int, hi: int, rows: Tensor, start: int) -> tuple[Tensor, int]:
        """Bring blocks ``[lo, hi)`` up to the end of ``rows``.

        Args:
            lo: first block.
            hi: block after the last one.
            rows: (B, T, d) entering block ``lo`` for the tokens ``[start, start + T)``.
            start: at most ``held(lo)``.

        Returns:
            The rows that leave block ``hi - 1`` and the token they begin with. It lies before ``start`` if the last
            block had to catch up, and after it if the block was ahead.

        Raises:
            ValueError: rows before ``start`` are needed and not kept.
        """
        block = lo
        while block < hi:
            rows, start = self._aligned(block, rows, start)
            self._save(block, rows, start)
            end = block + 1
            while end < hi and end not in self._kept and self.cache.filled(end) == start:
                end += 1
            if rows.shape[1]:
                rows = self._segment(block, end).through(rows, self.cache, start, block, end)
            block = end
        self._save(hi, rows, start)
        return rows, start

    def last(self, index: int, count: int, rows: Tensor, start: int) -> Tensor:
        """The rows at ``index`` of the last ``count`` tokens of those that :meth:`run` returned, kept ones included."""
        begin = start + rows.shape[1] - count
        return self._from(index, begin, rows, start)

    def rollback(self, keep: int) -> None:
        """Forget everything but the first ``keep`` tokens.

        Raises:
            ValueError: fewer tokens are known.
        """
        self.cache.crop(keep)
        self._saved = {index: rows[:, :keep] for index, rows in self._saved.items()}

    def _aligned(self, block: int, rows: Tensor, start: int) -> tuple[Tensor, int]:
        filled = self.cache.filled(block)
        return self._from(block, filled, rows, start), filled

    def _from(self, index: int, begin: int, rows: Tensor, start: int) -> Tensor:
        if begin >= start:
            return rows[:, begin - start :]
        saved = self._saved.get(index)
        if saved is None or saved.shape[1] < start:
            raise ValueError(f"rows of the tokens [{begin}, {start}) at block {index} are missing")
        return torch.cat([saved[:, begin:start], rows], dim=1)

    def _save(self, index: int, rows: Tensor, start: int) -> None:
        if index not in self._kept:
            return
        saved = self._saved.get(index)
        if saved is None:
            saved = rows[:, :0]
        if saved.shape[1] < start:
            raise ValueError(f"rows of the tokens [{saved.shape[1]}, {start}) at block {index} are missing")
        self._saved[index] = torch.cat([saved, rows[:, saved.shape[1] - start :]], dim=1)

    def _segment(self, lo: int, hi: int) -> Segment:
        for segment in self._segments:
            if segment.lo <= lo and hi <= segment.hi:
                return segment
        raise ValueError(f"this side does not hold the blocks [{lo}, {hi})")
