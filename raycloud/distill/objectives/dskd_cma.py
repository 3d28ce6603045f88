"""Dual-space distillation with cross-model attention (DSKD-CMA, Zhang et al. 2024, arXiv 2406.17328, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.distill.costs import span_cost
from raycloud.distill.head_loss import Lane
from raycloud.distill.objective import Compat, Ids, Objective, Sizes, StudentOutput, TeacherOutput, Terms, both_ids
from raycloud.distill.objectives.dskd import Projectors, student_space, teacher_space
from raycloud.distill.objectives.plain import AnyDivergence
from raycloud.distill.ragged import mask_of, padded
from raycloud.distill.transport import at_least_float32

_APART = 1e-3
"""The share that tokens without a common byte count as having."""


class CrossProjectors(Projectors):
    """With ``query``, (…, 2d) to (…, 2D), that lets the student's tokens look for the teacher's."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__(student, teacher)
        self.query = nn.Linear(2 * student, 2 * teacher)


def unit(rows: Tensor) -> Tensor:
    """Rows (…, d) with a root mean square of 1."""
    return rows / rows.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)


def unit_together(rows: Tensor) -> Tensor:
    """Rows (…, d) over the one deviation of all their numbers, as published: a text's loss depends on its company."""
    return rows / rows.std().clamp_min(torch.finfo(rows.dtype).tiny)


def attention(
    query: Tensor, key: Tensor, query_mask: Tensor, key_mask: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights (B, N, M) of each query over the keys, and (B, M, N) of each key over the queries, from one product.

    Args:
        query: (B, N, e).
        key: (B, M, e).
        query_mask: (B, N), False for padding.
        key_mask: (B, M), False for padding.
        bias: (B, N, M), added to the scores.
    """
    scores = at_least_float32(query @ key.transpose(1, 2)) / key.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    blocked = torch.finfo(scores.dtype).min
    forth = scores.masked_fill(~key_mask[:, None, :], blocked).softmax(dim=-1)
    back = scores.transpose(1, 2).masked_fill(~query_mask[:, None, :], blocked).softmax(dim=-1)
    return forth, back


class DSKDCMA(Objective):
    """Every token of the student looks, with a learned query, at all of the teacher's of the same text, and back.

    Not reproduced of the published program: filler ids, prompts and padding, which have a part in its deviations.
    """

    name: Literal["dskd_cma"] = "dskd_cma"
    temperature: float = Field(2.0, gt=0)
    teacher_temperature: float = Field(1.0, gt=0)
    """Divides the projected teacher's logits once more."""
    divergence: AnyDivergence = Field(default={"name": "forward_kl"}, validate_default=True)
    """In the student's space; its temperature is not used. The teacher's space has forward KL."""
    prior: float = Field(0.0, ge=0)
    """How much attention keeps to tokens of common bytes: times the logarithm of their share, added to the scores."""
    compat: Compat = "ours"
    """``published`` scales the teacher's rows and embeddings by one deviation of the batch, and not each row by its
    own: what a text teaches then depends on the others."""

    def extras(self, sizes: Sizes) -> nn.Module:
        """The projectors."""
        return CrossProjectors(sizes.student, sizes.teacher)

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> Terms:
        """``student_space`` and ``teacher_space`` are divergences, ``projected`` is the projector's cross-entropy."""
        assert isinstance(extras, CrossProjectors)
        g = teacher.rows().to(extras.t2s.weight.dtype)
        scaled = unit_together if self.compat == "published" else unit
        forth, back = looked_up(student, teacher, g, extras, scaled, self.prior)
        best = torch.empty(len(g), dtype=torch.long, device=g.device)
        far = teacher_space(back, g, teacher, self.temperature, best, chunk)
        near = student_space(
            student.lane(),
            Lane.of(forth.to(student.head.weight.dtype), student.head, student.softcap, frozen=True),
            student.labels,
            self.divergence,
            self.temperature,
            only_right=True,
            chunk=chunk,
            teacher_temperature=self.teacher_temperature,
        )
        return Terms(far.sum + near.sum, {**near.parts, **far.parts})


def looked_up(
    student: StudentOutput,
    teacher: TeacherOutput,
    g: Tensor,
    extras: CrossProjectors,
    scaled: Callable[[Tensor], Tensor],
    prior: float,
) -> tuple[Tensor, Tensor]:
    """The teacher's rows for the student's tokens (n, d), and the student's rows for the teacher's tokens (m, D).

    Args:
        student: with ids and embedding.
        teacher: likewise.
        g: its rows (m, D).
        extras: of the objective.
        scaled: what makes the teacher's rows and embeddings alike in size.
        prior: see :attr:`DSKDCMA.prior`.

    Raises:
        ValueError: ids or embeddings are not there.
    """
    ours, theirs = both_ids(student, teacher)
    if student.embedding is None or teacher.embedding is None:
        raise ValueError("cross-model attention needs the embeddings of both models")
    kind = g.dtype
    query = extras.query(_seen(ours, student.embedding).to(kind))
    key = scaled(_seen(theirs, teacher.embedding).to(kind))
    values = extras.t2s(scaled(g) + scaled(teacher.embedding[theirs.labels].to(kind)))
    bias = None
    if prior:
        bias = prior * (1 - byte_cost(student, teacher).transpose(1, 2)).clamp_min(_APART).log()
    forth, back = attention(
        padded(query, ours.offsets), padded(key, theirs.offsets), mask_of(ours.offsets), mask_of(theirs.offsets), bias
    )
    to_student = forth @ padded(values, theirs.offsets).to(forth.dtype)
    to_teacher = back @ padded(extras.s2t(student.rows.to(kind)), ours.offsets).to(back.dtype)
    return to_student[mask_of(ours.offsets)].to(kind), to_teacher[mask_of(theirs.offsets)].to(kind)


def byte_cost(student: StudentOutput, teacher: TeacherOutput) -> Tensor:
    """How little of their bytes two tokens of a text share, (B, M, N); see :func:`~raycloud.distill.costs.span_cost`.

    Where both sides have the same tokens, a token is a byte.
    """
    ours, theirs = both_ids(student, teacher)
    mine, its = teacher.spans or [torch.stack([one.places, one.places + 1], dim=1) for one in (ours, theirs)]
    return span_cost(padded(its, theirs.offsets), padded(mine, ours.offsets))


def _seen(ids: Ids, table: Tensor) -> Tensor:
    return torch.cat([table[ids.inputs], table[ids.labels]], dim=-1)
