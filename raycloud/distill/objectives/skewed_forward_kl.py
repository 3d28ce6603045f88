"""Skewed forward KL (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objective import register
from raycloud.distill.objective_options import SkewedForwardKLOptions
from raycloud.distill.objectives.forward_kl import forward_kl


def skewed_forward_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p ‖ λp + (1−λ)q), (c, S) to (c,); at most −log λ."""
    return forward_kl(log_p, torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew)))


@register
class SkewedForwardKL(SkewedForwardKLOptions, Divergence):
    """Forward KL to a mixture that contains a small share of the teacher, so that it stays finite."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence D (c,); see :func:`skewed_forward_kl`."""
        return skewed_forward_kl(log_p, log_q, self.skew_lambda)
