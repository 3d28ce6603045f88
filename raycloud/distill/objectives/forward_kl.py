"""Forward Kullback–Leibler divergence (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.signals import SignalKind, Targets


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p (log p − log q), (c, S) to (c,): the student covers all that the teacher finds likely."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class ForwardKL(Divergence):
    """KL(teacher‖student)."""

    kinds: ClassVar[tuple[SignalKind, ...]] = (*Divergence.kinds, "hybrid", "sampled")
    name: Literal["forward_kl"] = "forward_kl"

    def towards(self, aim: Targets, log_q: Tensor) -> Tensor:
        """The divergence (c,); from drawn ids an estimate that is right on average, as its gradient is.

        Only this one can be estimated so: p enters Σ p log q as a plain factor (Anshumann et al. 2025,
        arXiv 2503.16870).
        """
        if aim.entropy is None:
            return forward_kl(aim.log_p, log_q)
        return -(aim.log_p.exp() * log_q).sum(dim=-1) - aim.entropy

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (c,); see :func:`forward_kl`."""
        return forward_kl(log_p, log_q)
