"""Dual-space distillation (DSKD, Zhang et al. 2024, arXiv 2406.17328, and DSKDv2, 2025, arXiv 2504.11426).

Distributions made by two heads live in two spaces. Here they are compared under one head, twice: the teacher's rows are
projected to the student's width and go through the student's head, the student's rows through the teacher's.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.distill.head_loss import Lane, head_loss
from raycloud.distill.objective import Objective, Sizes, StudentOutput, TeacherOutput, Terms, Vocabularies
from raycloud.distill.objectives.forward_kl import forward_kl
from raycloud.distill.objectives.plain import AnyDivergence


class Projectors(nn.Module):
    """Teacher to student and back: (…, D) to (…, d) and (…, d) to (…, D), both trained."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.t2s = nn.Linear(teacher, student)
        self.s2t = nn.Linear(student, teacher)


class FittedProjectors(nn.Module):
    """As :class:`Projectors`, begun where logits survive the way, without biases; only ``t2s`` is trained.

    ``t2s`` maps the teacher's rows so that the student's head makes of them what the teacher's head does, as well as
    least squares can over the shared words; ``s2t`` the other way round. It follows the student's head as that learns,
    at every ``refresh``-th use: fitting it costs as much as a head's product with a batch.

    Args:
        student_head: (s, d), of the shared words.
        teacher_head: (s, D), of the same words.
        refresh: see above.
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
        # What s2t depends on is saved with the rest: a resumed run refreshes when the other would have.
        self.register_buffer("inverse", inverse_gram(teacher_head).to(torch.float32))
        self.register_buffer("matrix", torch.zeros(student_head.shape[1], teacher_head.shape[1]))
        self.register_buffer("uses", torch.tensor(0))

    @torch.no_grad()
    def follow(self, student_head: Tensor, teacher_head: Tensor) -> None:
        """Fit ``s2t`` to the heads (s, d) and (s, D) as they are now, if it is time to."""
        if int(self.uses) % self.refresh == 0:
            kind = self.inverse.dtype
            self.matrix.copy_(student_head.to(kind).T @ teacher_head.to(kind) @ self.inverse)
        self.uses += 1

    def s2t(self, rows: Tensor) -> Tensor:
        """The student's rows (c, d) in the teacher's width (c, D)."""
        return rows @ self.matrix.to(rows.dtype)


def inverse_gram(head: Tensor) -> Tensor:
    """(HᵀH)⁻¹ (d, d) of a head (s, d) in float64; as a pseudo-inverse where the words do not span the width."""
    head = head.double()
    return torch.linalg.pinv(head.T @ head, hermitian=True)


def fitted(source: Tensor, target: Tensor) -> Tensor:
    """The matrix (D, d) that takes rows for the head ``source`` (s, D) to rows for the head ``target`` (s, d).

    It minimises ‖g·source ᵀ − g·X·targetᵀ‖ over the s words for every row g: X = sourceᵀ·target·(targetᵀ·target)⁻¹.
    """
    return (source.double().T @ target.double()) @ inverse_gram(target)


class DSKD(Objective):
    """Both spaces, at tokens that both tokenizers have; with one tokenizer at all of them.

    Both versions are as published, with ``refresh: 1`` for version 2. Not reproduced: tokens paired by text
    without spaces, so that " a" is "a", and a threshold of agreement above which wrong choices are taught, too.
    """

    name: Literal["dskd"] = "dskd"
    version: Literal[1, 2] = 2
    """2 begins with fitted projectors and learns from the teacher's choice where it arrives; 1 begins at random and
    teaches the projector the data's own next token."""
    temperature: float = Field(2.0, gt=0)
    divergence: AnyDivergence = Field(default={"name": "forward_kl"}, validate_default=True)
    """In the student's space; its temperature is not used. The teacher's space has forward KL."""
    refresh: int = Field(8, gt=0)
    """Micro-batches between two fits of version 2's way to the teacher's space."""

    def extras(self, sizes: Sizes) -> nn.Module:
        """The projectors.

        Raises:
            ValueError: version 2 without both heads.
        """
        if self.version == 1:
            return Projectors(sizes.student, sizes.teacher)
        if sizes.student_head is None or sizes.teacher_head is None:
            raise ValueError("version 2 of 'dskd' needs both heads to begin with")
        return FittedProjectors(*_shared(sizes.student_head, sizes.teacher_head, sizes.words), self.refresh)

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> Terms:
        """``student_space`` and ``teacher_space`` are divergences, ``projected`` is the projector's cross-entropy."""
        mine, theirs = paired(student, teacher)
        h, labels, g = student.rows[mine], student.labels[mine], teacher.rows(theirs)
        assert isinstance(extras, Projectors | FittedProjectors)
        kind = extras.t2s.weight.dtype
        if isinstance(extras, FittedProjectors):
            extras.follow(*_shared(student.head.weight.detach(), teacher.frozen.weight, teacher.words))
        back = extras.s2t(h.to(kind))
        best = torch.empty(len(g), dtype=torch.long, device=g.device)
        far = teacher_space(back, g, teacher, self.temperature, best, chunk)
        targets = labels if self.version == 1 else named(best, teacher, len(student.head.weight))
        near = student_space(
            Lane.of(h, student.head, student.softcap),
            Lane.of(extras.t2s(g.to(kind)).to(student.head.weight.dtype), student.head, student.softcap, frozen=True),
            targets,
            self.divergence,
            self.temperature,
            only_right=self.version == 2,
            chunk=chunk,
        )
        return Terms(far.sum + near.sum, {**near.parts, **far.parts})


