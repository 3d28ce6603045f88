"""Distillation through a map between vocabularies (MinED; FuseLLM, Wan et al. 2024, arXiv 2401.10491)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raycloud.distill.objective import SharedVocabulary, TeacherAtTokens, TokenObjective, register
from raycloud.distill.objective_options import MinEDOptions


def map_to_student_vocab(p: Tensor, vocabulary: SharedVocabulary, size: int) -> Tensor:
    """Map a teacher's probabilities (c, W) to probabilities (c, V) over the student's vocabulary of ``size`` ids.

    Every teacher id gives its probability to the student ids it is mapped to. Probability of unmapped ids is dropped,
    and the rest is normalised.
    """
    student_ids, teacher_ids, weights = vocabulary.entries
    given = p.new_zeros(p.shape[0], size).index_add_(1, student_ids, p[:, teacher_ids] * weights.to(p.dtype))
    return given / given.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def covered_kl(p: Tensor, logits: Tensor, covered: Tensor) -> Tensor:
    """Divergence KL(p‖q) (c,) with q normalised over the covered ids (V,) only.

    An id that no teacher id maps to has p = 0 because the teacher cannot produce it; the student should not unlearn it.
    """
    log_q = logits.masked_fill(~covered, -torch.inf).log_softmax(dim=-1).masked_fill(~covered, 0.0)
    return (torch.xlogy(p, p) - p * log_q).sum(dim=-1)


def first_mapped_logits(logits: Tensor, vocabulary: SharedVocabulary, size: int) -> Tensor:
    """Map a teacher's logits (c, W) to logits (c, V) over the student's vocabulary of ``size`` ids, as published.

    If several teacher ids map to a student id the first one is taken; an id that none maps to gets −∞.
    """
    student_ids, teacher_ids, _ = vocabulary.entries
    none = logits.shape[-1]
    first = torch.full((size,), none, device=logits.device).scatter_reduce(0, student_ids, teacher_ids, "amin")
    return nn.functional.pad(logits, (0, 1), value=-torch.inf)[:, first]


@register
class MinED(MinEDOptions, TokenObjective):
    """Forward KL at tokens that both tokenizers have, with the teacher's ids mapped to the nearest student ids.

    ``compat: published`` is songmzhang/DSKD 077337a (``code/criterions/min_edit_dis_kld.py``). Not reproduced: tokens
    paired by warping edit distances, and a map from every id to its nearest, however far. Both values of ``compat``
    take partners and the map from the bytes.
    """

    @property
    def requires_partner(self) -> bool:
        """Skipping of tokens without a partner; ``compat: published`` has a loss term for them instead."""
        return self.compat == "ours"

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAtTokens) -> Tensor:
        """Divergence of each token (c,).

        Raises:
            ValueError: there is no map between the vocabularies.
        """
        vocabulary = teacher.teacher.vocabulary
        if vocabulary is None:
            raise ValueError(
                "objective 'mined' needs a map between the vocabularies; with one tokenizer use forward_kl"
            )
        if self.compat == "published":
            return self._published(logits, labels, teacher, vocabulary)
        with torch.no_grad():
            p = (teacher.logits() / self.temperature).softmax(dim=-1)
            if self.k is not None and self.k < p.shape[-1]:
                top = p.topk(self.k, dim=-1)
                p = torch.zeros_like(p).scatter_(1, top.indices, top.values)
            target = map_to_student_vocab(p, vocabulary, logits.shape[-1]).to(logits.dtype)
            covered = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            covered[vocabulary.entries[0]] = True
        return covered_kl(target, logits / self.temperature, covered)

    def _published(
        self, logits: Tensor, labels: Tensor, teacher: TeacherAtTokens, vocabulary: SharedVocabulary
    ) -> Tensor:
        log_q = (logits / self.temperature).log_softmax(dim=-1)
        values = -log_q.gather(-1, labels[:, None])[:, 0]
        with torch.no_grad():
            p = (first_mapped_logits(teacher.logits(), vocabulary, logits.shape[-1]) / self.temperature).softmax(dim=-1)
            p = p.to(logits.dtype)
        paired = slice(None) if teacher.paired is None else teacher.paired
        divergence = (torch.xlogy(p, p) - p * log_q[paired]).sum(dim=-1)
        return values.index_put((torch.arange(len(values), device=values.device)[paired],), divergence)
