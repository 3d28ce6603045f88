"""Costs of matching a teacher token with a student token: matrices (B, M, N) for the optimal transport of a text.

These are the costs of multi-cost distillation (MCW-KD, AAAI 2026, doi 10.1609/aaai.v40i39.40619) on the tokens of a
response. Padding is not masked here, except where neighbours are averaged: the marginals of the transport mask it.
Padding must hold finite numbers. All computation is in float32 or better, also under autocast, and no tensor has one
entry per pair and coordinate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raycloud.distill.optimal_transport import at_least_float32, uniform_marginal


class _L2Distance(torch.autograd.Function):
    """L2 distances that are exact near zero, with a gradient computed by two matrix products.

    The library's own gradient keeps one number per pair and coordinate on a GPU, and its distance by matrix product
    loses small distances to cancellation.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(a, b, distance)
        return distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b, distance = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            pull = (grad / distance).masked_fill(distance == 0, 0.0)
            return a * pull.sum(dim=2)[..., None] - pull @ b, b * pull.sum(dim=1)[..., None] - pull.mT @ a


def rank_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """L2 distance between the k largest probabilities of two tokens, regardless of their vocabulary ids.

    Args:
        teacher: probabilities (B, M, k), largest first, as ``topk`` returns them.
        student: probabilities (B, N, k), likewise.
    """
    _check_widths("ranks", teacher, student)
    return _L2Distance.apply(*_same_type(teacher, student))


def rank_kl(teacher: Tensor, student: Tensor, floor: float = 1e-7) -> Tensor:
    """KL(teacher ‖ student) between the k largest probabilities of two tokens, rank by rank.

    If the k do not hold all the mass, this is the divergence of unnormalised vectors, Σ p log(p/q) − p + q, which
    equals KL if they do. It is never negative, and zero only for p = q. The plain sum over top-k entries has neither
    property, and would train the student to put all its mass on its k.

    Args:
        teacher: probabilities (B, M, k), largest first.
        student: probabilities (B, N, k), likewise.
        floor: added to every probability, so that a rank without student probability costs −log of it and not infinity.
    """
    _check_widths("ranks", teacher, student)
    p, q = _same_type(teacher, student)
    p, q = p + floor, q + floor
    with torch.autocast(p.device.type, enabled=False):
        # Σ p log p and Σ p log q are computed separately: their quotient has one entry per pair and rank.
        cross = p @ q.log().mT
    return (torch.xlogy(p, p) - p).sum(dim=-1)[:, :, None] - cross + q.sum(dim=-1)[:, None, :]


def rank_kl_published(teacher: Tensor, student: Tensor, floor: float = 1e-7) -> Tensor:
    """Divergence Σ p log(p / (q + floor)), as in MCW-KD's program, for probabilities that sum to 1. Arguments as in
    :func:`rank_kl`."""
    _check_widths("ranks", teacher, student)
    p, q = _same_type(teacher, student)
    with torch.autocast(p.device.type, enabled=False):
        return torch.xlogy(p, p).sum(dim=-1)[:, :, None] - p @ (q + floor).log().mT


def salience_cost(teacher: Tensor, student: Tensor, head: nn.Module) -> Tensor:
    """Difference of the importance that a shared head gives to two tokens, \\|σ(s(g_i)) − σ(s(h_j))\\|.

    The head must be trained, and by more than this cost: a head that gives all tokens the same importance makes it
    zero.

    Args:
        teacher: hidden states (B, M, d), already projected to the student's hidden size.
        student: hidden states (B, N, d).
        head: float32 or float64, maps (…, d) to (…, 1).
    """
    _check_widths("numbers", teacher, student)
    with torch.autocast(teacher.device.type, enabled=False):
        importance, own = (head(at_least_float32(hidden)).squeeze(-1).sigmoid() for hidden in (teacher, student))
    return (importance[:, :, None] - own[:, None, :]).abs()


def information_marginal(log_p: Tensor, mask: Tensor) -> Tensor:
    """Mass in proportion to a token's information −log p: predictable tokens get little mass. Needs no parameters.

    Args:
        log_p: (B, N), the teacher's log-probability of the actual token.
        mask: (B, N).

    Returns:
        A marginal (B, N) that sums to 1, uniform for a text in which every token has probability 1.
    """
    information = -at_least_float32(log_p).masked_fill(~mask, 0.0)
    total = information.sum(dim=-1, keepdim=True)
    return torch.where(
        total == 0, uniform_marginal(mask, total.dtype), information / total.masked_fill(total == 0, 1.0)
    )


def span_cost(teacher: Tensor, student: Tensor) -> Tensor:
    """Cost 1 − intersection over union of the bytes of two tokens: 0 for the same piece of text, 1 for disjoint ones.

    It replaces the published edit distance along a warping path, which is zero off the path and so moves mass away from
    it. Tokens without bytes, such as an end of text, cost 0 with each other at the same position, else 1.

    Args:
        teacher: byte spans (B, M, 2), start and end (exclusive), integers.
        student: byte spans (B, N, 2), likewise, in the same text.
    """
    start, end = teacher[:, :, None].unbind(-1)
    own_start, own_end = student[:, None].unbind(-1)
    shared = (torch.minimum(end, own_end) - torch.maximum(start, own_start)).clamp_min(0)
    union = (end - start) + (own_end - own_start) - shared
    same_position = (union == 0) & (start == own_start)
    return 1 - torch.where(same_position, 1.0, shared.float() / union.clamp_min(1))


