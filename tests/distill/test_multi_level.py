"""Terms of MultiLevelOT against loops over tokens and vocabulary entries; gradients and invariances."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from raycloud.distill.multi_level import (
    Levels,
    absolute_difference,
    logarithmic,
    multi_level,
    published_levels,
    sequence_ranking,
    sinkhorn_distance,
)
from raycloud.distill.optimal_transport import relative_epsilon, sinkhorn, uniform_marginal

V, W, KEEP = 23, 31, 6
STUDENT, TEACHER = [5, 3, 6], [6, 4, 2]


def logits(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(counts: list[int]) -> Tensor:
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def vectors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make ranked probabilities of both sides, with padding that must not matter."""
    t, s = (logits(3, 6, n, seed=n).softmax(-1).topk(KEEP).values for n in (W, V))
    return t, s, mask(TEACHER), mask(STUDENT)


def fields(levels: Levels) -> list[Tensor]:
    return [levels.absolute, levels.logarithmic, levels.transport]


def by_position(teacher: Tensor, student: Tensor) -> Tensor:
    """Partners (B, N) by position: the i-th teacher token for the i-th student token, −1 past the end."""
    count = student.shape[1]
    held = torch.nn.functional.pad(teacher, (0, max(0, count - teacher.shape[1])))[:, :count]
    return torch.arange(count).expand(student.shape).masked_fill(~(held & student), -1)


@pytest.mark.parametrize("k", [4, V])
def test_the_ranking_is_by_mass_over_the_text(k: int) -> None:
    top = logits(3, 6, V, seed=0).softmax(-1).topk(k)
    present = mask(STUDENT)
    ranked = sequence_ranking(top.values.masked_fill(~present[..., None], torch.nan), top.indices, present, KEEP)
    for b in range(3):
        rows = [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(top.indices[b].tolist(), top.values[b].tolist(), strict=True)
        ][: STUDENT[b]]
        total: dict[int, float] = defaultdict(float)
        for row in rows:
            for word, p in row.items():
                total[word] += p
        order = sorted(total, key=lambda word: -total[word])[:KEEP]
        for i in range(6):
            expected = [rows[i].get(word, 0.0) if i < len(rows) else 0.0 for word in order]
            assert ranked[b, i, : len(order)].tolist() == pytest.approx(expected, abs=1e-15)
            assert (ranked[b, i, len(order) :] == 0).all()


def test_the_ranking_of_the_vocabulary_is_a_permutation_with_a_gradient() -> None:
    p = logits(2, 4, 7, seed=1).softmax(-1).requires_grad_()
    ids, present = torch.arange(7).expand(2, 4, 7), torch.ones(2, 4, dtype=torch.bool)
    order = p.sum(1).argsort(dim=-1, descending=True)
    dense = p.gather(2, order[:, None].expand_as(p))
    assert torch.equal(sequence_ranking(p, ids, present, 7), dense)
    assert torch.autograd.gradcheck(lambda x: sequence_ranking(x, ids, present, 3), (p,))
    few = sequence_ranking(p[:, :1, :2].bfloat16(), ids[:, :1, :2], present[:, :1], 5)
    assert few.shape == (2, 1, 5) and few.dtype == torch.float32 and (few[..., 2:] == 0).all()


def test_the_ranking_knows_neither_padding_nor_batch() -> None:
    top, present = logits(3, 6, V, seed=0).softmax(-1).topk(5), mask(STUDENT)
    ranked = sequence_ranking(top.values, top.indices, present, KEEP)
    for b, n in enumerate(STUDENT):
        one = sequence_ranking(top.values[b : b + 1, :n], top.indices[b : b + 1, :n], present[b : b + 1, :n], KEEP)
        assert torch.equal(ranked[b, :n], one[0]) and (ranked[b, n:] == 0).all()


