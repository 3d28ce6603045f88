"""Forward Kullback–Leibler divergence (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from raycloud.distill.divergence import Divergence


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q), (c, S) to (c,): the student covers all that the teacher finds likely."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class ForwardKL(Divergence):
    """KL(teacher‖student)."""

    name: Literal["forward_kl"] = "forward_kl"

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (c,); see :func:`forward_kl`."""
        return forward_kl(log_p, log_q)
