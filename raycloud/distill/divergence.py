"""Objectives that compare the student's distribution of the next token with the teacher's."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from raycloud.distill.objective import TeacherAt, TokenObjective


class Divergence(TokenObjective):
    """An objective that compares two distributions over the same support, at a temperature."""

    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits."""
    tau2_scale: bool = False
    """Multiply by temperature², as some code does to keep the gradient's size; published numbers here are without."""

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAt) -> Tensor:
        """The divergence of each token (c,)."""
        aim = teacher(self.temperature)
        values = self.between(aim.log_p, aim.log_q(logits, self.temperature))
        return values * self.temperature**2 if self.tau2_scale else values

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (c,) of the student's q from the teacher's p, both as log-probabilities (c, S)."""
        raise NotImplementedError
