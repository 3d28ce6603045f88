"""Cross-entropy with the next token of the text."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from raycloud.distill.objective import TeacherAtTokens, TokenObjective


class _NegativeLogLikelihood(torch.autograd.Function):
    """Cross-entropy −log q(label). Its gradient, q minus one at the label, is written into one tensor; autograd would
    make four."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        total = logits.logsumexp(dim=-1)
        ctx.save_for_backward(logits, labels, total)
        return total - logits.gather(-1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        logits, labels, total = ctx.saved_tensors
        q = (logits - total[:, None]).exp_()
        return q.scatter_add_(-1, labels[:, None], q.new_tensor(-1.0).expand(len(q), 1)).mul_(given[:, None]), None


class CrossEntropy(TokenObjective):
    """Cross-entropy −log q(label), without a temperature."""

    name: Literal["cross_entropy"] = "cross_entropy"

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAtTokens) -> Tensor:
        """Negative log-likelihood of each label (c,)."""
        return _NegativeLogLikelihood.apply(logits, labels)

    @property
    def requires_partner(self) -> bool:
        """Skipping of tokens without a partner: none, because no teacher is involved."""
        return False
