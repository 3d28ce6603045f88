"""Universal logit distillation (ULD, Boizard et al. 2024, arXiv 2402.12030)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raycloud.distill.objective import Compat, TeacherAt, TokenObjective
from raycloud.distill.signals import SignalKind


def ranked(logits: Tensor, k: int | None) -> Tensor:
    """Probabilities (c, V) from the largest down; with ``k`` the k largest and the sum of the others, (c, k + 1)."""
    if k is None or k >= logits.shape[-1]:
        return logits.softmax(dim=-1).sort(dim=-1, descending=True).values
    top = (logits.topk(k, dim=-1).values - logits.logsumexp(dim=-1, keepdim=True)).exp()
    return with_rest(top)


def with_rest(top: Tensor) -> Tensor:
    """Append the probability that is left, (c, k) to (c, k + 1)."""
    return torch.cat([top, (1.0 - top.sum(dim=-1, keepdim=True)).clamp_min(0.0)], dim=-1)


def ranked_distance(p: Tensor, q: Tensor) -> Tensor:
    """Σ |p − q| (c,) of ranked probabilities (c, R) and (c, S), the shorter filled up with zeros.

    It is the Wasserstein distance of two distributions over different words when any word costs the same to reach any
    other: it tells how sure the teacher is, and not of what.
    """
    short = p.shape[-1] - q.shape[-1]
    p, q = (torch.nn.functional.pad(one, (0, max(0, by))) for one, by in ((p, -short), (q, short)))
    return (p - q).abs().sum(dim=-1)


class ULD(TokenObjective):
    """Sorted probabilities compared, at tokens that both tokenizers have.

    Not reproduced of the published programs: they rotate responses to the front in place, which also moves the labels
    of whoever looks at them next.
    """

    name: Literal["uld"] = "uld"
    kinds: ClassVar[tuple[SignalKind, ...]] = ("hidden", "logits", "topk", "sorted")
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits."""
    k: int | None = Field(128, gt=0)
    """Largest probabilities compared one by one, all others as one sum: it errs by at most both sums. None sorts the
    whole vocabularies."""
    compat: Compat = "ours"
    """``published`` sorts the whole vocabularies whatever ``k`` says, and compares a text's i-th token with the
    teacher's i-th, up to the end of the shorter."""

    @property
    def signals(self) -> tuple[SignalKind, ...]:
        """The k largest do not tell all."""
        return ("hidden", "logits") if self._ranks is None else self.kinds

    @property
    def by_place(self) -> bool:
        """As published, or not."""
        return self.compat == "published"

    @property
    def _ranks(self) -> int | None:
        return None if self.compat == "published" else self.k

    def _sent(self, p: Tensor) -> Tensor:
        """What to compare with of probabilities that came as the largest and a rest, (c, j + 1) to (c, k + 1).

        Raises:
            ValueError: fewer were sent than are compared.
        """
        if self._ranks is None or self._ranks > p.shape[-1] - 1:
            raise ValueError(
                f"objective 'uld' with k={self._ranks} needs as many from the signal, got {p.shape[-1] - 1}"
            )
        return with_rest(p[:, : self._ranks])

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAt) -> Tensor:
        """The distance of each token (c,)."""
        with torch.no_grad():
            if teacher.teacher.signal.kind in ("hidden", "logits"):
                p = ranked(teacher.logits() / self.temperature, self._ranks)
            else:
                p = self._sent(teacher(self.temperature).log_p.exp())
        return ranked_distance(p, ranked(logits / self.temperature, self._ranks))
