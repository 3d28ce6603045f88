"""Heads and a loss on their logits in one op over chunks of tokens.

A language model's logits are its largest tensor by far: 2,048 positions of a 49,152-word vocabulary are 0.4 GB, and a
divergence between two models makes half a dozen of them. Here logits exist for a chunk of tokens at a time: the loss of
the chunk is taken, its gradient pulled back through the heads at once, and the logits are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raycloud.distill.head_product import head_product

ChunkLoss = Callable[..., Tensor]
"""(logits (c, V) in float32 of each lane, which tokens) -> the sum of each term over the chunk, (terms,)."""


@dataclass(frozen=True)
class Lane:
    """Rows on their way through a head. What needs no gradient, such as a frozen head, gets none and costs none."""

    rows: Tensor
    """(n, d)"""
    weight: Tensor
    """(V, d)"""
    bias: Tensor | None = None
    softcap: float | None = None
    """Logits become ``softcap · tanh(logits / softcap)`` where given."""

    @classmethod
    def of(cls, rows: Tensor, head: nn.Linear, softcap: float | None = None, *, frozen: bool = False) -> Lane:
        """Rows and a head; a frozen one is a constant for the gradient."""
        if frozen:
            return cls(rows, head.weight.detach(), None if head.bias is None else head.bias.detach(), softcap)
        return cls(rows, head.weight, head.bias, softcap)

    def logits(self) -> Tensor:
        """All of them at once (n, V), in float32 or better: for small inputs, and what cannot be had by chunks."""
        return widened(nn.functional.linear(self.rows, self.weight, self.bias), self.softcap)


class _HeadLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass: three matrix products where recomputing would take four."""

    @staticmethod
    def forward(
        ctx: Any,
        term_weights: Tensor,
        loss: ChunkLoss,
        softcaps: Sequence[float | None],
        chunk: int,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[4:]
        gradients = [torch.zeros_like(one) if want else None for one, want in zip(tensors, wanted, strict=True)]
        lanes = [tensors[at : at + 3] for at in range(0, len(tensors), 3)]
        spaces: Sequence[Tensor | None] = [None] * len(lanes)
        rows = lanes[0][0]
        sums = torch.zeros(len(term_weights), dtype=torch.float64, device=rows.device)
        for start in range(0, len(rows), chunk):
            at = slice(start, min(start + chunk, len(rows)))
            raw = [
                head_product(lane_rows[at], weight, bias, space).detach().requires_grad_(any(wanted[3 * lane :][:3]))
                for lane, ((lane_rows, weight, bias), space) in enumerate(zip(lanes, spaces, strict=True))
            ]
            if start == 0 and rows.device.type == "cpu":
                spaces = [one.detach() for one in raw]
            terms, found = _chunk(raw, at, term_weights, loss, softcaps)
            sums += terms
            del raw  # or it would live on beside the next chunk's
            for lane, d_logits in enumerate(found):
                if d_logits is not None:
                    lane_rows, weight, _ = lanes[lane]
                    _add(gradients[3 * lane : 3 * lane + 3], d_logits, lane_rows[at], weight, at)
            del found
        ctx.gradients = gradients
        ctx.mark_non_differentiable(sums)
        return (sums * term_weights.to(sums.dtype)).sum().to(torch.promote_types(rows.dtype, torch.float32)), sums

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a head loss can be taken once")
        # Scaled in place: the head's gradient is as large as the head.
        gradients = tuple(None if gradient is None else gradient.mul_(d_total) for gradient in ctx.gradients)
        ctx.gradients = None
        return (None, None, None, None, *gradients)


def _add(gradients: Sequence[Tensor | None], d_logits: Tensor, rows: Tensor, weight: Tensor, at: slice) -> None:
    """Pull the gradient of a chunk's logits (c, V) back into those of its rows, its head and its bias."""
    d_rows, d_weight, d_bias = gradients
    # Under autocast the logits are in half precision, and so are these products; their sums are not.
    if d_rows is not None:
        d_rows[at] = d_logits @ weight.to(d_logits.dtype)
    if d_weight is not None and d_logits.dtype == weight.dtype:
        d_weight.addmm_(d_logits.t(), rows.to(weight.dtype))
    elif d_weight is not None:
        d_weight += d_logits.t() @ rows.to(d_logits.dtype)
    if d_bias is not None:
        d_bias += d_logits.sum(dim=0)


def _chunk(
    raw: Sequence[Tensor], at: slice, term_weights: Tensor, loss: ChunkLoss, softcaps: Sequence[float | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sums of the terms, and the gradients of their weighted sum in the heads' outputs (None for those without)."""
    with torch.enable_grad():
        logits = [widened(one, cap) for one, cap in zip(raw, softcaps, strict=True)]
        terms = loss(*logits, at)
        del logits
        total = (terms * term_weights.to(terms.dtype)).sum()
        asked = [one for one in raw if one.requires_grad]
        if not total.requires_grad or not asked:
            return terms.detach(), [None] * len(raw)
        found = iter(torch.autograd.grad(total, asked, allow_unused=True))
        return terms.detach(), [next(found) if one.requires_grad else None for one in raw]


def widened(raw: Tensor, softcap: float | None) -> Tensor:
    """A head's output in float32 or better, as ``softcap · tanh(raw / softcap)`` where there is a cap."""
    logits = raw if raw.dtype == torch.float64 else raw.float()
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def head_loss(
    lanes: Sequence[Lane], loss: ChunkLoss, term_weights: Tensor, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms of ``loss`` over all tokens, and the raw sum of every term.

    Args:
        lanes: rows of the same n tokens and the heads they go through.
        loss: see :data:`ChunkLoss`.
        term_weights: (terms,).
        chunk: tokens whose logits exist at a time.

    Returns:
        The differentiable scalar, and the detached raw sums (terms,) in float64.
    """
    tensors = [tensor for lane in lanes for tensor in (lane.rows, lane.weight, lane.bias)]
    total, sums = _HeadLoss.apply(term_weights, loss, [lane.softcap for lane in lanes], chunk, *tensors)
    return total, sums
