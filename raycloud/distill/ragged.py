"""Conversion between concatenated tokens of several texts and padded batches with one row per text."""

from __future__ import annotations

import torch
from torch import Tensor


def text_of(offsets: Tensor) -> Tensor:
    """Index (n,) of the text that each of n tokens belongs to, from the start offsets (B + 1,) of the texts."""
    lengths = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)


def mask_of(offsets: Tensor) -> Tensor:
    """Mask (B, N), True for tokens and False for padding; N is the length of the longest text."""
    lengths = offsets.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=offsets.device) < lengths[:, None]


def padded(values: Tensor, offsets: Tensor) -> Tensor:
    """Pad (n, …) to (B, N, …) with zeros after each text. Indexing with :func:`mask_of` is the inverse."""
    mask = mask_of(offsets)
    out = values.new_zeros(*mask.shape, *values.shape[1:])
    return out.masked_scatter(mask.reshape(*mask.shape, *[1] * (values.ndim - 1)), values)
