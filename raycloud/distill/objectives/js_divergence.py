"""Generalised Jensen–Shannon divergence (GKD, Agarwal et al. 2024, arXiv 2306.13649)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objective import register
from raycloud.distill.objective_options import JSDivergenceOptions
from raycloud.distill.objectives.forward_kl import forward_kl
from raycloud.distill.objectives.reverse_kl import reverse_kl


def js_divergence(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Divergence β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q, (c, S) to (c,); at most log 2 for β = ½.

    At β = 0 and β = 1 this formula is zero. There the function returns what it is proportional to near these values:
    forward KL at β = 0 and reverse KL at β = 1, as in TRL. The mixture is computed from logarithms, so that a
    probability that underflows on both sides costs nothing instead of NaN. (Published code adds 1e-9 to probabilities,
    which is not reproduced.)
    """
    if beta in (0.0, 1.0):
        return reverse_kl(log_p, log_q) if beta else forward_kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1.0 - beta) * forward_kl(log_q, log_m)


@register
class JSDivergence(JSDivergenceOptions, Divergence):
    """Generalised Jensen–Shannon divergence: from forward KL at β = 0 to reverse KL at β = 1."""

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence D (c,); see :func:`js_divergence`."""
        return js_divergence(log_p, log_q, self.beta)
