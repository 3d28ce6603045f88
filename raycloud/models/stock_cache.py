"""Cache that the library's own forward takes: our keys and values, and the library's recurrent states."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from raycloud.errors import ModelError
from raycloud.models.cache import KVCache


def cache_argument(accepted: Collection[str]) -> str:
    """Name of the argument in which the library's forwards take a cache, of the names that a forward accepts."""
    return "cache_params" if "cache_params" in accepted else "past_key_values"


def states_of(layer: Any) -> Iterator[Tensor]:
    """Convolution and recurrent states of one layer of a cache of the library; none before its first forward."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for state in (*layer.conv_states.values(), *layer.recurrent_states.values()):
            if state is not None:
                yield state


class StockCache(KVCache, DynamicCache):
    """KV cache that also answers what the library's base models ask of theirs.

    Keys and values are kept as in :class:`~raycloud.models.cache.KVCache`, all of them in blocks with a sliding window
    too. Recurrent and convolution states are the library's.

    Args:
        config: configuration of the model.
        rolls_back: whether it holds keys and values only, so that tokens can be dropped.
    """

    def __init__(self, config: PretrainedConfig, *, rolls_back: bool = True) -> None:
        DynamicCache.__init__(self, config=config)
        KVCache.__init__(self)
        self._config, self._rolls_back, self._start = config, rolls_back, 0

    @contextmanager
    def at(self, start: int, blocks: range, stop: int) -> Iterator[None]:
        """Context of a forward of ``blocks`` over the tokens ``[start, stop)``."""
        self._start = start
        yield
        # A block with a recurrent state alone never calls update.
        self._lengths |= dict.fromkeys(blocks, stop)

    def empty(self) -> StockCache:
        """Make an empty cache of the same kind."""
        return StockCache(self._config, rolls_back=self._rolls_back)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens before those of the current forward."""
        return self._start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the position of the first token of the current forward."""
        return self._start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys after ``query_length`` more tokens, and the first key's position."""
        return self._start + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether there are tokens before those of the current forward."""
        return self._start > 0

    @property
    def is_sliding(self) -> list[bool]:
        """False for each block: none keeps only a window of its keys."""
        return [False] * len(self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent and convolution states."""
        return sum(state.nbytes for state in self._states())

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values and states."""
        return super().nbytes + self.state_bytes

    def wipe(self) -> None:
        """Overwrite keys, values and states with zeros and drop all tokens."""
        for state in self._states():
            state.zero_()
        super().wipe()

    def _states(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from states_of(layer)

    def crop(self, keep: int) -> None:
        """Drop all tokens but the first ``keep``.

        Raises:
            ModelError: the model's recurrent states cannot be rolled back.
            ValueError: ``keep`` is negative or larger than :attr:`length`.
        """
        if not self._rolls_back and 0 < keep < self.length:
            raise ModelError(
                f"a '{self._config.model_type}' model keeps recurrent states, which cannot be rolled back from "
                f"{self.length} to {keep} tokens"
            )
        super().crop(keep)

    def branch(self, count: int) -> KVCache:
        """Cache of ``count`` continuations by one token; see :meth:`KVCache.branch`."""
        if not self._rolls_back:
            raise ModelError(
                f"a '{self._config.model_type}' model keeps recurrent states, which several continuations of a text "
                "cannot share"
            )
        return super().branch(count)

    def _clear(self) -> None:
        self.__init__(self._config, rolls_back=self._rolls_back)  # type: ignore[misc]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H, T, d_head) of one block and return all that it holds."""
        return KVCache.update(self, key_states, value_states, layer_idx)
