"""Dual-space distillation (DSKD, Zhang et al. 2024, arXiv 2406.17328, and DSKDv2, 2025, arXiv 2504.11426).

Distributions from two different heads are in two output spaces. Here they are compared under one head, twice: the
teacher's hidden states are projected to the student's hidden size and go through the student's head, and the student's
hidden states are projected and go through the teacher's head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raycloud.distill.divergence import Divergence, build_divergence
from raycloud.distill.head_loss import LogitsView, head_loss
from raycloud.distill.head_top_k import head_top_k
from raycloud.distill.objective import (
    LossTerms,
    ModelSizes,
    Objective,
    SharedVocabulary,
    StudentOutput,
    TeacherOutput,
    register,
)
from raycloud.distill.objective_options import DSKDOptions
from raycloud.distill.objectives.forward_kl import ForwardKL


class Projectors(nn.Module):
    """Linear maps teacher to student, (…, D) to (…, d), and student to teacher, (…, d) to (…, D), both trained."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.t2s = nn.Linear(teacher, student)
        self.s2t = nn.Linear(student, teacher)


class FittedProjectors(nn.Module):
    """:class:`Projectors` without biases, initialised so that logits are preserved; only ``t2s`` is trained.

    ``t2s`` maps the teacher's hidden states so that the student's head gives the teacher's logits, as well as least
    squares over the shared vocabulary can; ``s2t`` does the opposite. ``s2t`` follows the student's head as that is
    trained, at every ``refresh``-th use: a fit costs as much as the head's product with a batch.

    Args:
        student_head: (s, d), rows of the shared vocabulary.
        teacher_head: (s, D), the same vocabulary entries.
        refresh: uses between two fits.
    """

    inverse: Tensor
    matrix: Tensor
    uses: Tensor

    def __init__(self, student_head: Tensor, teacher_head: Tensor, refresh: int) -> None:
        super().__init__()
        self.refresh = refresh
        self.t2s = nn.Linear(teacher_head.shape[1], student_head.shape[1], bias=False)
        with torch.no_grad():
            self.t2s.weight.copy_(fitted(teacher_head, student_head).T)
        # The state of s2t is saved as buffers, so that a resumed run refreshes at the same steps.
        self.register_buffer("inverse", inverse_gram(teacher_head).to(torch.float32))
        self.register_buffer("matrix", torch.zeros(student_head.shape[1], teacher_head.shape[1]))
        self.register_buffer("uses", torch.tensor(0))

    @torch.no_grad()
    def follow(self, student_head: Tensor, teacher_head: Tensor) -> None:
        """Fit ``s2t`` to the current heads (s, d) and (s, D) if it is due."""
        if int(self.uses) % self.refresh == 0:
            kind = self.inverse.dtype
            self.matrix.copy_(student_head.to(kind).T @ teacher_head.to(kind) @ self.inverse)
        self.uses += 1

    def s2t(self, hidden: Tensor) -> Tensor:
        """Project student hidden states (c, d) to the teacher's hidden size (c, D)."""
        return hidden @ self.matrix.to(hidden.dtype)


def inverse_gram(head: Tensor) -> Tensor:
    """Inverse (HᵀH)⁻¹ (d, d) of a head (s, d) in float64; a pseudo-inverse if the vocabulary rows do not span the
    hidden size."""
    head = head.double()
    return torch.linalg.pinv(head.T @ head, hermitian=True)


def fitted(source: Tensor, target: Tensor) -> Tensor:
    """Matrix (D, d) that maps hidden states for the head ``source`` (s, D) to hidden states for the head ``target`` (s,
    d).

    It minimises ‖g·sourceᵀ − g·X·targetᵀ‖ over the s vocabulary entries for every vector g: X =
    sourceᵀ·target·(targetᵀ·target)⁻¹.
    """
    return (source.double().T @ target.double()) @ inverse_gram(target)


