"""Skewed reverse KL (DistiLLM, Ko et al. 2024, arXiv 2402.03898)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objectives.skewed_forward_kl import skewed_forward_kl


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q ‖ (1−λ)p + λq), (c, S) to (c,); at most −log λ. The skewed forward KL with the two changed over."""
    return skewed_forward_kl(log_q, log_p, skew)


class SkewedReverseKL(Divergence):
    """Reverse KL to a mixture that holds a little of the student, so that it stays finite."""

    name: Literal["skewed_reverse_kl"] = "skewed_reverse_kl"
    skew_lambda: float = Field(0.1, gt=0, lt=1)
    """Share of the student in the mixture."""

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (c,); see :func:`skewed_reverse_kl`."""
        return skewed_reverse_kl(log_p, log_q, self.skew_lambda)
