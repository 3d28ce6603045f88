"""What a codec is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """Turns rows into bytes and back."""

    @property
    def name(self) -> str:
        """What recipes call it."""
        ...

    def bytes_per_row(self, width: int) -> int:
        """Payload bytes of one row of ``width`` numbers."""
        ...

    def encode(self, rows: Tensor) -> Tensor:
        """(n, width) numbers to (n, bytes per row) uint8."""
        ...

    def decode(self, payload: Tensor) -> Tensor:
        """(n, bytes per row) uint8 to (n, width) float32; finite where the floats in the payload are."""
        ...


def check_width(name: str, expected: int, width: int) -> None:
    """Raises ValueError where a codec made for rows of one width meets rows of another."""
    if width != expected:
        raise ValueError(f"{name} is calibrated for rows of {expected} numbers, got {width}")


def check_payload(name: str, expected: int, payload: Tensor) -> None:
    """Raises ValueError where a payload is not uint8 rows of the expected bytes."""
    if payload.dtype != torch.uint8 or payload.ndim != 2 or payload.shape[1] != expected:
        raise ValueError(f"{name} payload must be uint8 rows of {expected} bytes, got {tuple(payload.shape)}")
