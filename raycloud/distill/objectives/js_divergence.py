"""Generalised Jensen–Shannon divergence (GKD, Agarwal et al. 2024, arXiv 2306.13649)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raycloud.distill.divergence import Divergence
from raycloud.distill.objectives.forward_kl import forward_kl


def js_divergence(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = β·p + (1−β)·q, (c, S) to (c,); at β = ½ at most log 2.

    The mixture is formed from logarithms: a probability that underflows on both sides costs nothing instead of NaN.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * forward_kl(log_p, log_m) + (1.0 - beta) * forward_kl(log_q, log_m)


class JSDivergence(Divergence):
    """Jensen–Shannon, generalised: near β = 0 it behaves like forward, near β = 1 like reverse KL."""

    name: Literal["js_divergence"] = "js_divergence"
    beta: float = Field(0.5, gt=0, lt=1)
    """Share of the teacher in the mixture."""

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (c,); see :func:`js_divergence`."""
        return js_divergence(log_p, log_q, self.beta)
