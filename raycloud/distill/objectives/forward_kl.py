"""Forward Kullback–Leibler divergence (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objective import register
from raycloud.distill.objective_options import ForwardKLOptions
from raycloud.distill.signals import Targets


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Divergence KL(p‖q) = Σ p (log p − log q), (c, S) to (c,). It penalises a student that misses what the teacher
    finds likely."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


@register
class ForwardKL(ForwardKLOptions, Divergence):
    """Forward KL, KL(teacher‖student)."""

    def value_from_targets(self, targets: Targets, log_q: Tensor) -> Tensor:
        """Divergence (c,); from drawn ids an unbiased estimate with an unbiased gradient.

        Only forward KL can be estimated in this way: p enters Σ p log q as a plain factor (Anshumann et al. 2025, arXiv
        2503.16870).
        """
        if targets.entropy is None:
            return forward_kl(targets.log_p, log_q)
        return -(targets.log_p.exp() * log_q).sum(dim=-1) - targets.entropy

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence D (c,); see :func:`forward_kl`."""
        return forward_kl(log_p, log_q)
