"""Adaptive KL (AKL, Wu et al. 2024, arXiv 2404.02657)."""

from __future__ import annotations

import torch
from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objective import register
from raycloud.distill.objective_options import AdaptiveKLOptions
from raycloud.distill.objectives.forward_kl import forward_kl
from raycloud.distill.objectives.reverse_kl import reverse_kl

_EPSILON = 1e-8
_TOP_K = 256
"""Number of ids that nearly always holds the head's mass; rows that need more are sorted in full."""


@torch.no_grad()
def head_mask(p: Tensor, mass: float) -> Tensor:
    """Smallest set of most likely entries of each row (c, S) that holds at least ``mass``, as booleans.

    Entries with the same probability as the last one are included, so that the set does not depend on their order.
    """
    top = p.topk(min(_TOP_K, p.shape[-1]), dim=-1).values
    threshold = _threshold(top, mass)
    short = top.sum(dim=-1) < mass
    if bool(short.any()):
        threshold[short] = _threshold(p[short].sort(dim=-1, descending=True).values, mass)
    return p >= threshold


def _threshold(descending: Tensor, mass: float) -> Tensor:
    """Last value (c, 1) that is needed for the cumulative sum of the largest ones to reach ``mass``."""
    reached = descending.cumsum(dim=-1) < mass
    last = reached.sum(dim=-1, keepdim=True).clamp_max(descending.shape[-1] - 1)
    return descending.gather(-1, last)


def adaptive_kl(log_p: Tensor, log_q: Tensor, mass: float = 0.5) -> Tensor:
    """Divergence a·KL(p‖q) + (1−a)·KL(q‖p), (c, S) to (c,), where a is the head's share of Σ|p − q|.

    If p and q differ most in the teacher's head, forward KL corrects it faster, otherwise reverse KL. The share is a
    constant for the gradient; identical distributions have a = ½ and not 0/0.
    """
    with torch.no_grad():
        p = log_p.exp()
        gap = (p - log_q.exp()).abs()
        in_head = (gap * head_mask(p, mass)).sum(dim=-1)
        share = (in_head + _EPSILON) / (gap.sum(dim=-1) + 2 * _EPSILON)
    return share * forward_kl(log_p, log_q) + (1.0 - share) * reverse_kl(log_p, log_q)


@register
class AdaptiveKL(AdaptiveKLOptions, Divergence):
    """Forward and reverse KL, weighted token by token.

    The head is the smallest set that holds ``head_mass``, as in the paper and in songmzhang/DSKD 077337a
    (``code/criterions/various_divergence.py``). The authors' program (wutaiqiang/LLM_KD_AKL ff278be, ``AKL.py``) counts
    the id that reaches the mass as part of the tail, unless it is the first. That is not reproduced.
    """

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence D (c,); see :func:`adaptive_kl`."""
        return adaptive_kl(log_p, log_q, self.head_mass)