def paired(student: StudentOutput, teacher: TeacherOutput) -> tuple[Tensor, Tensor]:
    """Flat indices (P,), (P,) of the student's tokens that have a partner, and of their partners."""
    if teacher.partner is None:
        every = torch.arange(len(student.labels), device=student.rows.device)
        return every, every
    mine = (teacher.partner >= 0).nonzero()[:, 0]
    return mine, teacher.partner[mine]


def named(ids: Tensor, teacher: TeacherOutput, words: int) -> Tensor:
    """The student's ids (c,) for the teacher's, -1 where the student has no such word."""
    if teacher.words is None:
        return torch.where(ids < words, ids, -1)
    mine, theirs = teacher.words.shared
    table = torch.full((len(teacher.frozen.weight),), -1, device=ids.device)
    table[theirs] = mine
    return table[ids]


def _shared(student: Tensor, teacher: Tensor, words: Vocabularies | None) -> tuple[Tensor, Tensor]:
    if words is None:
        both = min(len(student), len(teacher))
        return student[:both], teacher[:both]
    mine, theirs = words.shared
    return student[mine], teacher[theirs]


def teacher_space(
    back: Tensor, g: Tensor, teacher: TeacherOutput, temperature: float, best: Tensor, chunk: int
) -> Terms:
    """Forward KL of projected student rows (c, D) from the teacher's own (c, D), under the teacher's head.

    The teacher's most likely word of each token is written to ``best`` (c,) on the way.
    """
    frozen = teacher.frozen

    def terms(ours: Tensor, theirs: Tensor, at: slice) -> Tensor:
        best[at] = theirs.argmax(dim=-1)
        log_p, log_q = ((one / temperature).log_softmax(dim=-1) for one in (theirs, ours))
        return forward_kl(log_p, log_q).sum()[None]

    def lane(rows: Tensor) -> Lane:
        return Lane(rows, frozen.weight.to(rows.dtype), frozen.bias, frozen.softcap)

    total, sums = head_loss([lane(back), lane(g.to(back.dtype))], terms, torch.ones(1, device=back.device), chunk=chunk)
    return Terms(total, {"teacher_space": sums[0]})


def student_space(
    own: Lane,
    projected: Lane,
    targets: Tensor,
    divergence: AnyDivergence,
    temperature: float,
    *,
    only_right: bool,
    chunk: int,
    teacher_temperature: float = 1.0,
) -> Terms:
    """The student learns from the projected teacher, and the projector to say ``targets`` (c,), -1 for nothing.

    Args:
        own: the student's rows.
        projected: the teacher's rows in the student's width.
        targets: words that the projected rows should lead to.
        divergence: of the student from the projected teacher, which is a constant for it.
        temperature: of both.
        only_right: teach the student only where the projected teacher's first choice is the target.
        chunk: tokens whose logits exist at a time.
        teacher_temperature: divides the projected teacher's logits once more.
    """

    def terms(z: Tensor, aim: Tensor, at: slice) -> Tensor:
        wanted = targets[at]
        known = wanted >= 0
        entropy = nn.functional.cross_entropy(aim, wanted, ignore_index=-1, reduction="sum")
        fixed = aim.detach()
        right = known & (fixed.argmax(dim=-1) == wanted) if only_right else torch.ones_like(known)
        log_p = (fixed[right] / (temperature * teacher_temperature)).log_softmax(dim=-1)
        log_q = (z[right] / temperature).log_softmax(dim=-1)
        return torch.stack([divergence.between(log_p, log_q).sum(), entropy, right.sum().to(z.dtype)])

    weights = torch.tensor([1.0, 1.0, 0.0], device=own.rows.device)
    total, sums = head_loss([own, projected], terms, weights, chunk=chunk)
    return Terms(total, {"student_space": sums[0], "projected": sums[1], "taught": sums[2]})
