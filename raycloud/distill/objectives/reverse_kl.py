"""Reverse Kullback–Leibler divergence (used token by token since MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objective import register
from raycloud.distill.objective_options import ReverseKLOptions


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q‖p) = Σ q (log q − log p), (c, S) to (c,). It penalises student mass on what the teacher finds unlikely."""
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


@register
class ReverseKL(ReverseKLOptions, Divergence):
    """KL(student‖teacher)."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence D (c,); see :func:`reverse_kl`."""
        return reverse_kl(log_p, log_q)
