"""Skewed reverse KL (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""

from __future__ import annotations

from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objective import register
from raycloud.distill.objective_options import SkewedReverseKLOptions
from raycloud.distill.objectives.skewed_forward_kl import skewed_forward_kl


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q ‖ (1−λ)p + λq), (c, S) to (c,); at most −log λ. It is the skewed forward KL with p and q exchanged."""
    return skewed_forward_kl(log_q, log_p, skew)


@register
class SkewedReverseKL(SkewedReverseKLOptions, Divergence):
    """Reverse KL to a mixture that contains a small share of the student, so that it stays finite."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence D (c,); see :func:`skewed_reverse_kl`."""
        return skewed_reverse_kl(log_p, log_q, self.skew_lambda)
