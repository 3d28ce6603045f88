"""What both ends of a cut remember of each text: from its second visit on only the change of its numbers crosses.

AQ-SGD (Wang et al. 2022, arXiv 2206.01299): as a model settles, a text's activations change less and less, and a change
is rounded more finely than what it is a change of. Both sides add up what has crossed, rounded as it was, and so
remember the same to the last bit. It is kept with the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raycloud.split.finetune.numbers import Coded, Packing, Packings

Cut = Literal["first", "second"]
MEMORY = "memory/"
"""Of the names that it is saved under."""
_VISITS = MEMORY + "visits"
_ENTRY = np.dtype("<u4")
ENTRY_BYTES = 2 * _ENTRY.itemsize
"""That tell the other side of one text."""
_TENSOR_BYTES = 700
"""That a tensor and its place among others take beside its numbers, roughly: of short texts they are most."""


class Memory:
    """One side's. Where no cut sends changes it is empty, and numbers cross as they are.

    Args:
        packings: say at which cuts changes cross.
    """

    def __init__(self, packings: Packings) -> None:
        self._packings: dict[Cut, Packing] = {"first": packings.first, "second": packings.second}
        self._numbers: dict[Cut, dict[int, Tensor]] = {
            cut: {} for cut, packing in self._packings.items() if packing.changes
        }
        self._visits: dict[int, int] = {}
        self.nbytes = 0
        """Roughly, of all that is remembered; counted as it comes, for another thread may ask."""

    @property
    def kept(self) -> bool:
        """Whether anything is remembered at all."""
        return bool(self._numbers)

    def announce(self, places: Sequence[int]) -> bytes:
        """Begin a visit of texts; for the other side, which they are and how often each has crossed before."""
        told = [(place, self._visits.get(place, 0)) for place in places]
        self._count(places)
        return np.array(told, _ENTRY).tobytes()

    def heard(self, raw: bytes) -> list[int]:
        """Likewise at the other side: which texts they are.

        Raises:
            ValueError: the sides do not remember the same of them.
        """
        told: list[list[int]] = np.frombuffer(raw, _ENTRY).reshape(-1, 2).tolist()
        for place, visits in told:
            if (known := self._visits.get(place, 0)) != visits:
                raise ValueError(f"text {place} crossed {visits} times for one side and {known} for the other")
        places = [place for place, _ in told]
        self._count(places)
        return places

    def pack(self, cut: Cut, numbers: Tensor, places: Sequence[int], counts: Sequence[int]) -> Coded:
        """Code (n, width) numbers of texts, ``counts`` of each one.

        Raises:
            ValueError: they are not all finite.
        """
        packing = self._packings[cut]
        if cut not in self._numbers or not places:
            return packing.pack(numbers)
        known = self._known(cut, places, counts)
        coded = packing.pack(numbers.detach().to("cpu", torch.float32) - known)
        self._keep(cut, known + packing.unpack(coded, len(known)), places, counts)
        return coded

    def unpack(self, cut: Cut, coded: Coded, places: Sequence[int], counts: Sequence[int]) -> Tensor:
        """(n, width) float32 numbers on the CPU.

        Raises:
            ValueError: the payload has another length, or holds what is no finite number.
        """
        numbers = self._packings[cut].unpack(coded, sum(counts))
        if cut not in self._numbers or not places:
            return numbers
        numbers += self._known(cut, places, counts)
        self._keep(cut, numbers, places, counts)
        return numbers

    def state(self) -> dict[str, Tensor]:
        """As plain tensors, for safetensors; nothing where nothing is remembered."""
        if not self.kept:
            return {}
        state = {_VISITS: torch.tensor(sorted(self._visits.items()), dtype=torch.int64).reshape(-1, 2)}
        for cut, texts in self._numbers.items():
            places = sorted(texts)
            state[f"{MEMORY}{cut}/places"] = torch.tensor(
                [[place, len(texts[place])] for place in places], dtype=torch.int64
            ).reshape(-1, 2)
            empty = torch.empty(0, self._packings[cut].width)
            state[f"{MEMORY}{cut}/numbers"] = torch.cat([empty, *(texts[place] for place in places)])
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Remember what was remembered when :meth:`state` was taken."""
        self._visits = dict(state[_VISITS].tolist()) if _VISITS in state else {}
        self.nbytes = 0
        for cut in self._numbers:
            self._numbers[cut] = {}
            if (listed := state.get(f"{MEMORY}{cut}/places")) is not None:
                places, counts = listed.T.tolist()
                self._keep(cut, state[f"{MEMORY}{cut}/numbers"], places, counts)

    def _count(self, places: Sequence[int]) -> None:
        for place in places:
            self._visits[place] = self._visits.get(place, 0) + 1

    def _known(self, cut: Cut, places: Sequence[int], counts: Sequence[int]) -> Tensor:
        texts, width = self._numbers[cut], self._packings[cut].width
        found = [texts.get(place) for place in places]
        for place, count, numbers in zip(places, counts, found, strict=True):
            if numbers is not None and len(numbers) != count:
                raise ValueError(f"text {place} has {count} rows, it had {len(numbers)}")
        return torch.cat(
            [
                torch.zeros(count, width) if numbers is None else numbers
                for count, numbers in zip(counts, found, strict=True)
            ]
        )

    def _keep(self, cut: Cut, numbers: Tensor, places: Sequence[int], counts: Sequence[int]) -> None:
        # Copies: what is handed on may be changed, and a text seen twice at once is remembered as it was last.
        texts = self._numbers[cut]
        for place, some in zip(places, numbers.split(list(counts)), strict=True):
            self.nbytes += some.nbytes - (texts[place].nbytes if place in texts else -_TENSOR_BYTES)
            texts[place] = some.clone()
