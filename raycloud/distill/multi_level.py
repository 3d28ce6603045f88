"""MultiLevelOT (Cui et al. 2025, arXiv 2412.14528): three comparisons of ranked probabilities across vocabularies.

A token is the vector of its probabilities in an order of the vocabulary that each model has of its own, so that words
need no partner in the other vocabulary. The published order is by mass over the whole batch, which gives one text
another loss in another batch; :func:`sequence_ranking` takes it over the text. The published vectors go through a
second and a third softmax, which leaves them all but uniform; here they are compared as they are.

:func:`published_levels` is what the two public programs compute, for comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raycloud.distill.transport import at_least_float32, relative_epsilon, sinkhorn, transport_loss, uniform_marginal

_FLOOR = 1e-7
"""The least probability a logarithm sees."""


@dataclass(frozen=True)
class Levels:
    """The terms of each sequence (B,), as sums over its tokens, not weighted.

    The publication adds the first, 0.1 times the second and 0.1 times the third, and 1.5 times that to cross-entropy.
    """

    absolute: Tensor
    logarithmic: Tensor
    transport: Tensor


def sequence_ranking(probabilities: Tensor, ids: Tensor, mask: Tensor, keep: int = 50) -> Tensor:
    """Put every token's probabilities in one order for the whole text: by the mass a word has over all its tokens.

    The cost grows with N·k; no tensor is as wide as the vocabulary.

    Args:
        probabilities: (B, N, k), the largest of each token.
        ids: (B, N, k), the words they belong to.
        mask: (B, N).
        keep: words that keep a place, those with the most mass.

    Returns:
        (B, N, keep) in float32 or better: zero for words outside a token's k, and on padding.
    """
    p = at_least_float32(probabilities).masked_fill(~mask[..., None], 0.0)
    words = ids.masked_fill(~mask[..., None], -1).flatten(1).long()
    ordered, order = words.sort(dim=1, stable=True)
    fresh = torch.ones_like(ordered)
    fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Words are numbered from 0 within each text, so that their masses fit where its entries do.
    number = torch.empty_like(words).scatter_(1, order, fresh.cumsum(dim=1) - 1)
    mass = torch.zeros_like(words, dtype=p.dtype).scatter_add_(1, number, p.detach().flatten(1))
    by_mass = mass.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(words.shape[1], device=words.device).expand_as(words)
    place = torch.empty_like(words).scatter_(1, by_mass, places).gather(1, number).clamp_max(keep)
    ranked = p.new_zeros(*p.shape[:2], keep + 1).scatter_add(2, place.view(p.shape), p)
    return ranked[..., :keep]


def same_index(teacher_mask: Tensor, student_mask: Tensor) -> Tensor:
    """Partners (B, N) by position, as published: the i-th teacher token for the i-th student token, −1 past the end.

    Tokens at one position seldom cover the same text; partners by byte spans are the better choice where known.
    """
    count = student_mask.shape[1]
    places = torch.arange(count, device=student_mask.device).expand(student_mask.shape)
    held = nn.functional.pad(teacher_mask, (0, max(0, count - teacher_mask.shape[1])))[:, :count]
    return places.masked_fill(~(held & student_mask), -1)


def absolute_difference(teacher: Tensor, student: Tensor, partners: Tensor) -> Tensor:
    """Σ_i Σ_k \\|t_k − s_k\\| (B,) over student tokens with a partner.

    Args:
        teacher: probabilities (B, M, K) in the teacher's order.
        student: (B, N, K) in the student's order.
        partners: (B, N), for every student token the teacher's at whose position it is compared, −1 for none.
    """
    t, s = _paired(teacher, student, partners)
    return (t - s).abs().sum(dim=-1).masked_fill(partners < 0, 0.0).sum(dim=-1)


def logarithmic(teacher: Tensor, student: Tensor, partners: Tensor) -> Tensor:
    """Σ_i of the cross-entropy −Σ_k t_k log s_k (B,), with the mass outside the K as one more entry.

    Without that entry a student would do best to put all of its mass on the K. Arguments as above.
    """
    t, s = (_with_tail(x) for x in _paired(teacher, student, partners))
    return -(t * (s + _FLOOR).log()).sum(dim=-1).masked_fill(partners < 0, 0.0).sum(dim=-1)


def sinkhorn_distance(
    teacher: Tensor, student: Tensor, teacher_mask: Tensor, student_mask: Tensor, share: float = 0.1, sweeps: int = 30
) -> Tensor:
    """N ⟨P, C⟩ (B,): what it costs to carry one text's tokens to the other's, with C the L1 distance of two tokens.

    Args:
        teacher: probabilities (B, M, K).
        student: (B, N, K).
        teacher_mask: (B, M).
        student_mask: (B, N).
        share: ε as a share of the median cost.
        sweeps: see :func:`raycloud.distill.transport.sinkhorn`.
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
    partners: Tensor | None = None,
    *,
    share: float = 0.1,
    sweeps: int = 30,
) -> Levels:
    """All three terms over response tokens; see the functions above. Partners are by position unless given."""
    if teacher.shape[-1] != student.shape[-1]:
        raise ValueError(f"both sides must keep as many ranks, got {teacher.shape[-1]} and {student.shape[-1]}")
    if partners is None:
        partners = same_index(teacher_mask, student_mask)
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
    """The terms as the public programs compute them, from all logits. Slow and large: for comparisons on small inputs.

    ``official`` is the authors' program. Both vocabularies are ranked by mass over the batch, responses are moved to
    the front and padded with zeros to the longest, and ``logarithmic`` and ``transport`` see that padding. ``mcwkd`` is
    the port of MCW-KD: temperature 2, all positions with the response moved to the front and the rest behind it, and
    the two sides of the cross-entropy exchanged. In both the vectors go through another softmax before the last two
    terms, Sinkhorn is 10 normalisations in probability space at ε = 0.1, and its gradient goes through all of them.

    Args:
        teacher: logits (B, S_t, W).
        student: logits (B, S, V).
        teacher_mask: (B, S_t), true at the labelled positions, which are contiguous.
        student_mask: (B, S).
        compat: which program.
        keep: words ranked.

    Returns:
        Terms (B,) whose sums, divided by the labelled student tokens of the batch, are the published numbers.
    """
    if compat not in ("official", "mcwkd"):
        raise ValueError(f"compat must be 'official' or 'mcwkd', got {compat!r}")
    keep = min(keep, teacher.shape[-1], student.shape[-1])
    answers = torch.stack([teacher_mask.sum(dim=1), student_mask.sum(dim=1)])
    official = compat == "official"
    length = int(answers.max()) if official else max(teacher.shape[1], student.shape[1])
    t, s = (
        _ranked_over_batch(logits, mask, length, keep, official)
        for logits, mask in ((teacher, teacher_mask), (student, student_mask))
    )
    gaps = (t - s).abs().sum(dim=-1)
    if official:
        shorter = answers.amin(dim=0)
        compared = torch.arange(length, device=gaps.device) < shorter[:, None]
        absolute = gaps.masked_fill(~compared, 0.0).sum(dim=1) / shorter.clamp_min(1)
        entropies = -(t.softmax(dim=-1) * s.log_softmax(dim=-1)).sum(dim=-1)
    else:
        absolute = gaps.mean(dim=1)
        entropies = -(s.softmax(dim=-1) * t.log_softmax(dim=-1)).sum(dim=-1)
    count, batch = answers[1].sum(), len(gaps)
    return Levels(
        absolute * count / batch,
        entropies.mean(dim=1) * count / batch,
        0.001 * _normalised_transport((s / 2).softmax(dim=-1), (t / 2).softmax(dim=-1)) * count,
    )


