"""Multi-level optimal transport (MultiLevelOT, Cui et al. 2025, arXiv 2412.14528)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raycloud.distill.head_top_k import head_top_k
from raycloud.distill.multi_level import Levels, multi_level, published_levels, sequence_ranking
from raycloud.distill.objective import LossTerms, Objective, StudentOutput, TeacherOutput, both_ids, register
from raycloud.distill.objective_options import MultiLevelOTOptions
from raycloud.distill.ragged import mask_of, padded, text_of


@register
class MultiLevelOT(MultiLevelOTOptions, Objective):
    """Ranked probabilities of a text's tokens, compared token by token and by optimal transport.

    See :mod:`raycloud.distill.multi_level` for the terms and for the differences from the publication. The published
    loss is 1.5 times this, which is the recipe's ``kd_weight``. Not reproduced: logits overwritten in place, and ids
    matched one by one in a loop.
    """

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> LossTerms:
        """Weighted sum; the parts are the unweighted terms of :class:`~raycloud.distill.multi_level.Levels`."""
        levels = self._levels(student, teacher, chunk)
        parts = {name: getattr(levels, name).sum() for name in ("absolute", "logarithmic", "transport")}
        total = sum(
            (getattr(self, name) * value for name, value in parts.items()), start=torch.zeros_like(parts["absolute"])
        )
        return LossTerms(total, {name: value.detach() for name, value in parts.items()})

    def _levels(self, student: StudentOutput, teacher: TeacherOutput, chunk: int) -> Levels:
        ours, theirs = both_ids(student, teacher)
        student_mask, teacher_mask = mask_of(ours.offsets), mask_of(theirs.offsets)
        if self.compat != "ours":
            with torch.no_grad():
                u = padded(teacher.logits(), theirs.offsets)
            return published_levels(
                u,
                padded(student.logits_view().logits(), ours.offsets),
                teacher_mask,
                student_mask,
                self.compat,
                self.keep,
            )
        log_q, student_ids = head_top_k(student.logits_view(), self.k, self.temperature, chunk=chunk)
        with torch.no_grad():
            log_p, teacher_ids = head_top_k(teacher.logits_view(), self.k, self.temperature, chunk=chunk)
            p = sequence_ranking(
                padded(log_p, theirs.offsets).exp(), padded(teacher_ids, theirs.offsets), teacher_mask, self.keep
            )
        q = sequence_ranking(
            padded(log_q, ours.offsets).exp(), padded(student_ids, ours.offsets), student_mask, self.keep
        )
        partners = local_partners(teacher.partner, ours.offsets, theirs.offsets)
        return multi_level(p, q, teacher_mask, student_mask, partners, share=self.share, sweeps=self.sweeps)


def local_partners(partner: Tensor | None, student_offsets: Tensor, teacher_offsets: Tensor) -> Tensor:
    """Partners within each text (B, N) from flat indices (n,), -1 for none and on padding; None pairs token by
    token."""
    text = text_of(student_offsets)
    if partner is None:
        partner = torch.arange(len(text), device=student_offsets.device)
    local = torch.where(partner >= 0, partner - teacher_offsets[text], -1)
    return (padded(local + 1, student_offsets)) - 1
