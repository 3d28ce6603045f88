"""Targets: what a student is compared with, and the student's own numbers over the same support."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.distill.signals.recipe import SignalKind

LOG_ZERO = -1e30
"""Stands for the logarithm of zero: 0 · log 0 is then 0 and not NaN."""
TAIL_FLOOR = 1e-7
"""The least mass of a tail."""


@dataclass(frozen=True)
class Targets:
    """What a student is to match at some tokens: the teacher's log-probabilities over a support.

    The support is the vocabulary (``hidden``, ``logits``), the teacher's ``k`` ids and one bucket for all others
    (``topk``), or ``k`` ranks and such a bucket (``sorted``). Two kinds are less than that: ``sampled`` and ``hybrid``
    are an estimate, right on average for sums Σ p · f(id) and so for cross-entropies with the student only; ``scalars``
    know the text's own next token and nothing else.
    """

    log_p: Tensor
    """(c, S), the teacher's: log-weights of ids for ``sampled`` and ``hybrid``, S = 1 for ``scalars``."""
    ids: Tensor | None = None
    """(c, k) for ``topk``; (c, S) for ``sampled`` and ``hybrid``, with weights of zero behind the last."""
    kind: SignalKind = "logits"
    """Of the signal they are from."""
    entropy: Tensor | None = None
    """(c,) nats of the whole distribution, for ``sampled`` and ``hybrid``: makes a divergence of a cross-entropy."""

    def log_q(self, logits: Tensor, temperature: float) -> Tensor:
        """The student's log-probabilities (c, S) over the same support, from its logits (c, V).

        Raises:
            ValueError: there is no support, as for ``scalars``.
        """
        if self.kind == "scalars":
            raise ValueError("a scalars signal speaks of the text's own next tokens only, not of a distribution")
        log_q = torch.log_softmax(tempered(logits, temperature), dim=-1)
        if self.kind == "sorted":
            return with_tail(log_q.topk(self.log_p.shape[-1] - 1, dim=-1).values)
        if self.ids is None:
            return log_q
        at_ids = log_q.gather(-1, self.ids)
        return with_tail(at_ids) if self.kind == "topk" else at_ids


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature."""
    return logits if temperature == 1.0 else logits / temperature


def with_tail(log_p: Tensor) -> Tensor:
    """Append the log of the mass that is left, (c, k) to (c, k + 1), never below a mass of 1e-7.

    log(1 - Σ exp) is computed from the logarithm of the kept mass, which stays exact when almost all of it is kept.
    """
    kept = log_p.logsumexp(dim=-1, keepdim=True).clamp_max(-TAIL_FLOOR)
    return torch.cat([log_p, torch.log(-torch.expm1(kept))], dim=-1)
