"""Rows as floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.codecs.codec import Codec


@dataclass(frozen=True)
class Cast:
    """Rows in a floating-point type. float16 saturates at its largest value instead of overflowing to infinity."""

    name: str
    dtype: torch.dtype

    def bytes_per_row(self, width: int) -> int:
        """Payload bytes of one row of ``width`` numbers."""
        return width * self.dtype.itemsize

    def encode(self, rows: Tensor) -> Tensor:
        """(n, width) numbers to (n, bytes per row) uint8."""
        if self.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max
            rows = rows.clamp(-limit, limit)
        return rows.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, payload: Tensor) -> Tensor:
        """(n, bytes per row) uint8 to (n, width) float32.

        Raises:
            ValueError: the payload is not whole numbers of this type.
        """
        if payload.dtype != torch.uint8 or payload.shape[-1] % self.dtype.itemsize:
            raise ValueError(f"{self.name} payload must be uint8 rows of a multiple of {self.dtype.itemsize} bytes")
        shape = (*payload.shape[:-1], payload.shape[-1] // self.dtype.itemsize)
        # A copy, since a slice of coded rows may begin at any byte and numbers may not.
        return payload.flatten().clone().view(self.dtype).float().view(shape)


CODECS: dict[str, Codec] = {
    "float32": Cast("float32", torch.float32),
    "float16": Cast("float16", torch.float16),
    "bfloat16": Cast("bfloat16", torch.bfloat16),
}
