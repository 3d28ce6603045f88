"""Heads and a loss on their logits as one autograd op over chunks of tokens.

Logits are by far the largest tensor of a language model: 2,048 positions with a vocabulary of 49,152 take 0.4 GB, and a
divergence between two models makes half a dozen such tensors. Here logits exist for one chunk of tokens at a time: the
chunk's loss is computed, its gradient is propagated through the heads immediately, and the logits are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raycloud.distill.head_product import head_product

ChunkLoss = Callable[..., Tensor]
"""(float32 logits (c, V) of each view, slice of tokens) -> the sum of each term over the chunk, (terms,)."""


@dataclass(frozen=True)
class LogitsView:
    """Hidden states and the head that maps them to logits. Tensors that need no gradient, such as a frozen head, add no
    cost."""

    hidden: Tensor
    """(n, d)"""
    weight: Tensor
    """(V, d)"""
    bias: Tensor | None = None
    softcap: float | None = None
    """Logits become ``softcap · tanh(logits / softcap)`` if given."""

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        head: nn.Linear,
        softcap: float | None = None,
        scale: float = 1.0,
        *,
        frozen: bool = False,
    ) -> LogitsView:
        """Combine hidden states and a head whose output is multiplied by ``scale``; ``frozen`` detaches the head."""
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if frozen:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        if scale != 1.0:  # the hidden states are far smaller than the head
            hidden, bias = hidden * scale, None if bias is None else bias * scale
        return cls(hidden, weight, bias, softcap)

    def logits(self) -> Tensor:
        """All logits at once (n, V), in float32 or better: for small inputs, and for losses that cannot be computed in
        chunks."""
        return to_float32(nn.functional.linear(self.hidden, self.weight, self.bias), self.softcap)


class _HeadLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass: three matrix products, where recomputation would take four."""

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
        views = [tensors[at : at + 3] for at in range(0, len(tensors), 3)]
        buffers: Sequence[Tensor | None] = [None] * len(views)
        hidden = views[0][0]
        sums = torch.zeros(len(term_weights), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            at = slice(start, min(start + chunk, len(hidden)))
            raw = [
                head_product(view_hidden[at], weight, bias, buffer)
                .detach()
                .requires_grad_(any(wanted[3 * index :][:3]))
                for index, ((view_hidden, weight, bias), buffer) in enumerate(zip(views, buffers, strict=True))
            ]
            if start == 0 and hidden.device.type == "cpu":
                buffers = [one.detach() for one in raw]
            terms, found = _chunk(raw, at, term_weights, loss, softcaps)
            sums += terms
            del raw  # frees it before the next chunk's is allocated
            for index, d_logits in enumerate(found):
                if d_logits is not None:
                    view_hidden, weight, _ = views[index]
                    _add(gradients[3 * index : 3 * index + 3], d_logits, view_hidden[at], weight, at)
            del found
        ctx.gradients = gradients
        ctx.mark_non_differentiable(sums)
        return (sums * term_weights.to(sums.dtype)).sum().to(torch.promote_types(hidden.dtype, torch.float32)), sums

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a head loss can be taken once")
        # Scaled in place because the head's gradient is as large as the head.
        gradients = tuple(None if gradient is None else gradient.mul_(d_total) for gradient in ctx.gradients)
        ctx.gradients = None
        return (None, None, None, None, *gradients)


def _add(gradients: Sequence[Tensor | None], d_logits: Tensor, hidden: Tensor, weight: Tensor, at: slice) -> None:
    """Propagate the gradient of a chunk's logits (c, V) to its hidden states, its head and its bias."""
    d_hidden, d_weight, d_bias = gradients
    # Under autocast the logits and these products are in half precision; their sums are not.
    if d_hidden is not None:
        d_hidden[at] = d_logits @ weight.to(d_logits.dtype)
    if d_weight is not None and d_logits.dtype == weight.dtype:
        d_weight.addmm_(d_logits.t(), hidden.to(weight.dtype))
    elif d_weight is not None:
        d_weight += d_logits.t() @ hidden.to(d_logits.dtype)
    if d_bias is not None:
        d_bias += d_logits.sum(dim=0)


def _chunk(
    raw: Sequence[Tensor], at: slice, term_weights: Tensor, loss: ChunkLoss, softcaps: Sequence[float | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """Sums of the terms, and the gradients of their weighted sum in the heads' outputs (None for outputs without
    one)."""
    with torch.enable_grad():
        logits = [to_float32(one, cap) for one, cap in zip(raw, softcaps, strict=True)]
        terms = loss(*logits, at)
        del logits
        total = (terms * term_weights.to(terms.dtype)).sum()
        asked = [one for one in raw if one.requires_grad]
        if not total.requires_grad or not asked:
            return terms.detach(), [None] * len(raw)
        found = iter(torch.autograd.grad(total, asked, allow_unused=True))
        return terms.detach(), [next(found) if one.requires_grad else None for one in raw]


def to_float32(raw: Tensor, softcap: float | None) -> Tensor:
    """Output of a head in float32 or better, as ``softcap · tanh(raw / softcap)`` if there is a cap."""
    logits = raw if raw.dtype == torch.float64 else raw.float()
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def head_loss(
    views: Sequence[LogitsView], loss: ChunkLoss, term_weights: Tensor, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the terms of ``loss`` over all tokens, and the raw sum of every term.

    Args:
        views: views of the same n tokens, each with its hidden states and head.
        loss: see :data:`ChunkLoss`.
        term_weights: (terms,).
        chunk: number of tokens whose logits exist at a time.

    Returns:
        The differentiable scalar, and the detached raw sums (terms,) in float64.
    """
    tensors = [tensor for view in views for tensor in (view.hidden, view.weight, view.bias)]
    total, sums = _HeadLoss.apply(term_weights, loss, [view.softcap for view in views], chunk, *tensors)
    return total, sums