def window_mean(hidden: Tensor, mask: Tensor, radius: int = 4) -> Tensor:
    """Mean of the vectors of each token and of its neighbours up to ``radius`` tokens away, without padding.

    Args:
        hidden: (B, N, d).
        mask: (B, N).
        radius: 0 returns the vectors unchanged.

    Returns:
        (B, N, d) in float32 or better, zero on padding.
    """
    if radius < 0:
        raise ValueError(f"radius must be 0 or more, got {radius}")
    size = 2 * radius + 1
    hidden = at_least_float32(hidden).masked_fill(~mask[..., None], 0.0)
    sums = nn.functional.avg_pool1d(hidden.mT, size, stride=1, padding=radius).mT
    counts = nn.functional.avg_pool1d(mask.to(hidden.dtype)[:, None], size, stride=1, padding=radius).mT
    return (sums / counts.masked_fill(counts == 0, 1.0)).masked_fill(~mask[..., None], 0.0)


def state_distance(teacher: Tensor, student: Tensor, scale: float | Tensor) -> Tensor:
    """L2 distance between hidden states, in units of ``scale``.

    Args:
        teacher: (B, M, d), already projected to the student's hidden size; in the publication, means of
            :func:`window_mean`.
        student: (B, N, d), likewise.
        scale: one number, or a tensor that broadcasts to (B, M, N). A running mean of earlier distances keeps distances
            of different batches comparable; the published one is the batch's own :func:`largest_cost`.
    """
    _check_widths("numbers", teacher, student)
    return _L2Distance.apply(*_same_type(teacher, student)) / scale


def state_cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """Cost 1 − cosine between hidden states, 0 to 2; a zero vector costs 1 with any other. Arguments as in
    :func:`state_distance`."""
    _check_widths("numbers", teacher, student)
    a, b = (x / _never_zero(x.norm(dim=-1, keepdim=True)) for x in _same_type(teacher, student))
    with torch.autocast(a.device.type, enabled=False):
        return 1 - a @ b.mT


def largest_cost(cost: Tensor, teacher_mask: Tensor, student_mask: Tensor, floor: float = 1e-7) -> Tensor:
    """Largest cost of each sequence (B, 1, 1) among tokens that are not padding, plus a floor.

    It passes a gradient, as in the program of MCW-KD: a cost divided by it does not grow if all costs do.
    """
    cells = teacher_mask[:, :, None] & student_mask[:, None, :]
    return cost.masked_fill(~cells, 0.0).amax(dim=(1, 2), keepdim=True) + floor


def simplex_projection(point: Tensor, floor: float = 0.0) -> Tensor:
    """Nearest vector (…, K) that sums to 1 with no entry below ``floor`` (Held, Wolfe and Crowder 1974).

    Args:
        point: (…, K).
        floor: at most 1/K.
    """
    point = at_least_float32(point)
    room = 1 - floor * point.shape[-1]
    if floor < 0 or room < 0:
        raise ValueError(f"floor must be from 0 to 1/{point.shape[-1]}, got {floor}")
    above = point - floor
    ordered = above.sort(dim=-1, descending=True).values
    # Amount subtracted from each of the j largest if only these stayed above the floor.
    excess = (ordered.cumsum(dim=-1) - room) / torch.arange(1, point.shape[-1] + 1, device=point.device)
    stay = (ordered > excess).sum(dim=-1, keepdim=True).clamp_min(1)
    return floor + (above - excess.gather(-1, stay - 1)).clamp_min(0.0)


def cost_weights(mean_costs: Tensor, sigma: float = 2.0, floor: float = 0.01) -> Tensor:
    """Weights α (K,) that minimise ⟨c, α⟩ + σ‖α − 1/K‖² with Σα = 1 and α ≥ floor, in closed form.

    Weight goes to the *smallest* cost, so costs must be in comparable units.

    Args:
        mean_costs: c (K,), the mean of each cost over recent steps.
        sigma: larger values keep the weights closer to equal.
        floor: least weight.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    mean_costs = at_least_float32(mean_costs)
    return simplex_projection(1 / mean_costs.shape[-1] - mean_costs / (2 * sigma), floor)


def _same_type(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(kind), b.to(kind)


def _never_zero(norm: Tensor) -> Tensor:
    """Replace zero by infinity: a vector divided by it is zero, and so is its gradient."""
    return norm.masked_fill(norm == 0, torch.inf)


def _check_widths(what: str, teacher: Tensor, student: Tensor) -> None:
    if teacher.shape[-1] != student.shape[-1]:
        raise ValueError(
            f"teacher and student vectors must have as many {what}, got {teacher.shape[-1]} and {student.shape[-1]}"
        )