@register
class DSKD(DSKDOptions, Objective):
    """Distillation in both spaces, at tokens that both tokenizers have; with one tokenizer at all tokens.

    Version 1 is the published program (songmzhang/DSKD 077337a, ``code/criterions/dual_space_kd.py``), whatever
    ``compat`` is. Version 2 with ``compat: published`` is the program of DSKDv2 (songmzhang/DSKDv2 5025279,
    ``code/criterions/dual_space_kd_v2.py``, and ``dual_space_kd_v2_with_exact_token_alignment.py`` with two
    tokenizers). ``ours`` differs from that in four ways:

    - The student's divergence, at tokens where the projected teacher's choice is the teacher's own, is summed and
      divided by all tokens. Published is the mean over these tokens, in which each weighs more the fewer there are.
    - The teacher's space uses forward KL. Published is the chosen divergence.
    - With two tokenizers all terms are divided by all student tokens. Published are means over the aligned tokens, and
      only those are aligned at which the student's vocabulary has the teacher's choice.
    - The projector to the teacher's space is fitted at every ``refresh``-th micro-batch. Published is at every one.

    Not reproduced: tokens paired by text without spaces, so that " a" matches "a", and a threshold of agreement above
    which wrong choices are used too, which is 1 in the scripts and so never exceeded. The published means are those of
    a micro-batch; in a step of several they are weighted by their tokens and not equally.
    """

    def extras(self, sizes: ModelSizes) -> nn.Module:
        """Projectors between the hidden sizes.

        Raises:
            ValueError: version 2 without both heads.
        """
        if self.version == 1:
            return Projectors(sizes.student_hidden_size, sizes.teacher_hidden_size)
        if sizes.student_head is None or sizes.teacher_head is None:
            raise ValueError("version 2 of 'dskd' needs both heads to begin with")
        refresh = 1 if self.compat == "published" else self.refresh
        return FittedProjectors(*_shared(sizes.student_head, sizes.teacher_head, sizes.vocabulary), refresh)

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> LossTerms:
        """Sum of ``student_space`` and ``teacher_space`` (divergences) and ``projected`` (cross-entropy of the
        projector).

        The part ``taught``, the number of tokens whose divergence is in ``student_space``, is not in the sum.
        """
        student_index, teacher_index = paired_tokens(student, teacher)
        h, labels, g = student.hidden[student_index], student.labels[student_index], teacher.hidden(teacher_index)
        assert isinstance(extras, Projectors | FittedProjectors)
        kind = extras.t2s.weight.dtype
        if isinstance(extras, FittedProjectors):
            extras.follow(*_shared(student.head.weight.detach(), teacher.frozen_head.weight, teacher.vocabulary))
        published = self.compat == "published" and self.version == 2
        aligned = published and teacher.partner is not None
        student_ids = student_id_of_teacher_ids(teacher, len(student.head.weight))
        projected_student, teacher_choice = (
            extras.s2t(h.to(kind)),
            torch.empty(len(g), dtype=torch.long, device=g.device),
        )
        in_teacher_space = teacher_space(
            projected_student,
            g,
            teacher,
            build_divergence(self.divergence) if published else ForwardKL(),
            self.temperature,
            teacher_choice,
            chunk,
            counted_ids=student_ids if aligned else None,
        )
        targets = labels if self.version == 1 else student_ids[teacher_choice]
        student_view = student.view_of(h)
        projected = student.view_of(extras.t2s(g.to(kind)).to(student.head.weight.dtype), frozen=True)
        count, weights = len(student.labels), [1.0, 1.0]
        if published:
            right = head_top_k(projected, 1, chunk=chunk)[1][:, 0] == targets
            weights[0] = count / max(1, int(right.sum()))
        if aligned:
            weights[1] = count / max(1, int((targets >= 0).sum()))
            in_teacher_space = in_teacher_space.scaled(weights[1])
        in_student_space = student_space(
            student_view,
            projected,
            targets,
            build_divergence(self.divergence),
            self.temperature,
            only_right=self.version == 2,
            weights=weights,
            chunk=chunk,
        )
        return LossTerms(
            in_teacher_space.sum + in_student_space.sum, {**in_student_space.parts, **in_teacher_space.parts}
        )


