"""Matrix product of hidden states and a head, blocked for CPU caches. Distillation spends most of its time here.

The head is the largest matrix of a small model, and a chunk has few tokens. The library's product repacks the whole
matrix for every chunk and reaches 32 Gflop/s where a core can do 58. Blocks that fit the core's cache need two thirds
of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK = 512
"""Vocabulary rows of a block: 4 MB at a width of 2,048, the size of a core's cache."""
_MAX_BLOCKED_TOKENS = 256
"""Number of tokens from which an unblocked product is as fast."""


def head_product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, buffer: Tensor | None = None) -> Tensor:
    """Compute ``hidden @ weightᵀ + bias`` (n, V) for hidden states (n, d) and a head (V, d).

    Args:
        hidden: hidden states (n, d) of a chunk.
        weight: head (V, d).
        bias: (V,)
        buffer: logits (m, V) of an earlier chunk, m ≥ n, that may be overwritten. Allocating such
            tensors for every chunk fragments the memory.
    """
    if not _in_blocks(hidden, weight, bias):
        return nn.functional.linear(hidden, weight, bias)
    logits = hidden.new_empty(len(hidden), len(weight)) if buffer is None else buffer[: len(hidden)]
    block_size = _BLOCK * torch.get_num_threads()
    for part, block in zip(logits.split(block_size, dim=1), weight.split(block_size), strict=True):
        torch.mm(hidden, block.t(), out=part)
    return logits if bias is None else logits.add_(bias)


def _in_blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # Other dtypes and devices have kernels of their own, and under autocast the whole head is cast once.
    plain = hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.float32
    if not plain or hidden.dim() != 2 or len(hidden) >= _MAX_BLOCKED_TOKENS or torch.is_autocast_enabled("cpu"):
        return False
    wanted = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return not (torch.is_grad_enabled() and wanted)
