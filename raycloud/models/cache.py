"""The keys and values a segment remembers, with the positions and the validity of every remembered token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Append-only keys and values of one batch for the blocks of one or more segments.

    The attention modules of ``transformers`` call :meth:`update` as they would on their own cache. Unlike it, lengths
    are kept per cache and per block and not read from layer 0: a segment in the middle of a model knows how many tokens
    it holds, and blocks may lag behind the tokens known. Windowed blocks keep all their keys (the mask does the
    windowing), so any number of tokens can be dropped again.
    """

    def __init__(self) -> None:
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}
        self.positions: Tensor | None = None
        self.valid: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens known, padding included."""
        return 0 if self.positions is None else self.positions.shape[1]

    def filled(self, block: int) -> int:
        """Tokens whose keys and values ``block`` holds."""
        return self._lengths.get(block, 0)

    @property
    def nbytes(self) -> int:
        """Bytes set aside for keys and values."""
        return sum(buffer.nbytes for pair in self._buffers.values() for buffer in pair)

    def wipe(self) -> None:
        """Overwrite keys and values with zeros and forget everything."""
        for pair in self._buffers.values():
            for buffer in pair:
                buffer.zero_()
        self.crop(0)

    @property
    def all_valid(self) -> bool:
        """Whether no remembered token is padding."""
        return self.valid is None

    def next_positions(self, valid: Tensor | None, batch: int, rows: int, device: torch.device) -> Tensor:
        """Positions (B, T) of the next ``rows`` tokens: they count valid tokens only."""
        if self.positions is None:
            start = torch.zeros(batch, 1, dtype=torch.long, device=device)
        elif self.valid is None:
            start = self.positions[:, -1:] + 1
        else:
            start = self.valid.sum(dim=1, keepdim=True)
        if valid is None:
            return start + torch.arange(rows, device=device)
        return (start + valid.long().cumsum(dim=1) - 1).clamp_min(0)

    def extend(self, positions: Tensor, valid: Tensor | None) -> None:
        """Remember where the next tokens stand; their keys and values follow block by block."""
        if self.valid is not None or valid is not None:
            old = self.valid
            if old is None:
                old = torch.ones(positions.shape[0], self.length, dtype=torch.bool, device=positions.device)
            new = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
            self.valid = torch.cat([old, new], dim=1)
        self.positions = positions if self.positions is None else torch.cat([self.positions, positions], dim=1)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, d_head) keys and values of one block and return all of them."""
        length = self._lengths.get(layer_idx, 0)
        total = length + keys.shape[2]
        buffers = self._buffers.get(layer_idx)
        if buffers is None or buffers[0].shape[2] < total:
            # Doubling keeps appending linear in the text's length; concatenating per token would be quadratic.
            buffers = (
                self._grown(buffers and buffers[0], keys, length, total),
                self._grown(buffers and buffers[1], values, length, total),
            )
            self._buffers[layer_idx] = buffers
        self._lengths[layer_idx] = total
        # narrow is the cheapest way to name a part of a tensor, and this runs for every block and token.
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer.narrow(2, length, total - length).copy_(new)
        return buffers[0].narrow(2, 0, total), buffers[1].narrow(2, 0, total)

    @staticmethod
    def _grown(old: Tensor | None, like: Tensor, length: int, total: int) -> Tensor:
        batch, heads, _, width = like.shape
        grown = like.new_empty(batch, heads, max(32, total, 2 * length), width)
        if old is not None:
            grown[:, :, :length] = old[:, :, :length]
        return grown

    def crop(self, keep: int) -> None:
        """Forget everything but the first ``keep`` tokens.

        Raises:
            ValueError: ``keep`` is negative or more than is remembered.
        """
        if not 0 <= keep <= self.length:
            raise ValueError(f"keep must be between 0 and {self.length}, got {keep}")
        if keep == 0:
            self.__init__()  # type: ignore[misc]
            return
        assert self.positions is not None
        self.positions = self.positions[:, :keep]
        self.valid = None if self.valid is None else self.valid[:, :keep]
        self._lengths = {block: min(length, keep) for block, length in self._lengths.items()}