def paired_tokens(student: StudentOutput, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
    """Flat indices (P,), (P,) of the student's tokens that have a partner, and of their partners."""
    if teacher.partner is None:
        every = torch.arange(len(student.labels), device=student.hidden.device)
        return every, every
    student_index = (teacher.partner >= 0).nonzero()[:, 0]
    return student_index, teacher.partner[student_index]


def student_id_of_teacher_ids(teacher: TeacherOutput, student_vocabulary_size: int) -> Tensor:
    """Student id (W,) of every teacher id, -1 if the student's vocabulary has no such entry."""
    ids = torch.arange(len(teacher.frozen_head.weight), device=teacher.frozen_head.weight.device)
    if teacher.vocabulary is None:
        return torch.where(ids < student_vocabulary_size, ids, -1)
    student_ids, teacher_ids = teacher.vocabulary.shared
    return torch.full_like(ids, -1).index_copy_(0, teacher_ids, student_ids)


def _shared(student: Tensor, teacher: Tensor, vocabulary: SharedVocabulary | None) -> tuple[Tensor, Tensor]:
    if vocabulary is None:
        both = min(len(student), len(teacher))
        return student[:both], teacher[:both]
    student_ids, teacher_ids = vocabulary.shared
    return student[student_ids], teacher[teacher_ids]


def teacher_space(
    projected_student: Tensor,
    teacher_hidden: Tensor,
    teacher: TeacherOutput,
    divergence: Divergence,
    temperature: float,
    teacher_choice: Tensor,
    chunk: int,
    counted_ids: Tensor | None = None,
) -> LossTerms:
    """Divergence of projected student states from the teacher's own, under the teacher's head.

    Args:
        projected_student: projected student states (c, D).
        teacher_hidden: the teacher's hidden states (c, D).
        teacher: outputs of the teacher, with its head.
        divergence: its temperature is not used.
        temperature: divides the logits of both.
        teacher_choice: output (c,), filled with the teacher's most likely id of each token.
        chunk: number of tokens whose logits exist at a time.
        counted_ids: (W,) for every teacher id; only tokens whose choice has a value of 0 or more count. None for all.
    """
    frozen = teacher.frozen_head

    def terms(student_logits: Tensor, teacher_logits: Tensor, at: slice) -> Tensor:
        teacher_choice[at] = teacher_logits.argmax(dim=-1)
        log_p, log_q = ((one / temperature).log_softmax(dim=-1) for one in (teacher_logits, student_logits))
        values = divergence.value(log_p, log_q)
        return (values if counted_ids is None else values[counted_ids[teacher_choice[at]] >= 0]).sum()[None]

    def view(hidden: Tensor) -> LogitsView:
        return LogitsView(hidden, frozen.weight.to(hidden.dtype), frozen.bias, frozen.softcap)

    total, sums = head_loss(
        [view(projected_student), view(teacher_hidden.to(projected_student.dtype))],
        terms,
        torch.ones(1, device=projected_student.device),
        chunk=chunk,
    )
    return LossTerms(total, {"teacher_space": sums[0]})


def student_space(
    student_view: LogitsView,
    projected: LogitsView,
    targets: Tensor,
    divergence: Divergence,
    temperature: float,
    *,
    only_right: bool,
    chunk: int,
    teacher_temperature: float = 1.0,
    weights: Sequence[float] = (1.0, 1.0),
) -> LossTerms:
    """Divergence of the student from the projected teacher, and cross-entropy of the projector with ``targets`` (c,),
    -1 for none.

    Args:
        student_view: the student's hidden states and head.
        projected: the teacher's hidden states in the student's hidden size, and the student's head.
        targets: token ids that the projected states should predict.
        divergence: divergence from the projected teacher, which gets no gradient from it.
        temperature: divides the logits of both.
        only_right: include only tokens where the projected teacher's first choice is the target.
        chunk: number of tokens whose logits exist at a time.
        teacher_temperature: additional divisor of the projected teacher's logits.
        weights: weights of the divergence and of the projector's cross-entropy.
    """

    def terms(z: Tensor, projected_logits: Tensor, at: slice) -> Tensor:
        wanted = targets[at]
        known = wanted >= 0
        cross_entropy = nn.functional.cross_entropy(projected_logits, wanted, ignore_index=-1, reduction="sum")
        fixed = projected_logits.detach()
        right = known & (fixed.argmax(dim=-1) == wanted) if only_right else torch.ones_like(known)
        log_p = (fixed[right] / (temperature * teacher_temperature)).log_softmax(dim=-1)
        log_q = (z[right] / temperature).log_softmax(dim=-1)
        return torch.stack([divergence.value(log_p, log_q).sum(), cross_entropy, right.sum().to(z.dtype)])

    factors = torch.tensor([*weights, 0.0], dtype=torch.float64, device=student_view.hidden.device)
    total, sums = head_loss([student_view, projected], terms, factors, chunk=chunk)
    divergence_sum, cross_entropy, taught = sums[0] * weights[0], sums[1] * weights[1], sums[2]
    return LossTerms(total, {"student_space": divergence_sum, "projected": cross_entropy, "taught": taught})
