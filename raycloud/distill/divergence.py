"""Objectives that compare the student's distribution of the next token with the teacher's."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from raycloud.distill.objective import TeacherAt, TokenObjective
from raycloud.distill.signals import SignalKind, Targets


class Divergence(TokenObjective):
    """An objective that compares two distributions over the same support, at a temperature."""

    kinds: ClassVar[tuple[SignalKind, ...]] = ("hidden", "logits", "topk")
    """Signals that tell enough for it."""
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits."""
    tau2_scale: bool = False
    """Multiply by temperature², as some code does to keep the gradient's size; published numbers here are without."""

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAt) -> Tensor:
        """The divergence of each token (c,).

        Raises:
            ValueError: it cannot be told from this kind of signal.
        """
        aim = teacher(self.temperature)
        if aim.kind not in self.kinds:
            raise ValueError(
                f"objective '{self.name}' cannot be taken from a signal of kind '{aim.kind}'; "
                f"allowed: {', '.join(self.kinds)}"
            )
        values = self.towards(aim, aim.log_q(logits, self.temperature))
        return values * self.temperature**2 if self.tau2_scale else values

    def towards(self, aim: Targets, log_q: Tensor) -> Tensor:
        """The divergence (c,) from targets of one of its kinds, with the student's log-probabilities (c, S) there."""
        return self.between(aim.log_p, log_q)

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D (c,) of the student's q from the teacher's p, both as log-probabilities (c, S)."""
        raise NotImplementedError
