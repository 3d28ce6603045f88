"""From tokens of several texts one after the other to one row of tokens per text, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def text_of(offsets: Tensor) -> Tensor:
    """Which text each of n tokens is of (n,), from where each text begins, (B + 1,)."""
    lengths = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)


def mask_of(offsets: Tensor) -> Tensor:
    """(B, N), True for tokens and False for padding; N is the longest text."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=offsets.device) < lengths[:, None]


def padded(values: Tensor, offsets: Tensor) -> Tensor:
    """(n, …) to (B, N, …) with zeros behind each text; indexing with :func:`mask_of` is the way back."""
    mask = mask_of(offsets)
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.masked_scatter(mask.reshape(*mask.shape, *[1] * (values.ndim - 1)), values)
