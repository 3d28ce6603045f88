"""The likeliest words of every token, differentiable, without keeping the logits they come from.

A loss that couples tokens with each other cannot be taken chunk by chunk; what it needs of each is small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raycloud.distill.head_loss import Lane, widened
from raycloud.distill.head_product import head_product


class _HeadTop(torch.autograd.Function):
    """Keeps rows and what it returns; the backward pass computes the logits of a chunk once more."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        temperature: float,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        found, ids = [], []
        for part in rows.split(chunk):
            logits = _logits(part, weight, bias, softcap) / temperature
            top = logits.topk(k, dim=-1)
            found.append(top.values - logits.logsumexp(dim=-1, keepdim=True))
            ids.append(top.indices)
        log_p, which = torch.cat(found), torch.cat(ids)
        ctx.save_for_backward(rows, weight, bias, which)
        ctx.options = (temperature, softcap, chunk)
        ctx.mark_non_differentiable(which)
        return log_p, which

    @staticmethod
    def backward(ctx: Any, d_log_p: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, ids = ctx.saved_tensors
        temperature, softcap, chunk = ctx.options
        wants = ctx.needs_input_grad[:3]
        d_rows, d_weight, d_bias = (
            torch.zeros_like(one) if want else None for one, want in zip((rows, weight, bias), wants, strict=True)
        )
        for start in range(0, len(rows), chunk):
            at = slice(start, start + chunk)
            logits = _logits(rows[at], weight, bias, softcap)
            given = d_log_p[at].to(logits.dtype)
            d_logits = (logits / temperature).softmax(dim=-1) * -given.sum(dim=-1, keepdim=True)
            d_logits.scatter_add_(1, ids[at], given).div_(temperature)
            if softcap:
                d_logits *= 1 - (logits / softcap) ** 2
            d_logits = d_logits.to(torch.promote_types(rows.dtype, weight.dtype))
            if d_rows is not None:
                d_rows[at] = (d_logits @ weight.to(d_logits.dtype)).to(rows.dtype)
            if d_weight is not None:
                d_weight += d_logits.T @ rows[at].to(d_logits.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        return d_rows, d_weight, d_bias, None, None, None, None


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    return widened(head_product(rows, weight, bias), softcap)


@torch.no_grad()
def head_log_p(lane: Lane, words: Tensor, *, chunk: int = 64) -> Tensor:
    """The log-probability (n,) of one word (n,) of each token, without a gradient."""
    parts = zip(lane.rows.split(chunk), words.split(chunk), strict=True)
    found = [
        -nn.functional.cross_entropy(_logits(rows, lane.weight, lane.bias, lane.softcap), which, reduction="none")
        for rows, which in parts
    ]
    return torch.cat(found)


def head_top(lane: Lane, k: int, temperature: float = 1.0, *, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, k) of each token's ``k`` likeliest words, from the likeliest down, and their ids (n, k).

    Args:
        lane: rows and head; both get gradients where they want them.
        k: words; at most the vocabulary.
        temperature: divides the logits.
        chunk: tokens whose logits exist at a time.
    """
    k = min(k, lane.weight.shape[0])
    log_p, ids = _HeadTop.apply(lane.rows, lane.weight, lane.bias, k, temperature, lane.softcap, chunk)
    return log_p, ids
