"""Targets that a student is compared with, and the student's log-probabilities over the same support."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.distill.signal_recipe import SignalKind

LOG_ZERO = -1e30
"""Value used for the logarithm of zero: 0 · log 0 is then 0 and not NaN."""
TAIL_FLOOR = 1e-7
"""Least mass of a tail."""


@dataclass(frozen=True)
class Targets:
    """Teacher log-probabilities over a support, at some tokens.

    The support is the vocabulary (``hidden``, ``logits``), the teacher's ``k`` ids and one entry for all others
    (``topk``), or ``k`` ranks and such an entry (``sorted``). Two kinds hold less: ``sampled`` and ``hybrid`` are an
    unbiased estimate for sums Σ p · f(id) only, and so for cross-entropies with the student; ``scalars`` hold the next
    token of the text and nothing else.
    """

    log_p: Tensor
    """(c, S), the teacher's log-probabilities: log-weights of ids for ``sampled`` and ``hybrid``, S = 1 for
    ``scalars``."""
    ids: Tensor | None = None
    """(c, k) for ``topk``; (c, S) for ``sampled`` and ``hybrid``, with zero weights after the last."""
    kind: SignalKind = "logits"
    """Kind of the signal they come from."""
    entropy: Tensor | None = None
    """(c,) nats of the whole distribution, for ``sampled`` and ``hybrid``: turns a cross-entropy into a divergence."""

    def log_q(self, logits: Tensor, temperature: float) -> Tensor:
        """The student's log-probabilities (c, S) over the same support, from its logits (c, V).

        Raises:
            ValueError: there is no support, as for ``scalars``.
        """
        if self.kind == "scalars":
            raise ValueError("a scalars signal holds only the label's log-probability, not a distribution")
        log_q = torch.log_softmax(scale_by_temperature(logits, temperature), dim=-1)
        if self.kind == "sorted":
            return with_tail(log_q.topk(self.log_p.shape[-1] - 1, dim=-1).values)
        if self.ids is None:
            return log_q
        at_ids = log_q.gather(-1, self.ids)
        return with_tail(at_ids) if self.kind == "topk" else at_ids


def scale_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature."""
    return logits if temperature == 1.0 else logits / temperature


def with_tail(log_p: Tensor) -> Tensor:
    """Append the log of the remaining mass, (c, k) to (c, k + 1), never below a mass of 1e-7.

    log(1 - Σ exp) is computed from the logarithm of the kept mass, which stays exact if almost all of it is kept.
    """
    kept = log_p.logsumexp(dim=-1, keepdim=True).clamp_max(-TAIL_FLOOR)
    return torch.cat([log_p, torch.log(-torch.expm1(kept))], dim=-1)
