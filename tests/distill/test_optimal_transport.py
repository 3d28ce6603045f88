"""Optimal transport against a float64 loop: its two limits, its gradient, and invariances."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from raycloud.distill.optimal_transport import (
    Potential,
    c_transform,
    mean_cost,
    relative_epsilon,
    semi_dual,
    sinkhorn,
    transport_loss,
    uniform_marginal,
)

ROWS, COLUMNS = [7, 4, 6], [5, 6, 3]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mask(counts: list[int], width: int | None = None) -> Tensor:
    return torch.arange(width or max(counts)) < torch.tensor(counts)[:, None]


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Padded batch with marginals that are not uniform, and NaN in the padding."""
    rows, columns = mask(ROWS), mask(COLUMNS)
    mu, nu = random(*rows.shape, seed=1) * rows, random(*columns.shape, seed=2) * columns
    cost = random(*rows.shape, columns.shape[1]).masked_fill(~(rows[:, :, None] & columns[:, None]), torch.nan)
    return cost.to(dtype), (mu / mu.sum(1, True)).to(dtype), (nu / nu.sum(1, True)).to(dtype)


def alone(index: int, cost: Tensor, mu: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m, n = ROWS[index], COLUMNS[index]
    return cost[index : index + 1, :m, :n], mu[index : index + 1, :m], nu[index : index + 1, :n]


def plain_plan(cost: list[list[float]], mu: list[float], nu: list[float], epsilon: float, sweeps: int) -> Tensor:
    u, v = [0.0] * len(mu), list(nu)
    kernel = [[math.exp(-c / epsilon) for c in row] for row in cost]
    for _ in range(sweeps):
        u = [mu[i] / sum(kernel[i][j] * v[j] for j in range(len(nu))) for i in range(len(mu))]
        v = [nu[j] / sum(kernel[i][j] * u[i] for i in range(len(mu))) for j in range(len(nu))]
    return torch.tensor(
        [[u[i] * kernel[i][j] * v[j] for j in range(len(nu))] for i in range(len(mu))], dtype=torch.float64
    )


def optimum(cost: Tensor, mu: Tensor, nu: Tensor, epsilon: float = 0.2) -> Tensor:
    return transport_loss(cost, sinkhorn(cost, mu, nu, epsilon, 150), entropic=True)


@pytest.mark.parametrize("sweeps", [1, 3, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_plan_equals_a_plain_loop(sweeps: int, dtype: torch.dtype, tolerance: float) -> None:
    cost, mu, nu = problem()
    epsilon = torch.tensor([0.2, 0.3, 0.15], dtype=dtype)
    plan = sinkhorn(cost.to(dtype), mu.to(dtype), nu.to(dtype), epsilon, sweeps)
    values = transport_loss(cost.to(dtype), plan)
    for index, eps in enumerate(epsilon.tolist()):
        one, rows, columns = (x[0].tolist() for x in alone(index, cost, mu, nu))
        expected = plain_plan(one, rows, columns, eps, sweeps)
        got = plan.mass[index, : ROWS[index], : COLUMNS[index]]
        assert (got - expected).abs().max() <= tolerance
        value = sum(p * c for ps, cs in zip(expected.tolist(), one, strict=True) for p, c in zip(ps, cs, strict=True))
        assert float(values[index]) == pytest.approx(value, rel=10 * tolerance)
        missing = sum(abs(sum(ps) - m) for ps, m in zip(expected.tolist(), rows, strict=True))
        assert float(plan.residual[index]) == pytest.approx(missing, abs=10 * tolerance)
        assert int((plan.mass[index] > 0).sum()) == ROWS[index] * COLUMNS[index]


@pytest.mark.parametrize("share", [0.1, 0.05])
def test_mass_leaves_and_arrives_as_the_marginals_say(share: float) -> None:
    rows, columns = mask([90, 40, 3]), mask([80, 60, 9])
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 90, 16, generator=generator), torch.randn(3, 80, 16, generator=generator)
    cost, mu, nu = torch.cdist(x, y), uniform_marginal(rows), uniform_marginal(columns)
    plan = sinkhorn(cost, mu, nu, relative_epsilon(cost, mu, nu, share), 50)
    assert plan.mass.dtype == torch.float32
    assert (plan.mass.sum(2) - mu).abs().sum(1).max() <= 1e-4
    assert (plan.mass.sum(1) - nu).abs().sum(1).max() <= 1e-4
    assert (plan.mass[~(rows[:, :, None] & columns[:, None])] == 0).all()
    assert (transport_loss(cost, plan) < 0.95 * mean_cost(cost, mu, nu)).all()


def test_the_loss_goes_to_the_mean_cost_as_epsilon_grows() -> None:
    cost, mu, nu = problem()
    mean = mean_cost(cost, mu, nu)
    for index in range(3):
        one, rows, columns = (x[0] for x in alone(index, cost, mu, nu))
        assert float(mean[index]) == pytest.approx(float(rows @ one @ columns), rel=1e-12)
    gaps = [
        (transport_loss(cost, sinkhorn(cost, mu, nu, epsilon, 50)) - mean).abs().max() for epsilon in (0.1, 1, 10, 1e6)
    ]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.05 and gaps[-1] <= 1e-6


def test_the_plan_goes_to_the_best_assignment_as_epsilon_vanishes() -> None:
    cost = random(4, 6, 6, seed=3)
    weight = uniform_marginal(torch.ones(4, 6), torch.float64)
    plan = sinkhorn(cost, weight, weight, 1e-3, 2000, anneal=1000)
    for index, one in enumerate(cost):
        best = min(itertools.permutations(range(6)), key=lambda p: float(one[range(6), p].sum()))
        assert plan.mass[index].argmax(dim=1).tolist() == list(best)
        assert float(transport_loss(cost, plan)[index]) == pytest.approx(float(one[range(6), best].mean()), abs=1e-6)


def test_the_plan_goes_to_scipys_assignment_as_epsilon_vanishes() -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is no dependency; six tokens are tried out above")
    cost = random(2, 40, 40, seed=4)
    weight = uniform_marginal(torch.ones(2, 40), torch.float64)
    loss = transport_loss(cost, sinkhorn(cost, weight, weight, 1e-3, 3000, anneal=100))
    for value, one in zip(loss, cost, strict=True):
        best = optimize.linear_sum_assignment(one.numpy())
        # What the entropy can cost at most: ε log N.
        assert -1e-5 <= float(value) - float(one[best].mean()) <= 1e-3 * math.log(40)


def test_neither_padding_nor_the_rest_of_the_batch_changes_a_sequence() -> None:
    cost, mu, nu = problem()
    together = sinkhorn(cost, mu, nu, relative_epsilon(cost, mu, nu), 30)
    wider = [torch.nn.functional.pad(x, pad, value=fill) for x, pad, fill in (
        (cost, (0, 4, 0, 2), torch.inf), (mu, (0, 2), 0.0), (nu, (0, 4), 0.0))]  # fmt: skip
    padded = sinkhorn(*wider, relative_epsilon(*wider), 30)
    assert (padded.mass[:, :7, :6] - together.mass).abs().max() <= 1e-14
    assert (transport_loss(wider[0], padded) - transport_loss(cost, together)).abs().max() <= 1e-14
    for index in range(3):
        single = alone(index, cost, mu, nu)
        plan = sinkhorn(*single, relative_epsilon(*single), 30)
        assert (together.mass[index, : ROWS[index], : COLUMNS[index]] - plan.mass[0]).abs().max() <= 1e-14
        for entropic in (False, True):
            batched = transport_loss(cost, together, entropic=entropic)[index]
            assert float(batched) == pytest.approx(float(transport_loss(single[0], plan, entropic=entropic)), rel=1e-12)


def test_the_gradient_is_the_plan_and_that_of_the_optimum() -> None:
    cost, mu, nu = alone(0, *problem())
    cost.requires_grad_()
    plan = sinkhorn(cost, mu, nu, 0.2, 500)
    assert not plan.mass.requires_grad and not plan.f.requires_grad
    for entropic in (False, True):
        (gradient,) = torch.autograd.grad(transport_loss(cost, plan, entropic=entropic).sum(), cost)
        assert torch.equal(gradient, plan.mass)
    assert torch.autograd.gradcheck(lambda c: optimum(c, mu, nu), (cost,))
    # The value itself, from the definition.
    entropy = 0.2 * (plan.mass * (plan.mass / (mu[:, :, None] * nu[:, None])).log()).sum()
    expected = float(((plan.mass * cost).sum() + entropy).detach())
    assert float(optimum(cost.detach(), mu, nu)) == pytest.approx(expected, rel=1e-12)


def test_potentials_are_the_gradient_in_the_marginals() -> None:
    cost, mu, nu = alone(0, *problem())
    plan = sinkhorn(cost, mu, nu, 0.2, 500)
    step = torch.zeros_like(mu)
    step[0, 1], step[0, 4] = 1e-5, -1e-5
    slope = (optimum(cost, mu + step, nu) - optimum(cost, mu - step, nu)) / 2e-5
    assert float(slope) == pytest.approx(float(plan.f[0, 1] - plan.f[0, 4]), rel=1e-5)


def test_the_gradient_reaches_weights_of_costs_and_skips_padding() -> None:
    cost, mu, nu = problem()
    cost = cost.nan_to_num(9.0)
    second = cost.square()
    beta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    leaf = cost.clone().requires_grad_()
    alpha = beta.softmax(0)
    total = alpha[0] * leaf + alpha[1] * second
    plan = sinkhorn(total, mu, nu, 0.2, 100)
    transport_loss(total, plan).sum().backward()
    assert beta.grad is not None and leaf.grad is not None
    parts = torch.stack([(plan.mass * c).sum() for c in (cost, second)])
    expected = alpha * (parts - (alpha * parts).sum())
    assert (beta.grad - expected.detach()).abs().max() <= 1e-12
    assert (leaf.grad - alpha[0].detach() * plan.mass).abs().max() <= 1e-14


def test_annealing_ends_at_the_same_plan_and_gets_there_sooner_where_epsilon_is_small() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = ((s * torch.randn(1, n, 32, generator=generator)).softmax(-1).sort(-1)[0] for s, n in ((3, 60), (2, 50)))
    cost = torch.cdist(p, q)
    mu, nu = uniform_marginal(torch.ones(1, 60)), uniform_marginal(torch.ones(1, 50))
    epsilon = relative_epsilon(cost, mu, nu, 0.05)
    plain, annealed = (sinkhorn(cost, mu, nu, epsilon, 20, anneal=a) for a in (1.0, 10.0))
    assert annealed.residual < 0.5 * plain.residual
    plain, annealed = (sinkhorn(cost.double(), mu, nu, epsilon, 600, anneal=a) for a in (1.0, 10.0))
    assert (plain.mass - annealed.mass).abs().max() <= 1e-6 * plain.mass.max()
    # Even a single sweep is one at ε itself.
    plain, annealed = (sinkhorn(cost, mu, nu, epsilon, 1, anneal=a) for a in (1.0, 10.0))
    assert torch.equal(plain.mass, annealed.mass)


def test_epsilon_is_a_share_of_the_median_of_real_pairs() -> None:
    cost, mu, nu = problem()
    epsilon = relative_epsilon(cost, mu, nu, 0.05)
    for index in range(3):
        values = sorted(alone(index, cost, mu, nu)[0].flatten().tolist())
        assert float(epsilon[index]) == pytest.approx(0.05 * values[(len(values) - 1) // 2], rel=1e-12)
    far = sinkhorn(1000 * cost, mu, nu, relative_epsilon(1000 * cost, mu, nu), 30)
    assert (far.mass - sinkhorn(cost, mu, nu, relative_epsilon(cost, mu, nu), 30).mass).abs().max() <= 1e-12


def test_nothing_to_pay_between_identical_texts() -> None:
    weight = uniform_marginal(torch.ones(2, 8))
    free = torch.zeros(2, 8, 8)
    free[1] = 1 - torch.eye(8)
    epsilon = relative_epsilon(free, weight, weight, 0.05)
    assert epsilon.tolist() == pytest.approx([0.05, 0.05])
    loss = transport_loss(free, sinkhorn(free, weight, weight, epsilon))
    assert float(loss[0]) == 0 and float(loss[1]) <= 1e-6
    # Most pairs cost nothing: the median is zero and yet the plan is one.
    sparse = torch.zeros(1, 8, 8)
    sparse[0, 0, 0] = 5.0
    epsilon = relative_epsilon(sparse, weight[:1], weight[:1])
    assert epsilon.tolist() == pytest.approx([0.1 * 5e-3])
    plan = sinkhorn(sparse, weight[:1], weight[:1], epsilon)
    assert float(plan.residual) <= 1e-4 and float(transport_loss(sparse, plan)) <= 1e-6


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_finite_for_costs_of_any_size_and_few_tokens(size: float) -> None:
    cost = (size * random(3, 5, 4)).float()
    cost[0, 0, 0] *= 1e4
    mu, nu = uniform_marginal(mask([5, 1, 3])), uniform_marginal(mask([4, 1, 1], 4))
    plan = sinkhorn(cost, mu, nu, relative_epsilon(cost, mu, nu, 0.05), 50)
    assert torch.isfinite(plan.mass).all() and (plan.mass.sum(1) - nu).abs().max() <= 1e-4
    assert float(transport_loss(cost, plan)[1]) == pytest.approx(float(cost[1, 0, 0]), rel=1e-5)
    assert float(transport_loss(cost, plan)[2]) == pytest.approx(float(cost[2, :3, 0].mean()), rel=1e-5)


@pytest.mark.parametrize("side", ["rows", "columns", "both"])
def test_a_text_without_tokens_costs_nothing_and_gets_no_gradient(side: str) -> None:
    cost, mu, nu = problem()
    mu, nu = mu.clone(), nu.clone()
    if side != "columns":
        mu[1] = 0
    if side != "rows":
        nu[1] = 0
    leaf = cost.clone().requires_grad_()
    plan = sinkhorn(leaf, mu, nu, relative_epsilon(leaf, mu, nu))
    loss = transport_loss(leaf, plan, entropic=True)
    bound = semi_dual(torch.full_like(mu, 0.7), leaf, mu, nu, 0.1)
    (gradient,) = torch.autograd.grad((loss + bound).sum(), leaf)
    assert float(loss[1].detach()) == 0 == float(bound[1].detach()) and float(plan.residual[1]) == 0
    assert (gradient[1] == 0).all() and torch.isfinite(gradient).all() and torch.isfinite(loss).all()
    assert not (gradient[0] == 0).all()


def test_a_broken_cost_is_not_hidden() -> None:
    cost, mu, nu = problem()
    cost[0, 2, 2] = torch.nan
    epsilon = relative_epsilon(cost, mu, nu)
    loss = transport_loss(cost, sinkhorn(cost, mu, nu, epsilon))
    assert loss.isnan().tolist() == [True, False, False]
    assert transport_loss(cost, sinkhorn(cost, mu, nu, 0.1)).isnan().tolist() == [True, False, False]
    assert semi_dual(torch.zeros_like(mu), cost, mu, nu, 0.1).isnan().tolist() == [True, False, False]


def test_half_precision_is_left_at_the_door() -> None:
    cost, mu, nu = problem()
    half = cost.bfloat16().requires_grad_()
    plan = sinkhorn(half, mu.float(), nu.float(), 0.2)
    same = sinkhorn(half.detach().float(), mu.float(), nu.float(), 0.2)
    assert plan.mass.dtype == torch.float32 and torch.equal(plan.mass, same.mass)
    loss = transport_loss(half, plan)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


def test_uniform_marginals() -> None:
    assert uniform_marginal(mask([2, 0, 4])).tolist() == [[0.5, 0.5, 0, 0], [0] * 4, [0.25] * 4]


def test_wrong_arguments_are_named() -> None:
    cost, mu, nu = problem()
    with pytest.raises(ValueError, match="sweeps must be 1 or more, got 0"):
        sinkhorn(cost, mu, nu, 0.1, 0)
    with pytest.raises(ValueError, match="epsilon must be above 0, got 0"):
        sinkhorn(cost, mu, nu, 0)
    with pytest.raises(ValueError, match=r"epsilon must have the shape \(3,\), got \(2,\)"):
        sinkhorn(cost, mu, nu, torch.ones(2))
    with pytest.raises(ValueError, match=r"do not fit: \(3, 7, 6\), \(3, 6\), \(3, 7\)"):
        sinkhorn(cost, nu, mu, 0.1)
    with pytest.raises(ValueError, match="share must be above 0, got -1"):
        relative_epsilon(cost, mu, nu, -1)
    with pytest.raises(ValueError, match=r"anneal must be 1 or more, got 0\.5"):
        sinkhorn(cost, mu, nu, 0.1, anneal=0.5)
    with pytest.raises(ValueError, match="weights go with costs"):
        semi_dual(mu, cost, mu, nu, 0.1, torch.ones(2))


def test_the_c_transform_equals_a_plain_loop() -> None:
    cost, mu, nu = problem()
    phi = random(*mu.shape, seed=5).masked_fill(mu == 0, torch.nan)
    both = c_transform(phi, torch.stack([cost, 2 * cost]), mu, 0.1)
    for index in range(3):
        one, rows, _ = (x[0].tolist() for x in alone(index, cost, mu, nu))
        for j in range(COLUMNS[index]):
            for k in (1, 2):
                total = sum(
                    math.exp((float(phi[index, i]) - k * one[i][j]) / 0.1) * rows[i] for i in range(ROWS[index])
                )
                assert float(both[k - 1, index, j]) == pytest.approx(-0.1 * math.log(total), rel=1e-10)


def test_the_semi_dual_bounds_the_optimum_and_reaches_it_at_the_best_potential() -> None:
    cost, mu, nu = problem()
    second = cost.square()
    best, other = (transport_loss(c, sinkhorn(c, mu, nu, 0.2, 500), entropic=True) for c in (cost, second))
    for seed in range(20):
        phi = 3 * random(*mu.shape, seed=seed) - 1.5
        assert (semi_dual(phi, cost, mu, nu, 0.2) <= best).all()
        weights = random(2, seed=seed).softmax(0)
        shared = semi_dual(phi, torch.stack([cost, second]), mu, nu, 0.2, weights)
        parts = torch.stack([semi_dual(phi, c, mu, nu, 0.2) for c in (cost, second)])
        assert (shared - weights @ parts).abs().max() <= 1e-12
        assert (shared <= weights[0] * best + weights[1] * other).all()
    plan = sinkhorn(cost, mu, nu, 0.2, 500)
    leaf = cost.clone().requires_grad_()
    bound = semi_dual(plan.f, leaf, mu, nu, 0.2)
    assert (bound - best).abs().max() <= 1e-12
    (gradient,) = torch.autograd.grad(bound.sum(), leaf)
    assert (gradient - plan.mass).abs().max() <= 1e-12


def test_the_semi_dual_has_the_gradient_of_its_value() -> None:
    cost, mu, nu = problem()
    cost = torch.stack([cost, 2 * cost]).nan_to_num(0.5).requires_grad_()
    phi, beta = random(*mu.shape).requires_grad_(), random(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, c, b: semi_dual(p, c, mu, nu, 0.3, b.softmax(0)), (phi, cost, beta))


def test_the_semi_dual_is_finite_for_extreme_potentials_and_costs() -> None:
    cost, mu, nu = problem(torch.float32)
    phi = torch.full_like(mu, -1e4)
    phi[:, ::2] = 1e4
    phi.requires_grad_()
    leaf = (1e4 * cost).requires_grad_()
    value = semi_dual(phi, leaf, mu, nu, 0.05)
    gradients = torch.autograd.grad(value.sum(), [phi, leaf])
    assert torch.isfinite(value).all() and all(torch.isfinite(g).all() for g in gradients)


def test_ascent_on_the_potential_network_raises_the_bound_to_the_optimum() -> None:
    torch.manual_seed(0)
    rows, columns = mask([6, 4]), mask([5, 5])
    x, y = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    mu, nu = uniform_marginal(rows), uniform_marginal(columns)
    cost = torch.cdist(x, y) / 4
    best = transport_loss(cost, sinkhorn(cost, mu, nu, 0.1, 300), entropic=True)
    potential = Potential(8, hidden=32)
    ascent = torch.optim.Adam(potential.parameters(), lr=1e-2, maximize=True)
    values = []
    for _ in range(300):
        value = semi_dual(potential(x, rows), cost, mu, nu, 0.1)
        values.append(value.detach())
        ascent.zero_grad()
        value.sum().backward()
        ascent.step()
    assert (values[4] > values[0]).all() and (values[-1] > values[4]).all()
    assert (values[-1] <= best + 1e-6).all() and (best - values[-1] <= 1e-2 * best).all()


def test_the_potential_sees_its_text_but_no_padding() -> None:
    torch.manual_seed(0)
    potential = Potential(8, hidden=16, bound=0.5)
    x, rows = 10 * torch.randn(2, 6, 8), mask([6, 4])
    phi = potential(x, rows)
    assert phi.shape == (2, 6) and phi.abs().max() <= 0.5
    assert torch.allclose(potential(x[1:, :4], rows[1:, :4])[0], phi[1, :4], atol=1e-6)
    x[1, 4:] = torch.nan
    assert torch.equal(potential(x, rows)[1, :4], phi[1, :4])
    x[1, 3] += 1
    assert not torch.allclose(potential(x, rows)[1, :3], phi[1, :3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(potential(x, rows)[0], phi[0]) and potential(x.bfloat16(), rows).dtype == torch.float32
