"""Terms of MultiLevelOT (Cui et al. 2025, arXiv 2412.14528): ranked probabilities compared across vocabularies in three
ways.

Each token is represented by its probabilities, sorted by a ranking of each model's own vocabulary, so that no map
between the vocabularies is needed. The published ranking is by mass over the whole batch, so that a text's loss depends
on its batch; :func:`sequence_ranking` ranks over the text. The published vectors pass through a second and a third
softmax, which makes them nearly uniform; here they are compared without these.

:func:`published_levels` computes what the two public programs compute, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raycloud.distill.optimal_transport import (
    at_least_float32,
    relative_epsilon,
    sinkhorn,
    transport_loss,
    uniform_marginal,
)

_FLOOR = 1e-7
"""Least probability in a logarithm."""


@dataclass(frozen=True)
class Levels:
    """Terms of each sequence (B,), as unweighted sums over its tokens.

    The publication adds ``absolute``, 0.1 · ``logarithmic`` and 0.1 · ``transport``, and adds 1.5 times that sum to
    cross-entropy.
    """

    absolute: Tensor
    logarithmic: Tensor
    transport: Tensor


def sequence_ranking(probabilities: Tensor, ids: Tensor, mask: Tensor, keep: int = 50) -> Tensor:
    """Sort every token's probabilities by one ranking of the ids for the whole text: by total mass over its tokens.

    The cost grows with N·k; no tensor is as wide as the vocabulary.

    Args:
        probabilities: (B, N, k), the largest at each token.
        ids: (B, N, k), their vocabulary ids.
        mask: (B, N).
        keep: number of ids kept, those with the most mass.

    Returns:
        (B, N, keep) in float32 or better: zero for ids outside a token's k, and on padding.
    """
    p = at_least_float32(probabilities).masked_fill(~mask[..., None], 0.0)
    known_ids = ids.masked_fill(~mask[..., None], -1).flatten(1).long()
    ordered, order = known_ids.sort(dim=1, stable=True)
    fresh = torch.ones_like(ordered)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Ids are numbered from 0 within each text, so that their masses fit into a tensor of its entries' size.
    number = torch.empty_like(known_ids).scatter_(1, order, fresh.cumsum(dim=1) - 1)
    mass = torch.zeros_like(known_ids, dtype=p.dtype).scatter_add_(1, number, p.detach().flatten(1))
    by_mass = mass.argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(known_ids.shape[1], device=known_ids.device).expand_as(known_ids)
    rank = torch.empty_like(known_ids).scatter_(1, by_mass, positions).gather(1, number).clamp_max(keep)
    ranked = p.new_zeros(*p.shape[:2], keep + 1).scatter_add(2, rank.view(p.shape), p)
    return ranked[..., :keep]


def absolute_difference(teacher: Tensor, student: Tensor, partners: Tensor) -> Tensor:
    """Distance Σ_i Σ_k \\|t_k − s_k\\| (B,) over student tokens with a partner.

    Args:
        teacher: probabilities (B, M, K) in the teacher's ranking.
        student: probabilities (B, N, K) in the student's ranking.
        partners: (B, N), index of the teacher token for every student token, −1 for none.
    """
    t, s = _paired(teacher, student, partners)
    return (t - s).abs().sum(dim=-1).masked_fill(partners < 0, 0.0).sum(dim=-1)


def logarithmic(teacher: Tensor, student: Tensor, partners: Tensor) -> Tensor:
    """Sum over i of the cross-entropy −Σ_k t_k log s_k (B,), with the mass outside the K as one more entry.

    Without that entry the optimum would put all of the student's mass on the K. Arguments as in
    :func:`absolute_difference`.
    """
    t, s = (_append_tail_mass(x) for x in _paired(teacher, student, partners))
    return -(t * (s + _FLOOR).log()).sum(dim=-1).masked_fill(partners < 0, 0.0).sum(dim=-1)


def sinkhorn_distance(
    teacher: Tensor, student: Tensor, teacher_mask: Tensor, student_mask: Tensor, share: float = 0.1, sweeps: int = 30
) -> Tensor:
    """Transport cost N ⟨P, C⟩ (B,) between the tokens of two texts, with C the L1 distance of two tokens.

    Args:
        teacher: probabilities (B, M, K).
        student: probabilities (B, N, K).
        teacher_mask: (B, M).
        student_mask: (B, N).
        share: ε as a share of the median cost.
        sweeps: see :func:`raycloud.distill.optimal_transport.sinkhorn`.
    """
    t, s = at_least_float32(teacher), at_least_float32(student)
    kind = torch.promote_types(t.dtype, s.dtype)
    cost = torch.cdist(t.to(kind), s.to(kind), p=1.0)
    mu, nu = uniform_marginal(teacher_mask, kind), uniform_marginal(student_mask, kind)
    plan = sinkhorn(cost, mu, nu, relative_epsilon(cost, mu, nu, share), sweeps)
    return transport_loss(cost, plan) * student_mask.sum(dim=-1)


def multi_level(
    teacher: Tensor,
    student: Tensor,
    teacher_mask: Tensor,
    student_mask: Tensor,
    partners: Tensor,
    *,
    share: float = 0.1,
    sweeps: int = 30,
) -> Levels:
    """Compute all three terms over response tokens; see the functions above."""
    if teacher.shape[-1] != student.shape[-1]:
        raise ValueError(f"both sides must keep as many ranks, got {teacher.shape[-1]} and {student.shape[-1]}")
    return Levels(
        absolute_difference(teacher, student, partners),
        logarithmic(teacher, student, partners),
        sinkhorn_distance(teacher, student, teacher_mask, student_mask, share, sweeps),
    )


def published_levels(
    teacher: Tensor,
    student: Tensor,
    teacher_mask: Tensor,
    student_mask: Tensor,
    compat: Literal["official", "mcwkd"],
    keep: int = 50,
) -> Levels:
    """Compute the terms as the public programs do, from all logits. Slow and large: for comparison on small inputs.

    ``official`` is the authors' program (2018cx/Multi-Level-OT 712cfb4, ``models/distillation_model.py``). Both
    vocabularies are ranked by mass over the batch, responses are moved to the front and padded with zeros to the
    longest, and ``logarithmic`` and ``transport`` include that padding. ``logarithmic`` is the teacher's cross-entropy
    with the student's softmax as its target, −Σ softmax(s)·log softmax(t).

    ``mcwkd`` is the port of MCW-KD (HoangTran223/MCW-KD 70ceb2d, ``code/criterions/MultiLevelOT.py``): temperature 2,
    all positions with the response moved to the front and the rest after it, and the target is the teacher's, −Σ
    softmax(t)·log softmax(s). It counts the tokens of each text's shorter side.

    In both programs the vectors pass through another softmax before the last two terms, Sinkhorn is 10 normalisations
    in probability space at ε = 0.1, and its gradient passes through all of them.

    Args:
        teacher: logits (B, S_t, W).
        student: logits (B, S, V).
        teacher_mask: (B, S_t), true at the labelled positions, which are contiguous.
        student_mask: (B, S).
        compat: the program.
        keep: number of ids ranked.

    Returns:
        Terms (B,) whose sums are what the programs divide by the tokens of a step: ``official`` is a mean, and its
        terms are multiplied by the labelled student tokens of the batch.
    """
    if compat not in ("official", "mcwkd"):
        raise ValueError(f"compat must be 'official' or 'mcwkd', got {compat!r}")
    width = min(keep, max(teacher.shape[-1], student.shape[-1]))
    answers = torch.stack([teacher_mask.sum(dim=1), student_mask.sum(dim=1)])
    official = compat == "official"
    length = int(answers.max()) if official else max(teacher.shape[1], student.shape[1])
    t, s = (
        _ranked_over_batch(logits, mask, length, width, official)
        for logits, mask in ((teacher, teacher_mask), (student, student_mask))
    )
    gaps = (t - s).abs().sum(dim=-1)
    shorter = answers.amin(dim=0)
    if official:
        compared = torch.arange(length, device=gaps.device) < shorter[:, None]
        absolute = gaps.masked_fill(~compared, 0.0).sum(dim=1) / shorter.clamp_min(1)
        target, other, count = s, t, answers[1].sum()
    else:
        absolute = gaps.mean(dim=1)
        target, other, count = t, s, shorter.sum()
    cross_entropy = -(target.softmax(dim=-1) * other.log_softmax(dim=-1)).sum(dim=-1)
    rows, columns = (t, s) if official else (s, t)
    batch = len(gaps)
    return Levels(
        absolute * count / batch,
        cross_entropy.mean(dim=1) * count / batch,
        0.001 * _normalised_transport((rows / 2).softmax(dim=-1), (columns / 2).softmax(dim=-1)) * count,
    )


def _paired(teacher: Tensor, student: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher's vectors at the student's positions (B, N, K), and the student's."""
    at = partners.clamp_min(0)[..., None].expand(-1, -1, teacher.shape[-1])
    return at_least_float32(teacher).gather(1, at), at_least_float32(student)


