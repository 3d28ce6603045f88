"""Reverse Kullback–Leibler divergence (as used token by token since MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from raycloud.distill.divergence import Divergence


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q‖p) = Σ q (log q − log p), (c, S) to (c,): the student stays where the teacher finds it likely."""
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


class ReverseKL(Divergence):
    """KL(student‖teacher)."""

    name: Literal["reverse_kl"] = "reverse_kl"

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (c,); see :func:`reverse_kl`."""
        return reverse_kl(log_p, log_q)
