"""Universal logit distillation (ULD, Boizard et al. 2024, arXiv 2402.12030)."""

from __future__ import annotations

import torch
from torch import Tensor

from raycloud.distill.objective import TeacherAtTokens, TokenObjective, register
from raycloud.distill.objective_options import ULDOptions


def sorted_probabilities(logits: Tensor, k: int | None) -> Tensor:
    """Probabilities (c, V) in descending order; with ``k`` the k largest and the sum of the others, (c, k + 1)."""
    if k is None or k >= logits.shape[-1]:
        return logits.softmax(dim=-1).sort(dim=-1, descending=True).values
    top = (logits.topk(k, dim=-1).values - logits.logsumexp(dim=-1, keepdim=True)).exp()
    return append_rest(top)


def append_rest(top: Tensor) -> Tensor:
    """Append the remaining probability, (c, k) to (c, k + 1)."""
    return torch.cat([top, (1.0 - top.sum(dim=-1, keepdim=True)).clamp_min(0.0)], dim=-1)


def sorted_l1_distance(p: Tensor, q: Tensor) -> Tensor:
    """Distance Σ |p − q| (c,) of ranked probabilities (c, R) and (c, S), the shorter padded with zeros.

    This is the Wasserstein distance of two distributions over different vocabularies if every move between two ids
    costs the same. It compares how certain the two models are, and not which ids they prefer.
    """
    short = p.shape[-1] - q.shape[-1]
    p, q = (torch.nn.functional.pad(one, (0, max(0, by))) for one, by in ((p, -short), (q, short)))
    return (p - q).abs().sum(dim=-1)


@register
class ULD(ULDOptions, TokenObjective):
    """Distance of sorted probabilities, at tokens that both tokenizers have.

    ``compat: published`` is songmzhang/DSKD 077337a (``code/criterions/universal_logit_distillation.py``). The authors'
    program (Nicolas-BZRD/llm-recipes ab6e798, ``models/distillation_model.py``) takes the mean over a text's tokens,
    and then the mean over texts; this is a sum over tokens. Not reproduced of either: they move responses to the front
    in place, which also changes the labels for later users.
    """

    @property
    def by_position(self) -> bool:
        """Pairing of tokens by position, with ``compat: published``."""
        return self.compat == "published"

    def _reduced(self, p: Tensor) -> Tensor:
        """Reduce probabilities that were sent as the j largest and a rest to k: (c, j + 1) to (c, k + 1).

        Raises:
            ValueError: fewer were sent than are compared.
        """
        if self._ranks is None or self._ranks > p.shape[-1] - 1:
            raise ValueError(
                f"objective 'uld' with k={self._ranks} needs as many from the signal, got {p.shape[-1] - 1}"
            )
        return append_rest(p[:, : self._ranks])

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAtTokens) -> Tensor:
        """Distance of each token (c,)."""
        with torch.no_grad():
            if teacher.teacher.signal.kind in ("hidden", "logits"):
                p = sorted_probabilities(teacher.logits() / self.temperature, self._ranks)
            else:
                p = self._reduced(teacher(self.temperature).log_p.exp())
        return sorted_l1_distance(p, sorted_probabilities(logits / self.temperature, self._ranks))
