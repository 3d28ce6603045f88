"""Cache of each text's activations at both ends of a cut: from a text's second visit on only deltas are sent.

AQ-SGD (Wang et al. 2022, arXiv 2206.01299): as a model converges, a text's activations change less and less, and a
delta is rounded more finely than the activations themselves. Both sides add up the rounded values that were sent, so
their caches are equal to the last bit. The cache is saved with the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raycloud.split.finetune.wire_format import EncodedTensor, WireFormat, WireFormats

Cut = Literal["first", "second"]
STATE_PREFIX = "memory/"
"""Prefix of its tensors' names in a checkpoint."""
_VISITS = STATE_PREFIX + "visits"
_ENTRY = np.dtype("<u4")
ENTRY_BYTES = 2 * _ENTRY.itemsize
"""Bytes that identify one text and its number of visits to the other side."""
_TENSOR_BYTES = 700
"""Rough overhead in bytes of a cached tensor beyond its numbers; for short texts it is most of the memory."""


class ActivationCache:
    """Activation cache of one side. It is empty if no cut sends deltas; activations are then sent unchanged.

    Args:
        wire_formats: wire formats, which say at which cuts deltas are sent.
    """

    def __init__(self, wire_formats: WireFormats) -> None:
        self._wire_formats: dict[Cut, WireFormat] = {"first": wire_formats.uplink, "second": wire_formats.downlink}
        self._numbers: dict[Cut, dict[int, Tensor]] = {
            cut: {} for cut, wire_format in self._wire_formats.items() if wire_format.activation_delta
        }
        self._visits: dict[int, int] = {}
        self.nbytes = 0
        """Rough size of the cache in bytes, updated with each text since another thread may read it."""

    @property
    def kept(self) -> bool:
        """Return whether any cut sends deltas."""
        return bool(self._numbers)

    def announce_visits(self, sample_indices: Sequence[int]) -> bytes:
        """Begin a visit of texts; return for the other side their indices and how often each was sent before."""
        visits = [(index, self._visits.get(index, 0)) for index in sample_indices]
        self._count(sample_indices)
        return np.array(visits, _ENTRY).tobytes()

    def read_visits(self, raw: bytes) -> list[int]:
        """Read the other side's announcement of a visit and return the indices of the texts.

        Raises:
            ValueError: the two sides count different numbers of visits.
        """
        announced: list[list[int]] = np.frombuffer(raw, _ENTRY).reshape(-1, 2).tolist()
        for index, visits in announced:
            if (known := self._visits.get(index, 0)) != visits:
                raise ValueError(f"text {index}: one side counts {visits} visits, the other {known}")
        sample_indices = [index for index, _ in announced]
        self._count(sample_indices)
        return sample_indices

    def pack(self, cut: Cut, numbers: Tensor, sample_indices: Sequence[int], counts: Sequence[int]) -> EncodedTensor:
        """Encode activations (n, width) of texts, ``counts`` tokens of each text.

        Raises:
            ValueError: the activations are not all finite.
        """
        wire_format = self._wire_formats[cut]
        if cut not in self._numbers or not sample_indices:
            return wire_format.pack(numbers)
        known = self._known(cut, sample_indices, counts)
        coded = wire_format.pack(numbers.detach().to("cpu", torch.float32) - known)
        self._keep(cut, known + wire_format.unpack(coded, len(known)), sample_indices, counts)
        return coded

    def unpack(self, cut: Cut, coded: EncodedTensor, sample_indices: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Decode activations (n, width) as float32 on the CPU.

        Raises:
            ValueError: the payload has another length, or holds a non-finite number.
        """
        numbers = self._wire_formats[cut].unpack(coded, sum(counts))
        if cut not in self._numbers or not sample_indices:
            return numbers
        numbers += self._known(cut, sample_indices, counts)
        self._keep(cut, numbers, sample_indices, counts)
        return numbers

    def state(self) -> dict[str, Tensor]:
        """State of the cache as plain tensors, for safetensors; empty if no cut sends deltas."""
        if not self.kept:
            return {}
        state = {_VISITS: torch.tensor(sorted(self._visits.items()), dtype=torch.int64).reshape(-1, 2)}
        for cut, texts in self._numbers.items():
            sample_indices = sorted(texts)
            state[f"{STATE_PREFIX}{cut}/sample_indices"] = torch.tensor(
                [[index, len(texts[index])] for index in sample_indices], dtype=torch.int64
            ).reshape(-1, 2)
            empty = torch.empty(0, self._wire_formats[cut].width)
            state[f"{STATE_PREFIX}{cut}/numbers"] = torch.cat([empty, *(texts[index] for index in sample_indices)])
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the cache from a result of :meth:`state`."""
        self._visits = dict(state[_VISITS].tolist()) if _VISITS in state else {}
        self.nbytes = 0
        for cut in self._numbers:
            self._numbers[cut] = {}
            if (listed := state.get(f"{STATE_PREFIX}{cut}/sample_indices")) is not None:
                sample_indices, counts = listed.T.tolist()
                self._keep(cut, state[f"{STATE_PREFIX}{cut}/numbers"], sample_indices, counts)

    def _count(self, sample_indices: Sequence[int]) -> None:
        for index in sample_indices:
            self._visits[index] = self._visits.get(index, 0) + 1

    def _known(self, cut: Cut, sample_indices: Sequence[int], counts: Sequence[int]) -> Tensor:
        texts, width = self._numbers[cut], self._wire_formats[cut].width
        found = [texts.get(index) for index in sample_indices]
        for index, count, numbers in zip(sample_indices, counts, found, strict=True):
            if numbers is not None and len(numbers) != count:
                raise ValueError(f"text {index} has {count} tokens, it had {len(numbers)}")
        return torch.cat(
            [
                torch.zeros(count, width) if numbers is None else numbers
                for count, numbers in zip(counts, found, strict=True)
            ]
        )

    def _keep(self, cut: Cut, numbers: Tensor, sample_indices: Sequence[int], counts: Sequence[int]) -> None:
        # Copies: the caller may change its tensor, and of a text that occurs twice in a batch the last values are kept.
        texts = self._numbers[cut]
        for index, some in zip(sample_indices, numbers.split(list(counts)), strict=True):
            self.nbytes += some.nbytes - (texts[index].nbytes if index in texts else -_TENSOR_BYTES)
            texts[index] = some.clone()
