"""A head's logits for a few tokens, the product on which distillation spends most of its time.

A head is the largest matrix of a small model, and a chunk of tokens is thin. A library's product then spends its time
on putting the matrix into an order of its own, whole, for every chunk: 32 Gflop/s where a core has 58. Blocks that stay
in the core's cache take two thirds of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_BLOCK = 512
"""Words of a block: 4 MB at a width of 2,048, the cache of a core."""
_THIN = 256
"""Rows from which on a whole product is as good."""


def head_product(rows: Tensor, weight: Tensor, bias: Tensor | None = None, space: Tensor | None = None) -> Tensor:
    """``rows @ weightᵀ + bias`` (n, V) of rows (n, d) and a head (V, d).

    Args:
        rows: of a chunk.
        weight: of the head.
        bias: (V,)
        space: logits (m, V) of an earlier chunk, m ≥ n, that may be overwritten. Freed and asked for anew, tensors of
            this size leave holes behind that the next does not fit into.
    """
    if not _in_blocks(rows, weight, bias):
        return nn.functional.linear(rows, weight, bias)
    logits = rows.new_empty(len(rows), len(weight)) if space is None else space[: len(rows)]
    words = _BLOCK * torch.get_num_threads()
    for part, block in zip(logits.split(words, dim=1), weight.split(words), strict=True):
        torch.mm(rows, block.t(), out=part)
    return logits if bias is None else logits.add_(bias)


def _in_blocks(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # Other types and devices have kernels of their own, and under autocast the whole head is cast once.
    plain = rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32
    if not plain or rows.dim() != 2 or len(rows) >= _THIN or torch.is_autocast_enabled("cpu"):
        return False
    wanted = rows.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return not (torch.is_grad_enabled() and wanted)