@pytest.mark.parametrize("aligned", [False, True])
def test_the_terms_equal_plain_loops(aligned: bool) -> None:
    t, s, teacher, student = vectors()
    partners = (
        torch.tensor([[5, 0, -1, 2, 2, -1], [-1, 3, 1, -1, -1, -1], [-1] * 6])
        if aligned
        else by_position(teacher, student)
    )
    levels = multi_level(t, s, teacher, student, partners, share=0.2, sweeps=40)
    for b in range(3):
        absolute = entropy = 0.0
        for i in range(STUDENT[b]):
            j = int(partners[b, i]) if aligned else (i if i < TEACHER[b] else -1)
            if j < 0:
                continue
            p, q = t[b, j].tolist(), s[b, i].tolist()
            absolute += sum(abs(x - y) for x, y in zip(p, q, strict=True))
            for x, y in zip([*p, 1 - sum(p)], [*q, 1 - sum(q)], strict=True):
                entropy -= x * math.log(y + 1e-7)
        assert float(levels.absolute[b]) == pytest.approx(absolute, rel=1e-12)
        assert float(levels.logarithmic[b]) == pytest.approx(entropy, rel=1e-9)
        m, n = TEACHER[b], STUDENT[b]
        cost = [
            [sum(abs(x - y) for x, y in zip(p, q, strict=True)) for q in s[b, :n].tolist()] for p in t[b, :m].tolist()
        ]
        epsilon = 0.2 * sorted(c for row in cost for c in row)[(m * n - 1) // 2]
        u, v = [0.0] * m, [1 / n] * n
        kernel = [[math.exp(-c / epsilon) for c in row] for row in cost]
        for _ in range(40):
            u = [1 / m / sum(kernel[i][j] * v[j] for j in range(n)) for i in range(m)]
            v = [1 / n / sum(kernel[i][j] * u[i] for i in range(m)) for j in range(n)]
        carried = sum(u[i] * kernel[i][j] * v[j] * cost[i][j] for i in range(m) for j in range(n))
        assert float(levels.transport[b]) == pytest.approx(n * carried, rel=1e-9)


def test_gradients() -> None:
    t, s, teacher, student = vectors()
    s.requires_grad_()
    partners = by_position(teacher, student)
    for term in (absolute_difference, logarithmic):
        assert torch.autograd.gradcheck(lambda x, term=term: term(t, x, partners), (s,))
    (gradient,) = torch.autograd.grad(sinkhorn_distance(t, s, teacher, student).sum(), s)
    # The plan held fast: its own change is worth nothing at the optimum.
    cost = (t[:, :, None] - s[:, None]).abs().sum(-1)
    mu, nu = (uniform_marginal(x, torch.float64) for x in (teacher, student))
    plan = sinkhorn(cost, mu, nu, relative_epsilon(cost, mu, nu))
    held = (plan.mass * cost).sum((1, 2)) * student.sum(1)
    assert (gradient - torch.autograd.grad(held.sum(), s)[0]).abs().max() <= 1e-12
    assert (gradient[~student] == 0).all() and not (gradient[student] == 0).all()


def test_neither_padding_nor_the_rest_of_the_batch_changes_a_sequence() -> None:
    t, s, teacher, student = vectors()
    together = multi_level(t, s, teacher, student, by_position(teacher, student))
    for b, (m, n) in enumerate(zip(TEACHER, STUDENT, strict=True)):
        at = slice(b, b + 1)
        masks = teacher[at, :m], student[at, :n]
        alone = multi_level(t[at, :m], s[at, :n], *masks, by_position(*masks))
        for whole, one in zip(fields(together), fields(alone), strict=True):
            assert float(whole[b]) == pytest.approx(float(one[0]), rel=1e-10)


def test_an_identical_teacher_is_the_minimum() -> None:
    t, _, teacher, _ = vectors()
    same = t.clone().requires_grad_()
    levels = multi_level(t, same, teacher, teacher, by_position(teacher, teacher), share=0.01, sweeps=100)
    assert (levels.absolute == 0).all() and levels.transport.abs().max() <= 1e-2
    (gradient,) = torch.autograd.grad(levels.absolute.sum(), same)
    assert (gradient == 0).all()
    # Truncated vectors: more mass on the K than the teacher has is dearer, not cheaper.
    for factor in (0.95, 1.02):
        moved = multi_level(t, factor * t, teacher, teacher, by_position(teacher, teacher))
        assert (moved.logarithmic > levels.logarithmic).all() and (moved.absolute > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_the_extremes(dtype: torch.dtype) -> None:
    z = torch.full((3, 4, V), -1e4)
    z[0, :, 3], z[1, 0, 5], z[1, 1:, 7] = 1e4, 1e4, 1e4
    teacher, student = mask([4, 4, 0]), mask([4, 0, 4])
    for u in (z, z.flip(0), torch.zeros_like(z)):
        leaf = z.to(dtype).requires_grad_()
        tops = [x.softmax(-1).topk(KEEP) for x in (u.to(dtype), leaf)]
        t, s = (
            sequence_ranking(top.values, top.indices, present, KEEP)
            for top, present in zip(tops, (teacher, student), strict=True)
        )
        levels = multi_level(t, s, teacher, student, by_position(teacher, student))
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in fields(levels)), leaf)
        assert torch.isfinite(gradient).all()
        for term in fields(levels):
            assert term.dtype == torch.float32 and torch.isfinite(term).all() and (term[1:] == 0).all()


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    t, s, teacher, student = vectors()
    t, s = t.bfloat16(), s.bfloat16()
    expected = multi_level(t.float(), s.float(), teacher, student, by_position(teacher, student))
    with torch.autocast("cpu", torch.bfloat16):
        for got, want in zip(
            fields(multi_level(t, s, teacher, student, by_position(teacher, student))), fields(expected), strict=True
        ):
            assert got.dtype == torch.float32 and torch.equal(got, want)


def softmax(row: list[float]) -> list[float]:
    exponents = [math.exp(x - max(row)) for x in row]
    return [x / sum(exponents) for x in exponents]


