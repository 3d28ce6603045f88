"""KV cache of a segment, with the position and the validity of every cached token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FEWEST = 256
_counts: dict[torch.device, Tensor] = {}


def _counted(tokens: int, device: torch.device) -> Tensor:
    """Tensor 0, 1, 2, … (1, at least ``tokens``), made once per device: a slice costs a fraction of a new tensor."""
    count = _counts.get(device)
    if count is None or count.shape[1] < tokens:
        # A plain tensor even in inference mode: training may use it later.
        with torch.inference_mode(False):
            count = _counts[device] = torch.arange(max(_FEWEST, 2 * tokens), device=device)[None]
    return count


class KVCache:
    """Append-only keys and values of one batch for the blocks of one or more segments.

    The attention modules of ``transformers`` call :meth:`update` as they call it on the library's cache. Unlike there,
    lengths are kept per cache and per block and not read from layer 0: a segment in the middle of a model knows how
    many tokens it holds, and a block may hold fewer tokens than the cache knows. Blocks with sliding-window attention
    keep all their keys (the mask applies the window), so any number of tokens can be dropped again.
    """

    def __init__(self) -> None:
        self._trunk: KVCache | None = None
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}
        self._batch, self._device = 1, torch.device("cpu")
        # Positions with padding; None if the position of a token is its index.
        self._padded: Tensor | None = None
        self.valid: Tensor | None = None
        self.length = 0
        """Number of known tokens, padding included."""

    def filled(self, block: int) -> int:
        """Number of tokens whose keys and values ``block`` holds."""
        return self._lengths.get(block, 0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for pair in self._buffers.values() for buffer in pair)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values for one token of all texts."""
        return sum(buffer.nbytes // buffer.shape[2] for pair in self._buffers.values() for buffer in pair)

    @property
    def state_bytes(self) -> int:
        """Bytes of states whose size does not depend on the number of tokens."""
        return 0

    def wipe(self) -> None:
        """Overwrite keys and values with zeros and drop all tokens."""
        for pair in self._buffers.values():
            for buffer in pair:
                buffer.zero_()
        self.crop(0)

    @property
    def all_valid(self) -> bool:
        """True if no cached token is padding."""
        return self.valid is None

    def extend(self, batch: int, tokens: int, valid: Tensor | None, device: torch.device) -> None:
        """Register the next ``tokens`` tokens of a batch; :meth:`update` adds their keys and values block by block.

        Args:
            batch: number of texts, the same in every call.
            tokens: number of new tokens per text.
            valid: (B, tokens), False for padding; None if there is none.
            device: device of the positions.
        """
        self._batch, self._device = batch, device
        if self.valid is not None or valid is not None:
            ones = torch.ones(batch, max(self.length, tokens), dtype=torch.bool, device=device)
            old = ones[:, : self.length] if self.valid is None else self.valid
            self.valid = torch.cat([old, ones[:, :tokens] if valid is None else valid], dim=1)
            # Positions count valid tokens only.
            self._padded = (self.valid.long().cumsum(dim=1) - 1).clamp_min(0)
        self.length += tokens

    def positions(self, start: int, stop: int) -> Tensor:
        """Positions (B, T) of the tokens ``[start, stop)``."""
        if self._padded is not None:
            return self._padded[:, start:stop]
        return _counted(stop, self._device).narrow(1, start, stop - start).expand(self._batch, -1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, d_head) of one block and return all that it holds."""
        if self._trunk is not None:
            return self._branched(self._trunk, key_states, value_states, layer_idx)
        length = self._lengths.get(layer_idx, 0)
        total = length + key_states.shape[2]
        buffers = self._buffers.get(layer_idx)
        if buffers is None or buffers[0].shape[2] < total:
            # Doubling makes the cost of appending linear in the length of the text; concatenation is quadratic.
            buffers = (
                self._grown(buffers and buffers[0], key_states, length, total),
                self._grown(buffers and buffers[1], value_states, length, total),
            )
            self._buffers[layer_idx] = buffers
        self._lengths[layer_idx] = total
        # narrow is the cheapest way to slice a tensor, and this runs for every block and token.
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
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
        """Drop all tokens but the first ``keep``.

        Raises:
            ValueError: ``keep`` is negative or larger than :attr:`length`.
        """
        if not 0 <= keep <= self.length:
            raise ValueError(f"keep must be between 0 and {self.length}, got {keep}")
        if keep == 0:
            self._clear()
            return
        self.length = keep
        self.valid = None if self.valid is None else self.valid[:, :keep]
        self._padded = None if self._padded is None else self._padded[:, :keep]
        self._lengths = {block: min(length, keep) for block, length in self._lengths.items()}

    def empty(self) -> KVCache:
        """Make an empty cache of the same kind."""
        return KVCache()

    def branch(self, count: int) -> KVCache:
        """Cache of ``count`` continuations by one token of this cache's text, whose keys and values are not changed.

        Raises:
            ModelError: the model keeps recurrent states, which cannot be shared.
        """
        branch = self.empty()
        branch._trunk = self
        branch.extend(count, self.length, None, self.positions(0, self.length).device)
        return branch

    def _branched(self, trunk: KVCache, keys: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the trunk, expanded to every branch, followed by each branch's own (B, H, 1, d_head)."""
        before = trunk.update(keys[:1, :, :0], values[:1, :, :0], block)
        old_keys, old_values = (one.expand(len(keys), -1, -1, -1) for one in before)
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)

    def _clear(self) -> None:
        self.__init__()  # type: ignore[misc]
