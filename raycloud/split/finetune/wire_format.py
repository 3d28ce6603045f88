"""Wire format of numbers: activations are rounded to the nearest, gradients with stochastic rounding (unbiased).

Four bits have uneven levels for activations, denser around zero, with a third less squared error than even steps;
gradients use even steps, as only these allow stochastic rounding.

The rounding is ignored in the gradient (a straight-through estimator), since each side differentiates only what it
computes itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.quantised import Int4, Int8, UniformInt4, UniformQuantiser
from raycloud.split.finetune.wire_dtype import WireDType

_FLOAT16 = CODECS["float16"]
_INT4_GROUP = 64
_LEVELS = torch.tensor(
    [
        *(-0.8648, -0.6875, -0.5463, -0.4274, -0.3219, -0.2245, -0.1323, -0.0410),
        *(0.0507, 0.1443, 0.2414, 0.3452, 0.4596, 0.5891, 0.7494, 0.9745),
    ]
)
"""Levels that ``fit_levels`` finds for groups of 64 Gaussian numbers; those of an ``even`` bottleneck are nearly so."""


@dataclass(frozen=True)
class EncodedTensor:
    """Coded numbers as they are sent."""

    scale: float
    """Scale of the coded numbers."""
    payload: bytes


@dataclass(frozen=True)
class WireFormat:
    """Wire format of tensors (n, width).

    Args:
        dtype: wire dtype of ordinary numbers.
        width: numbers per token.
        num_outliers: number of outliers, the first ones; sent as float16, as they would spoil the scale of the others.
        activation_delta: True to send only the activation delta of a text that both sides have; see
            :class:`~raycloud.split.finetune.activation_cache.ActivationCache`.
    """

    dtype: WireDType
    width: int
    num_outliers: int = 0
    activation_delta: bool = False

    def _quantiser(self, stochastic: bool) -> UniformQuantiser | Int4 | None:
        """Quantiser of ordinary numbers; None for a floating-point dtype."""
        rest = max(1, self.width - self.num_outliers)
        match self.dtype:
            case "int8":
                return Int8(rest, rest)
            case "int4":
                return UniformInt4(rest, _INT4_GROUP) if stochastic else Int4(rest, _INT4_GROUP, _LEVELS)
            case _:
                return None

    @property
    def bytes_per_row(self) -> int:
        """Payload bytes per token."""
        steps, rest = self._quantiser(stochastic=False), self.width - self.num_outliers
        if steps is None:
            return CODECS[self.dtype].bytes_per_row(self.width)
        return _FLOAT16.bytes_per_row(self.num_outliers) + (steps.bytes_per_row(rest) if rest else 0)

    def pack(self, numbers: Tensor, generator: torch.Generator | None = None) -> EncodedTensor:
        """Encode numbers (n, width).

        Args:
            numbers: tensor on any device.
            generator: generator of stochastic rounding to integers; rounds to the nearest if None.

        Raises:
            ValueError: the numbers are not all finite.
        """
        numbers = numbers.detach().to("cpu", torch.float32)
        if not bool(numbers.isfinite().all()):
            raise ValueError("the numbers are not all finite")
        if self.dtype in ("float32", "bfloat16"):
            return EncodedTensor(1.0, CODECS[self.dtype].encode(numbers).numpy().tobytes())
        # float16 cannot represent numbers as small as gradients.
        unit = float(numbers.abs().max()) if numbers.numel() else 0.0
        numbers = numbers / (unit or 1.0)
        if self.dtype == "float16":
            return EncodedTensor(unit, _FLOAT16.encode(numbers).numpy().tobytes())
        steps = self._quantiser(stochastic=generator is not None)
        assert steps is not None
        parts = [_FLOAT16.encode(numbers[:, : self.num_outliers])]
        if rest := self.width - self.num_outliers:
            ordinary = numbers[:, self.num_outliers :]
            if generator is not None and isinstance(steps, UniformQuantiser):
                parts.append(steps.encode(ordinary, torch.rand(len(numbers), rest, generator=generator) - 0.5))
            else:
                parts.append(steps.encode(ordinary))
        return EncodedTensor(unit, torch.cat(parts, dim=1).numpy().tobytes())

    def unpack(self, coded: EncodedTensor, tokens: int, *, stochastic: bool = False) -> Tensor:
        """Decode (n, width) float32 numbers on the CPU.

        Args:
            coded: result of :meth:`pack`.
            tokens: number of tokens.
            stochastic: True if :meth:`pack` had a generator.

        Raises:
            ValueError: the payload has another length, or holds a non-finite number.
        """
        expected = tokens * self.bytes_per_row
        if len(coded.payload) != expected:
            raise ValueError(f"{tokens} tokens of {self.bytes_per_row} bytes have {expected}, got {len(coded.payload)}")
        if tokens == 0:
            return torch.empty(0, self.width)
        raw = torch.frombuffer(bytearray(coded.payload), dtype=torch.uint8).view(tokens, -1)
        steps = self._quantiser(stochastic)
        if steps is None:
            numbers = CODECS[self.dtype].decode(raw)
        else:
            head = _FLOAT16.bytes_per_row(self.num_outliers)
            parts = [_FLOAT16.decode(raw[:, :head])]
            if self.width > self.num_outliers:
                parts.append(steps.decode(raw[:, head:]))
            numbers = torch.cat(parts, dim=1)
        numbers = numbers * coded.scale
        if not bool(numbers.isfinite().all()):
            raise ValueError("the numbers are not all finite")
        return numbers


@dataclass(frozen=True)
class WireFormats:
    """Wire formats of both cuts, for activations and gradients."""

    uplink: WireFormat
    downlink: WireFormat

    @property
    def activation_delta(self) -> bool:
        """Return whether deltas are sent at either cut, so that both sides must identify texts."""
        return self.uplink.activation_delta or self.downlink.activation_delta
