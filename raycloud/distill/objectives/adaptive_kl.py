"""Adaptive KL (AKL, Wu et al. 2024, arXiv 2404.02657)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objectives.forward_kl import forward_kl
from raycloud.distill.objectives.reverse_kl import reverse_kl

_EPSILON = 1e-8
_LIKELY = 256
"""Nearly always enough of the vocabulary to hold the head's mass; rows that need more are sorted in full."""


@torch.no_grad()
def head_mask(p: Tensor, mass: float) -> Tensor:
    """The smallest set of most likely entries of each row (c, S) that holds at least ``mass``, as booleans.

    Entries just as likely as the last of them belong to it, so that it does not depend on their order.
    """
    top = p.topk(min(_LIKELY, p.shape[-1]), dim=-1).values
    threshold = _threshold(top, mass)
    short = top.sum(dim=-1) < mass
    if bool(short.any()):
        threshold[short] = _threshold(p[short].sort(dim=-1, descending=True).values, mass)
    return p >= threshold


def _threshold(descending: Tensor, mass: float) -> Tensor:
    """The last value (c, 1) that is needed for the sum of the first ones to reach ``mass``."""
    reached = descending.cumsum(dim=-1) < mass
    last = reached.sum(dim=-1, keepdim=True).clamp_max(descending.shape[-1] - 1)
    return descending.gather(-1, last)


def adaptive_kl(log_p: Tensor, log_q: Tensor, mass: float = 0.5) -> Tensor:
    """a·KL(p‖q) + (1−a)·KL(q‖p), (c, S) to (c,), a being the head's share of Σ|p − q|.

    Where the two differ most on what the teacher finds likely, forward KL mends it faster, elsewhere reverse KL. The
    share is a constant for the gradient; identical distributions have a = ½ and not 0/0.
    """
    with torch.no_grad():
        p = log_p.exp()
        gap = (p - log_q.exp()).abs()
        in_head = (gap * head_mask(p, mass)).sum(dim=-1)
        share = (in_head + _EPSILON) / (gap.sum(dim=-1) + 2 * _EPSILON)
    return share * forward_kl(log_p, log_q) + (1.0 - share) * reverse_kl(log_p, log_q)


class AdaptiveKL(Divergence):
    """Forward and reverse KL, weighted token by token."""

    name: Literal["adaptive_kl"] = "adaptive_kl"
    head_mass: float = Field(0.5, gt=0, lt=1)
    """Probability mass of the teacher's head, μ in the paper. The published program's ``adaptive_kl_alpha`` is the mass
    of the tail, which is the rest."""

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (c,); see :func:`adaptive_kl`."""
        return adaptive_kl(log_p, log_q, self.head_mass)
