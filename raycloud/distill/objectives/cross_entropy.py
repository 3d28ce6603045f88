"""Cross-entropy with the data's own next token."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from raycloud.distill.objective import TeacherAt, TokenObjective


class CrossEntropy(TokenObjective):
    """−log q(label), without a temperature."""

    name: Literal["cross_entropy"] = "cross_entropy"

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAt) -> Tensor:
        """The negative log-likelihood of each label (c,)."""
        return logits.logsumexp(dim=-1) - logits.gather(-1, labels[:, None])[:, 0]

    @property
    def needs_partner(self) -> bool:
        """It asks no teacher."""
        return False
