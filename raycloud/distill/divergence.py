"""Base class of the objectives that compare the student's next-token distribution with the teacher's."""

from __future__ import annotations

from torch import Tensor

from raycloud.distill.objective import TeacherAtTokens, TokenObjective, build_objective
from raycloud.distill.objective_options import DivergenceOptions
from raycloud.distill.signals import Targets


class Divergence(DivergenceOptions, TokenObjective):
    """An objective that compares two distributions over the same support, at a temperature."""

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAtTokens) -> Tensor:
        """Divergence of each token (c,).

        Raises:
            ValueError: signals of this kind hold too little for it.
        """
        targets = teacher(self.temperature)
        if targets.kind not in self.needs.signals:
            raise ValueError(
                f"objective '{self.name}' cannot be taken from a signal of kind '{targets.kind}'; "
                f"allowed: {', '.join(self.needs.signals)}"
            )
        values = self.value_from_targets(targets, targets.log_q(logits, self.temperature))
        return values * self.temperature**2 if self.tau2_scale else values

    def value_from_targets(self, targets: Targets, log_q: Tensor) -> Tensor:
        """Divergence (c,) from targets of an allowed kind, given the student's log-probabilities (c, S) on their
        support."""
        return self.value(targets.log_p, log_q)

    def value(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergence D (c,) of the student's q from the teacher's p, both given as log-probabilities (c, S)."""
        raise NotImplementedError


def build_divergence(options: DivergenceOptions) -> Divergence:
    """Build the divergence that a recipe names."""
    made = build_objective(options)
    assert isinstance(made, Divergence)
    return made
