"""The head and a loss on its logits in one op over chunks of tokens.

A language model's logits are its largest tensor by far: 2,048 positions of a 49,152-word vocabulary are 0.4 GB, and a
divergence between two models makes half a dozen of them. Here logits exist for a chunk of tokens at a time: the loss of
the chunk is taken, its gradient pulled back through the head at once, and the logits are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""(logits (c, V) in float32, which tokens) -> the sum of each term over the chunk, (terms,)."""


class _HeadLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass: three matrix products where recomputing would take four."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        term_weights: Tensor,
        loss: ChunkLoss,
        softcap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_rows = torch.zeros_like(rows) if wants_rows else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        sums = torch.zeros(len(term_weights), dtype=torch.float64, device=rows.device)
        for start in range(0, len(rows), chunk):
            at = slice(start, min(start + chunk, len(rows)))
            raw = nn.functional.linear(rows[at], weight, bias).detach()
            raw.requires_grad_(wants_rows or wants_weight or wants_bias)
            terms, d_logits = _chunk(raw, at, term_weights, loss, softcap)
            sums += terms
            del raw  # or it would live on beside the next chunk's
            if d_logits is None:
                continue
            # Under autocast the logits are in half precision, and so are these products; their sums are not.
            if d_rows is not None:
                d_rows[at] = d_logits @ weight.to(d_logits.dtype)
            if d_weight is not None and d_logits.dtype == weight.dtype:
                d_weight.addmm_(d_logits.t(), rows[at].to(weight.dtype))
            elif d_weight is not None:
                d_weight += d_logits.t() @ rows[at].to(d_logits.dtype)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
            del d_logits
        ctx.gradients = (d_rows, d_weight, d_bias)
        ctx.mark_non_differentiable(sums)
        return (sums * term_weights.to(sums.dtype)).sum().to(torch.promote_types(rows.dtype, torch.float32)), sums

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a head loss can be taken once")
        # Scaled in place: the head's gradient is as large as the head.
        gradients = tuple(None if gradient is None else gradient.mul_(d_total) for gradient in ctx.gradients)
        ctx.gradients = None
        return (*gradients, None, None, None, None)


def _chunk(
    raw: Tensor, at: slice, term_weights: Tensor, loss: ChunkLoss, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """The sums of the terms, and the gradient of their weighted sum in the head's output (None if there is none)."""
    with torch.enable_grad():
        logits = raw if raw.dtype == torch.float64 else raw.float()
        if softcap:
            logits = torch.tanh(logits / softcap) * softcap
        terms = loss(logits, at)
        del logits
        total = (terms * term_weights.to(terms.dtype)).sum()
        return terms.detach(), torch.autograd.grad(total, raw)[0] if total.requires_grad else None


def head_loss(
    rows: Tensor,
    head: nn.Linear,
    loss: ChunkLoss,
    term_weights: Tensor,
    *,
    softcap: float | None = None,
    chunk: int = 128,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms of ``loss`` over all tokens, and the raw sum of every term.

    Args:
        rows: (n, d), what enters the head.
        head: a linear map to (n, V); a frozen one gets no gradient and costs none.
        loss: see :data:`ChunkLoss`.
        term_weights: (terms,).
        softcap: logits become ``softcap · tanh(logits / softcap)`` where given.
        chunk: tokens whose logits exist at a time.

    Returns:
        The differentiable scalar, and the detached raw sums (terms,) in float64.
    """
    total, sums = _HeadLoss.apply(rows, head.weight, head.bias, term_weights, loss, softcap, chunk)
    return total, sums
