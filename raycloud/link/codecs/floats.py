"""Codecs that cast hidden states to a floating-point type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.codecs.codec import Codec


@dataclass(frozen=True)
class Cast:
    """Cast to a floating-point type. float16 saturates at its largest value instead of overflowing to infinity."""

    name: str
    dtype: torch.dtype

    def bytes_per_row(self, width: int) -> int:
        """Payload bytes of one hidden state of ``width`` numbers."""
        return width * self.dtype.itemsize

    def encode(self, hidden: Tensor) -> Tensor:
        """Encode hidden states (n, width) as (n, bytes per hidden state) uint8."""
        if self.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max
            hidden = hidden.clamp(-limit, limit)
        return hidden.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, payload: Tensor) -> Tensor:
        """Decode (n, bytes per hidden state) uint8 to hidden states (n, width) float32.

        Raises:
            ValueError: the payload's bytes per hidden state are no multiple of the type's size.
        """
        if payload.dtype != torch.uint8 or payload.shape[-1] % self.dtype.itemsize:
            raise ValueError(f"{self.name} payload must be uint8 rows of a multiple of {self.dtype.itemsize} bytes")
        shape = (*payload.shape[:-1], payload.shape[-1] // self.dtype.itemsize)
        # A copy, since a slice of coded hidden states may begin at any byte and numbers may not.
        return payload.flatten().clone().view(self.dtype).float().view(shape)


CODECS: dict[str, Codec] = {
    "float32": Cast("float32", torch.float32),
    "float16": Cast("float16", torch.float16),
    "bfloat16": Cast("bfloat16", torch.bfloat16),
}
