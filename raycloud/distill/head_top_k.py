"""Differentiable top-k log-probabilities of every token, without keeping the logits.

A loss that couples several tokens cannot be computed chunk by chunk, but it needs little of each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raycloud.distill.head_loss import LogitsView, to_float32
from raycloud.distill.head_product import head_product


class _HeadTopK(torch.autograd.Function):
    """Saves hidden states, head and ids for the backward pass, which computes the logits of each chunk again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        temperature: float,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        found, found_ids = [], []
        for part in hidden.split(chunk):
            logits = _logits(part, weight, bias, softcap) / temperature
            top = logits.topk(k, dim=-1)
            found.append(top.values - logits.logsumexp(dim=-1, keepdim=True))
            found_ids.append(top.indices)
        log_p, ids = torch.cat(found), torch.cat(found_ids)
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.options = (temperature, softcap, chunk)
        ctx.mark_non_differentiable(ids)
        return log_p, ids

    @staticmethod
    def backward(ctx: Any, d_log_p: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        temperature, softcap, chunk = ctx.options
        wants = ctx.needs_input_grad[:3]
        d_hidden, d_weight, d_bias = (
            torch.zeros_like(one) if want else None for one, want in zip((hidden, weight, bias), wants, strict=True)
        )
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            logits = _logits(hidden[at], weight, bias, softcap)
            given = d_log_p[at].to(logits.dtype)
            d_logits = (logits / temperature).softmax(dim=-1) * -given.sum(dim=-1, keepdim=True)
            d_logits.scatter_add_(1, ids[at], given).div_(temperature)
            if softcap:
                d_logits *= 1 - (logits / softcap) ** 2
            d_logits = d_logits.to(torch.promote_types(hidden.dtype, weight.dtype))
            if d_hidden is not None:
                d_hidden[at] = (d_logits @ weight.to(d_logits.dtype)).to(hidden.dtype)
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[at].to(d_logits.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    return to_float32(head_product(hidden, weight, bias), softcap)


@torch.no_grad()
def head_log_p(view: LogitsView, ids: Tensor, *, chunk: int = 64) -> Tensor:
    """Log-probability (n,) of one given token id (n,) at each token, without a gradient."""
    parts = zip(view.hidden.split(chunk), ids.split(chunk), strict=True)
    found = [
        -nn.functional.cross_entropy(_logits(hidden, view.weight, view.bias, view.softcap), some_ids, reduction="none")
        for hidden, some_ids in parts
    ]
    return torch.cat(found)


def head_top_k(view: LogitsView, k: int, temperature: float = 1.0, *, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, k) of the ``k`` most likely ids at each token, in descending order, and these ids (n, k).

    Args:
        view: hidden states and head; each gets a gradient if it requires one.
        k: number of ids; capped at the vocabulary size.
        temperature: divides the logits.
        chunk: number of tokens whose logits exist at a time.
    """
    k = min(k, view.weight.shape[0])
    log_p, ids = _HeadTopK.apply(view.hidden, view.weight, view.bias, k, temperature, view.softcap, chunk)
    return log_p, ids
