"""Numbers as bytes: activations rounded to the nearest, gradients by chance, so that they are right on average.

Four bits have uneven levels for activations, denser around zero, that lose a third less (squared) than even steps;
gradients have the latter, as only these can be rounded by chance.

Whoever receives them takes them for what was sent: the rounding is left out of the gradient (a straight-through
estimator), since each side differentiates only what it computes itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.quantised import Even, EvenInt4, Int4, Int8

Form = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""int8 has a float16 scale for each row, int4 one for every 64 numbers, in units of the largest number of all."""

_FLOAT16 = CODECS["float16"]
_INT4_GROUP = 64
_LEVELS = torch.tensor(
    [
        *(-0.8648, -0.6875, -0.5463, -0.4274, -0.3219, -0.2245, -0.1323, -0.0410),
        *(0.0507, 0.1443, 0.2414, 0.3452, 0.4596, 0.5891, 0.7494, 0.9745),
    ]
)
"""What ``fit_levels`` finds for groups of 64 Gaussian numbers, as those of an ``even`` code nearly are."""


@dataclass(frozen=True)
class Coded:
    """Numbers on their way."""

    unit: float
    """What the coded numbers are multiples of."""
    payload: bytes


@dataclass(frozen=True)
class Packing:
    """How rows of numbers cross.

    Args:
        form: of ordinary numbers.
        width: numbers of a row.
        apart: of these the first so many are sent as float16, as they would spoil the scale of the others.
        changes: whether only the change crosses where both sides know a text; see
            :class:`~raycloud.split.finetune.memory.Memory`.
    """

    form: Form
    width: int
    apart: int = 0
    changes: bool = False

    def _steps(self, by_chance: bool) -> Even | Int4 | None:
        """What ordinary numbers are rounded to; None for a floating-point form."""
        rest = max(1, self.width - self.apart)
        match self.form:
            case "int8":
                return Int8(rest, rest)
            case "int4":
                return EvenInt4(rest, _INT4_GROUP) if by_chance else Int4(rest, _INT4_GROUP, _LEVELS)
            case _:
                return None

    @property
    def bytes_per_row(self) -> int:
        """Payload bytes of a row."""
        steps, rest = self._steps(by_chance=False), self.width - self.apart
        if steps is None:
            return CODECS[self.form].bytes_per_row(self.width)
        return _FLOAT16.bytes_per_row(self.apart) + (steps.bytes_per_row(rest) if rest else 0)

    def pack(self, numbers: Tensor, chance: torch.Generator | None = None) -> Coded:
        """Code (n, width) numbers.

        Args:
            numbers: on any device.
            chance: rounds integers up or down by chance, right on average; to the nearest if None.

        Raises:
            ValueError: the numbers are not all finite.
        """
        numbers = numbers.detach().to("cpu", torch.float32)
        if not bool(numbers.isfinite().all()):
            raise ValueError("the numbers are not all finite")
        if self.form in ("float32", "bfloat16"):
            return Coded(1.0, CODECS[self.form].encode(numbers).numpy().tobytes())
        # float16 has no room for the small numbers that gradients are.
        unit = float(numbers.abs().max()) if numbers.numel() else 0.0
        numbers = numbers / (unit or 1.0)
        if self.form == "float16":
            return Coded(unit, _FLOAT16.encode(numbers).numpy().tobytes())
        steps = self._steps(by_chance=chance is not None)
        assert steps is not None
        parts = [_FLOAT16.encode(numbers[:, : self.apart])]
        if rest := self.width - self.apart:
            ordinary = numbers[:, self.apart :]
            if chance is not None and isinstance(steps, Even):
                parts.append(steps.encode(ordinary, torch.rand(len(numbers), rest, generator=chance) - 0.5))
            else:
                parts.append(steps.encode(ordinary))
        return Coded(unit, torch.cat(parts, dim=1).numpy().tobytes())

    def unpack(self, coded: Coded, rows: int, *, by_chance: bool = False) -> Tensor:
        """(rows, width) float32 numbers on the CPU.

        Args:
            coded: by :meth:`pack`.
            rows: how many.
            by_chance: whether that was given one.

        Raises:
            ValueError: the payload has another length, or holds what is no finite number.
        """
        expected = rows * self.bytes_per_row
        if len(coded.payload) != expected:
            raise ValueError(f"{rows} rows of {self.bytes_per_row} bytes have {expected}, got {len(coded.payload)}")
        if rows == 0:
            return torch.empty(0, self.width)
        raw = torch.frombuffer(bytearray(coded.payload), dtype=torch.uint8).view(rows, -1)
        steps = self._steps(by_chance)
        if steps is None:
            numbers = CODECS[self.form].decode(raw)
        else:
            head = _FLOAT16.bytes_per_row(self.apart)
            parts = [_FLOAT16.decode(raw[:, :head])]
            if self.width > self.apart:
                parts.append(steps.decode(raw[:, head:]))
            numbers = torch.cat(parts, dim=1)
        numbers = numbers * coded.unit
        if not bool(numbers.isfinite().all()):
            raise ValueError("the numbers are not all finite")
        return numbers


@dataclass(frozen=True)
class Packings:
    """How numbers cross each cut, rows and gradients alike."""

    first: Packing
    second: Packing

    @property
    def changes(self) -> bool:
        """Whether changes cross at either cut, and so both sides must know which text is which."""
        return self.first.changes or self.second.changes
