"""Multi-level optimal transport (MultiLevelOT, Cui et al. 2025, arXiv 2412.14528)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.distill.head_top import head_top
from raycloud.distill.multi_level import Levels, multi_level, published_levels, sequence_ranking
from raycloud.distill.objective import Objective, StudentOutput, TeacherOutput, Terms, both_ids
from raycloud.distill.ragged import mask_of, padded, text_of


class MultiLevelOT(Objective):
    """Ranked probabilities of a text's tokens, compared one by one and as a whole.

    See :mod:`raycloud.distill.multi_level` for the terms and for what is not as published. The published loss is 1.5
    times this, which is the recipe's ``kd_weight``. Not reproduced: logits overwritten in place, and words matched one
    by one in a loop.
    """

    name: Literal["multi_level_ot"] = "multi_level_ot"
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits."""
    words: int = Field(128, gt=0)
    """Likeliest words looked at of each token."""
    keep: int = Field(50, gt=0)
    """Words compared: those of the most mass over the text."""
    absolute: float = Field(1.0, ge=0)
    logarithmic: float = Field(0.1, ge=0)
    transport: float = Field(0.1, ge=0)
    share: float = Field(0.1, gt=0)
    """Transport's ε as a share of the median cost."""
    sweeps: int = Field(30, gt=0)
    compat: Literal["ours", "official", "mcwkd"] = "ours"
    """``official`` and ``mcwkd`` are the two published programs, see
    :func:`~raycloud.distill.multi_level.published_levels`; of the options above they use ``keep`` and the weights. They
    rank words over the batch, so that what a text teaches depends on the others, and hold all logits at once. ``mcwkd``
    also compares prompts and padding: of those no signal tells, and here what is behind a text has uniform
    distributions."""

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> Terms:
        """Terms are those of :class:`~raycloud.distill.multi_level.Levels`, not weighted."""
        levels = self._levels(student, teacher, chunk)
        parts = {name: getattr(levels, name).sum() for name in ("absolute", "logarithmic", "transport")}
        total = sum(
            (getattr(self, name) * value for name, value in parts.items()), start=torch.zeros_like(parts["absolute"])
        )
        return Terms(total, {name: value.detach() for name, value in parts.items()})

    def _levels(self, student: StudentOutput, teacher: TeacherOutput, chunk: int) -> Levels:
        ours, theirs = both_ids(student, teacher)
        mask, other = mask_of(ours.offsets), mask_of(theirs.offsets)
        if self.compat != "ours":
            with torch.no_grad():
                u = padded(teacher.logits(), theirs.offsets)
            return published_levels(
                u, padded(student.lane().logits(), ours.offsets), other, mask, self.compat, self.keep
            )
        log_q, mine = head_top(student.lane(), self.words, self.temperature, chunk=chunk)
        with torch.no_grad():
            log_p, its = head_top(teacher.lane(), self.words, self.temperature, chunk=chunk)
            p = sequence_ranking(padded(log_p, theirs.offsets).exp(), padded(its, theirs.offsets), other, self.keep)
        q = sequence_ranking(padded(log_q, ours.offsets).exp(), padded(mine, ours.offsets), mask, self.keep)
        partners = local_partners(teacher.partner, ours.offsets, theirs.offsets)
        return multi_level(p, q, other, mask, partners, share=self.share, sweeps=self.sweeps)


def local_partners(partner: Tensor | None, ours: Tensor, theirs: Tensor) -> Tensor:
    """Partners within each text (B, N), -1 for none and on padding, from flat ones (n,); None pairs token by token."""
    text = text_of(ours)
    if partner is None:
        partner = torch.arange(len(text), device=ours.device)
    local = torch.where(partner >= 0, partner - theirs[text], -1)
    return (padded(local + 1, ours)) - 1
