"""Dual-space distillation with cross-model attention (DSKD-CMA, Zhang et al. 2024, arXiv 2406.17328, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raycloud.distill.divergence import build_divergence
from raycloud.distill.objective import (
    LossTerms,
    ModelSizes,
    Objective,
    StudentOutput,
    TeacherOutput,
    TokenIds,
    both_ids,
    register,
)
from raycloud.distill.objective_options import DSKDCMAOptions
from raycloud.distill.objectives.dskd import Projectors, student_space, teacher_space
from raycloud.distill.objectives.forward_kl import ForwardKL
from raycloud.distill.optimal_transport import at_least_float32
from raycloud.distill.ragged import mask_of, padded
from raycloud.distill.transport_costs import span_cost

_NO_OVERLAP_SHARE = 1e-3
"""Shared byte fraction assumed for tokens without a common byte."""


class CrossAttentionProjectors(Projectors):
    """Projectors with ``query``, (…, 2d) to (…, 2D), which makes queries from the student's token embeddings."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__(student, teacher)
        self.query = nn.Linear(2 * student, 2 * teacher)


def unit_rms(hidden: Tensor) -> Tensor:
    """Scale vectors (…, d) to a root mean square of 1."""
    return hidden / hidden.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp_min(torch.finfo(hidden.dtype).tiny)


def unit_batch_deviation(hidden: Tensor) -> Tensor:
    """Divide vectors (…, d) by the standard deviation of the whole batch, as published: a text's loss depends on its
    batch."""
    return hidden / hidden.std().clamp_min(torch.finfo(hidden.dtype).tiny)


def attention(
    query: Tensor, key: Tensor, query_mask: Tensor, key_mask: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention weights (B, N, M) of queries over keys and (B, M, N) of keys over queries, from one matrix product.

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


@register
class DSKDCMA(DSKDCMAOptions, Objective):
    """Dual-space distillation with attention in both directions between the student's and the teacher's tokens of a
    text.

    ``compat: published`` is songmzhang/DSKD 077337a (``code/criterions/dual_space_kd_with_cross_model_attention.py``).
    Not reproduced: filler ids, prompts and padding, which affect its standard deviations.
    """

    def extras(self, sizes: ModelSizes) -> nn.Module:
        """Projectors of both hidden states and of the query."""
        return CrossAttentionProjectors(sizes.student_hidden_size, sizes.teacher_hidden_size)

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> LossTerms:
        """Sum of ``student_space`` and ``teacher_space`` (divergences) and ``projected`` (cross-entropy of the
        projector).

        The part ``taught``, the number of tokens whose divergence is in ``student_space``, is not in the sum.
        """
        assert isinstance(extras, CrossAttentionProjectors)
        g = teacher.hidden().to(extras.t2s.weight.dtype)
        normalise = unit_batch_deviation if self.compat == "published" else unit_rms
        teacher_at_student, student_at_teacher = cross_attend(student, teacher, g, extras, normalise, self.prior)
        teacher_choice = torch.empty(len(g), dtype=torch.long, device=g.device)
        in_teacher_space = teacher_space(
            student_at_teacher, g, teacher, ForwardKL(), self.temperature, teacher_choice, chunk
        )
        in_student_space = student_space(
            student.logits_view(),
            student.view_of(teacher_at_student.to(student.head.weight.dtype), frozen=True),
            student.labels,
            build_divergence(self.divergence),
            self.temperature,
            only_right=True,
            chunk=chunk,
            teacher_temperature=self.teacher_temperature,
        )
        return LossTerms(
            in_teacher_space.sum + in_student_space.sum, {**in_student_space.parts, **in_teacher_space.parts}
        )


def cross_attend(
    student: StudentOutput,
    teacher: TeacherOutput,
    teacher_hidden: Tensor,
    extras: CrossAttentionProjectors,
    normalise: Callable[[Tensor], Tensor],
    prior: float,
) -> tuple[Tensor, Tensor]:
    """Teacher states at the student's tokens (n, d), and student states at the teacher's tokens (m, D).

    Args:
        student: with ids and embedding.
        teacher: with ids and embedding.
        teacher_hidden: the teacher's hidden states (m, D).
        extras: projectors of the objective.
        normalise: normalises the teacher's hidden states and embeddings.
        prior: see :attr:`DSKDCMA.prior`.

    Raises:
        ValueError: ids or embeddings are missing.
    """
    ours, theirs = both_ids(student, teacher)
    if student.embedding is None or teacher.embedding is None:
        raise ValueError("cross-model attention needs the embeddings of both models")
    kind = teacher_hidden.dtype
    query = extras.query(_token_pair_embedding(ours, student.embedding).to(kind))
    key = normalise(_token_pair_embedding(theirs, teacher.embedding).to(kind))
    values = extras.t2s(normalise(teacher_hidden) + normalise(teacher.embedding[theirs.labels].to(kind)))
    bias = None
    if prior:
        bias = prior * (1 - byte_cost(student, teacher).transpose(1, 2)).clamp_min(_NO_OVERLAP_SHARE).log()
    forth, back = attention(
        padded(query, ours.offsets), padded(key, theirs.offsets), mask_of(ours.offsets), mask_of(theirs.offsets), bias
    )
    to_student = forth @ padded(values, theirs.offsets).to(forth.dtype)
    to_teacher = back @ padded(extras.s2t(student.hidden.to(kind)), ours.offsets).to(back.dtype)
    return to_student[mask_of(ours.offsets)].to(kind), to_teacher[mask_of(theirs.offsets)].to(kind)


def byte_cost(student: StudentOutput, teacher: TeacherOutput) -> Tensor:
    """Cost of two tokens of a text by their shared bytes, (B, M, N); see ``transport_costs.span_cost``.

    If both models have the same tokens, each token counts as one byte.
    """
    ours, theirs = both_ids(student, teacher)
    student_spans, teacher_spans = teacher.spans or [
        torch.stack([one.positions, one.positions + 1], dim=1) for one in (ours, theirs)
    ]
    return span_cost(padded(teacher_spans, theirs.offsets), padded(student_spans, ours.offsets))


def _token_pair_embedding(ids: TokenIds, table: Tensor) -> Tensor:
    return torch.cat([table[ids.inputs], table[ids.labels]], dim=-1)
