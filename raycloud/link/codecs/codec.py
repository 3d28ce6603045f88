"""Interface of a codec."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Codec of hidden states: numbers to bytes and back."""

    @property
    def name(self) -> str:
        """Name of the codec in recipes."""
        ...

    def bytes_per_row(self, width: int) -> int:
        """Payload bytes of one hidden state of ``width`` numbers."""
        ...

    def encode(self, hidden: Tensor) -> Tensor:
        """Encode hidden states (n, width) as (n, bytes per hidden state) uint8."""
        ...

    def decode(self, payload: Tensor) -> Tensor:
        """Decode (n, bytes per hidden state) uint8 to (n, width) float32; finite where the floats in it are."""
        ...


def check_width(name: str, expected: int, width: int) -> None:
    """Raise ValueError if hidden states have another width than the codec was made for."""
    if width != expected:
        raise ValueError(f"{name} is calibrated for hidden states of {expected} numbers, got {width}")


def check_payload(name: str, expected: int, payload: Tensor) -> None:
    """Raise ValueError if a payload is not (n, ``expected``) uint8."""
    if payload.dtype != torch.uint8 or payload.ndim != 2 or payload.shape[1] != expected:
        raise ValueError(f"{name} payload must be uint8 rows of {expected} bytes, got {tuple(payload.shape)}")