def published(z: Tensor, starts: list[int], counts: list[int], length: int, official: bool) -> list[list[list[float]]]:
    """Compute one side with loops: (B, length, KEEP)."""
    batch = []
    for b, rows in enumerate(z.tolist()):
        scaled = []
        for row in rows:
            mean = sum(row) / len(row)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1)) + 1e-4
            scaled.append(softmax([x / deviation / (1 if official else 2) for x in row]))
        turned = scaled[starts[b] :] + scaled[: starts[b]]
        if official:
            turned = turned[: counts[b]]
        batch.append(turned + [[0.0] * z.shape[-1]] * (length - len(turned)))
    total = [sum(row[v] for rows in batch for row in rows) for v in range(z.shape[-1])]
    order = sorted(range(z.shape[-1]), key=lambda v: -total[v])[:KEEP]
    return [[[row[v] for v in order] for row in rows] for rows in batch]


@pytest.mark.parametrize("compat", ["official", "mcwkd"])
def test_the_published_terms_equal_plain_loops(compat: str) -> None:
    """Formula as in both programs, see ``formulas.multi_level_ot_published``; their numbers are in ``published/``."""
    official = compat == "official"
    z, u = logits(3, 9, V, seed=5), logits(3, 8, W, seed=6)
    starts = [2, 4, 3], [1, 3, 6]
    student, teacher = (
        (torch.arange(x.shape[1]) >= torch.tensor(s)[:, None]) & (torch.arange(x.shape[1]) < torch.tensor(e)[:, None])
        for x, s, e in (
            (z, starts[0], [a + c for a, c in zip(starts[0], STUDENT, strict=True)]),
            (u, starts[1], [a + c for a, c in zip(starts[1], [6, 4, 2], strict=True)]),
        )
    )
    levels = published_levels(u, z, teacher, student, compat, KEEP)  # type: ignore[arg-type]
    length = 6 if official else 9
    s, t = published(z, starts[0], STUDENT, length, official), published(u, starts[1], TEACHER, length, official)
    count = sum(STUDENT) if official else sum(min(both) for both in zip(STUDENT, TEACHER, strict=True))
    for b in range(3):
        gaps = [sum(abs(x - y) for x, y in zip(p, q, strict=True)) for p, q in zip(t[b], s[b], strict=True)]
        shorter = min(STUDENT[b], TEACHER[b])
        absolute = sum(gaps[:shorter]) / shorter if official else sum(gaps) / length
        entropy = 0.0
        for p, q in zip(t[b], s[b], strict=True):
            aim, own = (q, p) if official else (p, q)
            entropy -= sum(x * math.log(y) for x, y in zip(softmax(aim), softmax(own), strict=True)) / length
        soft_s, soft_t = ([softmax([x / 2 for x in row]) for row in rows[b]] for rows in (s, t))
        first, second = (soft_t, soft_s) if official else (soft_s, soft_t)
        cost = [[sum(abs(x - y) for x, y in zip(p, q, strict=True)) for q in second] for p in first]
        plan = [[math.exp(-c / 0.1) for c in row] for row in cost]
        for _ in range(10):
            plan = [[x / sum(row) for x in row] for row in plan]
            sums = [sum(column) for column in zip(*plan, strict=True)]
            plan = [[x / c for x, c in zip(row, sums, strict=True)] for row in plan]
        carried = sum(x * c for xs, cs in zip(plan, cost, strict=True) for x, c in zip(xs, cs, strict=True))
        assert float(levels.absolute[b]) == pytest.approx(absolute * count / 3, rel=1e-10)
        assert float(levels.logarithmic[b]) == pytest.approx(entropy * count / 3, rel=1e-10)
        assert float(levels.transport[b]) == pytest.approx(0.001 * carried * count, rel=1e-10)


@pytest.mark.parametrize("compat", ["official", "mcwkd"])
def test_the_published_terms_are_those_of_the_batch_and_leave_logits_alone(compat: str) -> None:
    z, u = logits(3, 6, V, seed=5).requires_grad_(), logits(3, 6, W, seed=6)
    kept = z.detach().clone()
    levels = published_levels(u, z, mask(TEACHER), mask(STUDENT), compat, KEEP)  # type: ignore[arg-type]
    sum(x.sum() for x in fields(levels)).backward()
    assert z.grad is not None and torch.isfinite(z.grad).all() and torch.equal(z.detach(), kept)
    alone = published_levels(u[:1], z[:1], mask(TEACHER)[:1], mask(STUDENT)[:1], compat, KEEP)  # type: ignore[arg-type]
    assert abs(float((levels.absolute[0] / 14 - alone.absolute[0] / 5 / 3).detach())) > 1e-6
    half = published_levels(u.bfloat16(), z.detach().bfloat16(), mask(TEACHER), mask(STUDENT), compat)  # type: ignore[arg-type]
    assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in fields(half))


def test_wrong_arguments_are_named() -> None:
    t, s, teacher, student = vectors()
    with pytest.raises(ValueError, match="must keep as many ranks, got 6 and 4"):
        multi_level(t, s[..., :4], teacher, student, by_position(teacher, student))
    with pytest.raises(ValueError, match="compat must be 'official' or 'mcwkd', got 'ours'"):
        published_levels(t, s, teacher, student, "ours")  # type: ignore[arg-type]
