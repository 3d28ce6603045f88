"""Every cost against its formula, pair by pair in float64, its gradient, and what must not change it.

Read beside HoangTran223/MCW-KD 70ceb2d ``code/criterions/MCW_KD.py``: distance of ranks line 149, plain divergence 151
and 152, salience 156 to 158, windows 222 to 228, distance and its scale 232 and 233, cosine 235 to 238, weights 293 to
298. The divergence of truncated ranks (``kl``) and costs of spans are ours. ``test_published.py`` compares their sums.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raycloud.distill.transport_costs import (
    cost_weights,
    information_marginal,
    largest_cost,
    rank_distance,
    rank_kl,
    rank_kl_published,
    salience_cost,
    simplex_projection,
    span_cost,
    state_cosine,
    state_distance,
    window_mean,
)

B, M, N, K = 2, 7, 5, 6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ranked(*shape: int, seed: int = 0, k: int = K) -> Tensor:
    """Make the k largest of 20 probabilities, in descending order."""
    return (2 * normal(*shape, 20, seed=seed)).softmax(-1).topk(k).values


def head(width: int, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, 1, dtype=dtype)


def pairs(one: Callable[[list[float], list[float]], float], teacher: Tensor, student: Tensor) -> Tensor:
    return torch.tensor(
        [[[one(t, s) for s in ss] for t in ts] for ts, ss in zip(teacher.tolist(), student.tolist(), strict=True)],
        dtype=torch.float64,
    )


def l2(t: list[float], s: list[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(t, s, strict=True)))


def kl(t: list[float], s: list[float]) -> float:
    total = 0.0
    for a, b in zip(t, s, strict=True):
        p, q = a + 1e-7, b + 1e-7
        total += p * math.log(p / q) - p + q
    return total


def cosine(t: list[float], s: list[float]) -> float:
    return 1 - sum(a * b for a, b in zip(t, s, strict=True)) / (l2(t, [0.0] * len(t)) * l2(s, [0.0] * len(s)))


def salience(t: list[float], s: list[float]) -> float:
    w, b = head(K).weight[0].tolist(), head(K).bias.item()
    a, c = (1 / (1 + math.exp(-b - sum(x * y for x, y in zip(w, row, strict=True)))) for row in (t, s))
    return abs(a - c)


Cost = Callable[[Tensor, Tensor], Tensor]
FORMULAS: dict[str, tuple[Cost, Callable[[list[float], list[float]], float]]] = {
    "rank_distance": (rank_distance, l2),
    "rank_kl": (rank_kl, kl),
    "salience_cost": (lambda t, s: salience_cost(t, s, head(K, torch.promote_types(t.dtype, torch.float32))), salience),
    "state_distance": (lambda t, s: state_distance(t, s, 2.5), lambda t, s: l2(t, s) / 2.5),
    "state_cosine": (state_cosine, cosine),
}


def rows(name: str) -> tuple[Tensor, Tensor]:
    make = ranked if name.startswith("rank") else lambda *shape, seed: normal(*shape, K, seed=seed)
    return make(B, M, seed=1), make(B, N, seed=2)


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_equal_the_formula(name: str) -> None:
    (cost, formula), (teacher, student) = FORMULAS[name], rows(name)
    values = cost(teacher, student)
    assert values.shape == (B, M, N)
    assert (values - pairs(formula, teacher, student)).abs().max() <= 1e-12
    assert torch.autograd.gradcheck(cost, (teacher.requires_grad_(), student.requires_grad_()))


@pytest.mark.parametrize("name", FORMULAS)
def test_half_precision_and_autocast_are_computed_in_float32(name: str) -> None:
    (cost, _), (teacher, student) = FORMULAS[name], rows(name)
    halves = [x.bfloat16().requires_grad_() for x in (teacher, student)]
    wholes = [x.bfloat16().float().requires_grad_() for x in (teacher, student)]
    expected = cost(*wholes)
    gradients = torch.autograd.grad(expected.sum(), wholes)
    for given in (halves, wholes):
        with torch.autocast("cpu", torch.bfloat16):
            values = cost(*given)
        assert values.dtype == torch.float32 and torch.equal(values, expected)
        for got, want in zip(torch.autograd.grad(values.sum(), given), gradients, strict=True):
            assert torch.equal(got, want.to(got.dtype))


@pytest.mark.parametrize("name", FORMULAS)
def test_neither_padding_nor_the_rest_of_the_batch_changes_a_pair(name: str) -> None:
    (cost, _), (teacher, student) = FORMULAS[name], rows(name)
    alone = cost(teacher[1:, :4], student[1:, :3])
    assert (cost(teacher, student)[1, :4, :3] - alone[0]).abs().max() <= 1e-14
    # A whole row of zeros is what padding looks like; it must not spoil the gradient of the others.
    teacher[1, 4:], student[1, 3:] = 0, 0
    leaves = [teacher.requires_grad_(), student.requires_grad_()]
    values = cost(*leaves)
    gradients = torch.autograd.grad(values[1, :4, :3].sum(), leaves)
    assert torch.isfinite(values).all() and all(torch.isfinite(g).all() for g in gradients)
    assert (gradients[0][1, 4:] == 0).all() and (gradients[1][1, 3:] == 0).all()


@pytest.mark.parametrize("name", FORMULAS)
def test_identical_tokens_cost_nothing_and_pull_nowhere(name: str) -> None:
    cost, (teacher, _) = FORMULAS[name][0], rows(name)
    leaves = [teacher.float().clone().requires_grad_() for _ in range(2)]
    own = cost(*leaves).diagonal(dim1=1, dim2=2)
    assert own.abs().max() <= 1e-6
    for gradient in torch.autograd.grad(own.sum(), leaves):
        assert gradient.abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["rank_distance", "rank_kl"])
def test_finite_for_logits_of_any_size(name: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0, 0], [-1e4] * 4, [0, 0, 0, 1e4], [1.0, 2, 3, 4]])[None]
    for dtype in (torch.float32, torch.bfloat16):
        z = logits.to(dtype).requires_grad_()
        cost = FORMULAS[name][0](logits.softmax(-1).topk(3).values, z.softmax(-1).topk(3).values)
        (gradient,) = torch.autograd.grad(cost.sum(), z)
        assert torch.isfinite(cost).all() and torch.isfinite(gradient).all()
        assert cost[0, 0, 1] > 0.5 and cost[0, 0, 2].abs() <= 1e-6


def test_finite_for_states_of_any_size() -> None:
    states = torch.tensor([[1e4, -1e4], [1e-12, 0.0], [0.0, 0.0], [-1e4, 1e4]])[None].requires_grad_()
    for cost in (
        lambda t, s: state_distance(t, s, 1.0),
        state_cosine,
        lambda t, s: salience_cost(t, s, head(2).float()),
    ):
        values = cost(states.detach(), states)
        (gradient,) = torch.autograd.grad(values.sum(), states)
        assert torch.isfinite(values).all() and torch.isfinite(gradient).all()
    assert state_cosine(states, states)[0, 0].tolist() == pytest.approx([0, 1 - math.sqrt(0.5), 1, 2], abs=1e-6)


def test_a_small_distance_between_large_states_is_not_lost() -> None:
    a = 100 + normal(1, 40, 64, dtype=torch.float32)
    b = a + 1e-2 * normal(1, 40, 64, seed=1, dtype=torch.float32)
    exact = torch.cdist(a.double(), b.double())
    own = state_distance(a, b, 1.0).diagonal(dim1=1, dim2=2)
    assert ((own - exact.diagonal(dim1=1, dim2=2)).abs() / own).max() <= 1e-5


def test_truncated_kl_is_never_negative_and_the_teacher_is_its_only_minimum() -> None:
    teacher, student = ranked(B, M, seed=3, k=4), ranked(B, N, seed=4, k=4)
    assert (rank_kl(teacher, student) >= 0).all()
    plain = (teacher[:, :, None] * (teacher[:, :, None] / student[:, None]).log()).sum(-1)
    assert (plain < 0).any()
    for factor in (0.9, 1.1):
        assert (rank_kl(teacher, factor * teacher).diagonal(dim1=1, dim2=2) > 1e-4).all()
    whole = (normal(1, 3, 5).softmax(-1), normal(1, 4, 5, seed=1).softmax(-1))
    entropies = torch.stack(
        [nn.functional.kl_div(q.log().expand(3, 5), whole[0][0], reduction="none").sum(-1) for q in whole[1][0]], dim=1
    )
    assert (rank_kl(*whole)[0] - entropies).abs().max() <= 1e-5


def test_the_salience_head_is_trained_by_the_cost() -> None:
    scorer, (teacher, student) = head(K), rows("salience_cost")
    salience_cost(teacher, student, scorer).sum().backward()
    assert scorer.weight.grad is not None and scorer.weight.grad.abs().max() > 0


def test_information_weighs_tokens() -> None:
    log_p = torch.tensor([[-1.0, -3.0, 0.0, torch.nan], [0.0, 0.0, torch.nan, torch.nan], [torch.nan] * 4])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
    assert information_marginal(log_p, mask).tolist() == [[0.25, 0.75, 0, 0], [0.5, 0.5, 0, 0], [0] * 4]
    half = information_marginal(log_p.bfloat16(), mask)
    assert half.dtype == torch.float32 and half.sum(1).tolist() == [1, 1, 0]


def test_spans_cost_what_they_do_not_share() -> None:
    spans = [(0, 3), (3, 4), (4, 9), (2, 6), (9, 9), (4, 4)]

    def iou(a: tuple[int, int], b: tuple[int, int]) -> float:
        x, y = set(range(*a)), set(range(*b))
        return len(x & y) / len(x | y) if x | y else float(a == b)

    teacher, student = torch.tensor([spans, spans[::-1]]), torch.tensor([spans[1:], spans[:-1]])
    expected = [
        [[1 - iou(tuple(t), tuple(s)) for s in ss] for t in ts]
        for ts, ss in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    cost = span_cost(teacher.int(), student)
    assert cost.dtype == torch.float32 and cost.flatten().tolist() == pytest.approx(
        torch.tensor(expected).flatten().tolist()
    )
    far = torch.tensor([[[2**30, 2**30 + 3]]])
    assert span_cost(far, far + torch.tensor([1, 0])).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("radius", [0, 1, 4, 20])
def test_windows_average_real_tokens_only(radius: int) -> None:
    states = normal(3, 12, 4)
    mask = torch.arange(12) < torch.tensor([12, 5, 0])[:, None]
    mask[0, 3] = False
    states[~mask] = torch.nan
    means = window_mean(states, mask, radius)
    for b, i in itertools.product(range(3), range(12)):
        near = [states[b, j] for j in range(max(0, i - radius), min(12, i + radius + 1)) if mask[b, j]]
        expected = torch.stack(near).mean(0) if mask[b, i] else torch.zeros(4, dtype=torch.float64)
        assert (means[b, i] - expected).abs().max() <= 1e-14
    assert (window_mean(states[1:2, :5], mask[1:2, :5], radius)[0] - means[1, :5]).abs().max() <= 1e-14
    leaf = normal(3, 12, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: window_mean(x, mask, radius), leaf, fast_mode=True)
    with torch.autograd.set_detect_anomaly(True):
        window_mean(leaf, mask, radius).sum().backward()
    half = window_mean(states.bfloat16(), mask, radius)
    assert half.dtype == torch.float32 and torch.isfinite(half).all()


def test_the_published_scale_is_the_largest_real_distance_and_learns() -> None:
    cost = normal(3, 4, 5).abs().requires_grad_()
    teacher = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    student = torch.arange(5) < torch.tensor([3, 5, 0])[:, None]
    found = largest_cost(cost, teacher, student)
    assert found.flatten().tolist() == pytest.approx(
        [float(cost[0, :, :3].detach().max()) + 1e-7, float(cost[1, :2].detach().max()) + 1e-7, 1e-7], rel=1e-12
    )
    (gradient,) = torch.autograd.grad(found.sum(), cost)
    assert gradient[:2].sum() == 2 and gradient[0].flatten().argmax() == cost[0, :, :3].argmax() // 3 * 5 + int(
        cost[0, :, :3].argmax() % 3
    )


def test_the_published_divergence_of_ranks_is_a_plain_sum() -> None:
    p, q = (normal(2, n, 7).softmax(-1).sort(-1, descending=True).values for n in (3, 4))
    wanted = [[[float((x * (x / (y + 1e-7)).log()).sum()) for y in q[b]] for x in p[b]] for b in range(2)]
    torch.testing.assert_close(rank_kl_published(p, q), torch.tensor(wanted).double())


def nearest_on_simplex(point: list[float], floor: float) -> list[float]:
    """Try every set of entries that are at the floor."""
    best: tuple[float, list[float]] | None = None
    for resting in itertools.product([False, True], repeat=len(point)):
        free = [i for i, rests in enumerate(resting) if not rests]
        if not free:
            continue
        shift = (1 - floor * sum(resting) - sum(point[i] for i in free)) / len(free)
        candidate = [floor if rests else x + shift for x, rests in zip(point, resting, strict=True)]
        if min(candidate) < floor - 1e-12:
            continue
        distance = sum((a - b) ** 2 for a, b in zip(candidate, point, strict=True))
        if best is None or distance < best[0]:
            best = (distance, candidate)
    assert best is not None
    return best[1]


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.15])
def test_the_projection_is_the_nearest_point_of_the_simplex(floor: float) -> None:
    points = torch.cat([normal(50, 5), 0.1 * normal(50, 5, seed=1), torch.tensor([[1e4, -1e4, 0, 0, 0]])])
    projected = simplex_projection(points, floor)
    for point, got in zip(points.tolist(), projected.tolist(), strict=True):
        assert got == pytest.approx(nearest_on_simplex(point, floor), abs=1e-9)
    assert simplex_projection(points, 0.2)[:, 0].tolist() == pytest.approx([0.2] * len(points))
    assert simplex_projection(torch.tensor([[0.2, 0.3, 0.5]])).tolist() == [pytest.approx([0.2, 0.3, 0.5])]
    with pytest.raises(ValueError, match=r"floor must be from 0 to 1/5, got 0\.3"):
        simplex_projection(points, 0.3)


def test_weights_go_to_the_smallest_cost() -> None:
    weights = cost_weights(torch.tensor([0.05, 3.0, 0.1]))
    assert weights.tolist() == pytest.approx([0.50125, 0.01, 0.48875], abs=1e-6)
    assert cost_weights(torch.ones(4)).tolist() == [0.25] * 4
    with pytest.raises(ValueError, match="sigma must be above 0, got 0"):
        cost_weights(torch.ones(4), sigma=0)


def test_weights_equal_a_general_solver() -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is no dependency; all supports are tried out above")
    for seed in range(20):
        costs, sigma = (3 * normal(4, seed=seed).abs()).numpy(), 0.5 + 0.2 * seed
        solved = optimize.minimize(
            lambda a, costs=costs, sigma=sigma: float(costs @ a + sigma * ((a - 0.25) ** 2).sum()),
            [0.25] * 4,
            method="SLSQP",
            bounds=[(0.01, 1)] * 4,
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert solved.success
        assert cost_weights(torch.tensor(costs), sigma).tolist() == pytest.approx(solved.x.tolist(), abs=1e-5)


def test_rows_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="must have as many ranks, got 6 and 4"):
        rank_kl(ranked(1, 2), ranked(1, 2, k=4))
    with pytest.raises(ValueError, match="must have as many numbers, got 3 and 4"):
        state_cosine(normal(1, 2, 3), normal(1, 2, 4))
    with pytest.raises(ValueError, match="radius must be 0 or more, got -1"):
        window_mean(normal(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), -1)