def _append_tail_mass(p: Tensor) -> Tensor:
    return torch.cat([p, (1 - p.sum(dim=-1, keepdim=True)).clamp_min(0.0)], dim=-1)


def _ranked_over_batch(logits: Tensor, mask: Tensor, length: int, keep: int, answers_only: bool) -> Tensor:
    """Probabilities (B, length, keep) with the response moved to the front, ids with the most mass in the batch
    first."""
    logits = at_least_float32(logits)
    temperature = 1.0 if answers_only else 2.0
    # The clamp only changes the gradient at positions where all logits are equal.
    deviation = logits.var(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    p = (logits / (deviation + 1e-4) / temperature).softmax(dim=-1)
    if answers_only:
        p = p.masked_fill(~mask[..., None], 0.0)
    start = mask.int().argmax(dim=1, keepdim=True)
    positions = (torch.arange(p.shape[1], device=p.device) + start) % p.shape[1]
    p = p.gather(1, positions[..., None].expand_as(p))[:, :length]
    p = nn.functional.pad(p, (0, 0, 0, length - p.shape[1]))
    heaviest = p[..., p.detach().sum(dim=(0, 1)).topk(min(keep, p.shape[-1])).indices]
    return nn.functional.pad(heaviest, (0, keep - heaviest.shape[-1]))


def _normalised_transport(rows: Tensor, columns: Tensor, epsilon: float = 0.1, sweeps: int = 10) -> Tensor:
    cost = torch.cdist(rows, columns, p=1.0)
    plan = (-cost / epsilon).exp()
    for _ in range(sweeps):
        plan = plan / plan.sum(dim=2, keepdim=True)
        plan = plan / plan.sum(dim=1, keepdim=True)
    return (plan * cost).sum(dim=(1, 2))