def _paired(teacher: Tensor, student: Tensor, partners: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's vectors at the student's positions (B, N, K), and the student's."""
    at = partners.clamp_min(0)[..., None].expand(-1, -1, teacher.shape[-1])
    return at_least_float32(teacher).gather(1, at), at_least_float32(student)


def _with_tail(p: Tensor) -> Tensor:
    return torch.cat([p, (1 - p.sum(dim=-1, keepdim=True)).clamp_min(0.0)], dim=-1)


def _ranked_over_batch(logits: Tensor, mask: Tensor, length: int, keep: int, answers_only: bool) -> Tensor:
    """(B, length, keep): probabilities with the response in front, the batch's heaviest words first."""
    logits = at_least_float32(logits)
    temperature = 1.0 if answers_only else 2.0
    # The clamp takes no part but in the gradient, where all logits are the same.
    deviation = logits.var(dim=-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
    p = (logits / (deviation + 1e-4) / temperature).softmax(dim=-1)
    if answers_only:
        p = p.masked_fill(~mask[..., None], 0.0)
    start = mask.int().argmax(dim=1, keepdim=True)
    places = (torch.arange(p.shape[1], device=p.device) + start) % p.shape[1]
    p = p.gather(1, places[..., None].expand_as(p))[:, :length]
    p = nn.functional.pad(p, (0, 0, 0, length - p.shape[1]))
    return p[..., p.detach().sum(dim=(0, 1)).topk(keep).indices]


def _normalised_transport(rows: Tensor, columns: Tensor, epsilon: float = 0.1, sweeps: int = 10) -> Tensor:
    cost = torch.cdist(rows, columns, p=1.0)
    plan = (-cost / epsilon).exp()
    for _ in range(sweeps):
        plan = plan / plan.sum(dim=2, keepdim=True)
        plan = plan / plan.sum(dim=1, keepdim=True)
    return (plan * cost).sum(dim=(1, 2))
