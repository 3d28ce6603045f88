"""Entropic optimal transport between the tokens of two texts, batched and padded, in the log domain.

Rows of a cost are the teacher's tokens and columns the student's. Marginals are zero on padding, and that is the only
mask: the cost of a padded token is never read. Costs may be in half precision; all computation is in float32 or better.

The optimum is ``OT(C) = min ⟨P, C⟩ + ε KL(P ‖ μ⊗ν)`` over plans P with marginals μ and ν (Cuturi 2013, arXiv 1306.0895;
Peyré and Cuturi 2019, arXiv 1803.00567, chapter 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LOG_ZERO = -1e30
"""Value used for the logarithm of zero mass; finite, so that no gradient is infinity minus infinity."""


@dataclass(frozen=True)
class TransportPlan:
    """Transport of mass from teacher tokens to student tokens; carries no gradient."""

    mass: Tensor
    """(B, M, N), zero on padding."""
    f: Tensor
    """(B, M), the potential of the rows: the gradient of the optimum in μ, up to a constant."""
    g: Tensor
    """(B, N), the potential of the columns."""
    residual: Tensor
    """(B,), the error of the row marginals after the last sweep, Σ|row - μ|; column marginals are exact."""


def at_least_float32(x: Tensor) -> Tensor:
    """Numbers as given, in float32 if they had lower precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def uniform_marginal(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equal mass for every token of a sequence, (B, N) from a mask (B, N); all zero if there are no tokens."""
    return mask.to(dtype) / mask.sum(dim=-1, keepdim=True).clamp_min(1)


def mean_cost(cost: Tensor, mu: Tensor, nu: Tensor) -> Tensor:
    """Cost ⟨C, μ⊗ν⟩ (B,) of the independent plan: a reference for transport, and the limit of OT as ε grows."""
    pairs = mu[:, :, None] * nu[:, None, :]
    return (pairs * _where_mass(cost, pairs)).sum(dim=(1, 2))


@torch.no_grad()
def relative_epsilon(cost: Tensor, mu: Tensor, nu: Tensor, share: float = 0.1) -> Tensor:
    """Regularisation ε (B,) as a share of the median cost of each sequence: the same effect for costs of any scale.

    A median below a thousandth of the largest cost is replaced by that value: if most pairs have zero cost the median
    is not informative, and the exponents C/ε would exceed the precision of float32. If all costs are zero, ε is the
    share itself.

    Args:
        cost: (B, M, N).
        mu: (B, M), zero on padding.
        nu: (B, N), zero on padding.
        share: 0.05 to 0.1 gives transport; at 10 the plan is uniform within a few per cent, and the loss a mean cost.
    """
    if not share > 0:
        raise ValueError(f"share must be above 0, got {share}")
    cells = (mu > 0)[:, :, None] & (nu > 0)[:, None, :]
    cost = at_least_float32(cost)
    median = cost.masked_fill(~cells, torch.nan).flatten(1).nanmedian(dim=1).values
    scale = torch.maximum(median.nan_to_num(0.0), cost.masked_fill(~cells, 0.0).amax(dim=(1, 2)) * 1e-3)
    return share * torch.where(scale == 0, 1.0, scale)


@torch.no_grad()
def sinkhorn(
    cost: Tensor, mu: Tensor, nu: Tensor, epsilon: float | Tensor, sweeps: int = 30, *, anneal: float = 1.0
) -> TransportPlan:
    """Entropic plan by Sinkhorn's updates of the potentials.

    The iterations are not unrolled: by the envelope theorem the plan is the gradient of the optimum in the cost, which
    :func:`transport_loss` uses.

    Args:
        cost: (B, M, N).
        mu: (B, M), sums to 1 and is zero on padding.
        nu: (B, N), likewise. A sequence with an empty side gets a plan without mass.
        epsilon: in units of the cost, one number for all sequences or (B,); see :func:`relative_epsilon`.
        sweeps: updates of both potentials. 20 to 50 are enough for ε of 0.1 of the median cost; check
            :attr:`TransportPlan.residual`.
        anneal: the first sweeps use up to this multiple of ε, and the second half uses ε. It can help if ε is small.
    """
    if sweeps < 1:
        raise ValueError(f"sweeps must be 1 or more, got {sweeps}")
    if not anneal >= 1:
        raise ValueError(f"anneal must be 1 or more, got {anneal}")
    _check_shapes(cost, mu, nu)
    cost = at_least_float32(cost)
    mu, nu = mu.to(cost.dtype), nu.to(cost.dtype)
    rows, columns = mu > 0, nu > 0
    cells = rows[:, :, None] & columns[:, None, :]
    rows, columns = cells.any(dim=2), cells.any(dim=1)
    cost = cost.masked_fill(~cells, 0.0)
    log_mu, log_nu = _log(mu)[:, :, None], _log(nu)[:, None, :]
    final = _epsilon_per_pair(epsilon, cost)
    f, g = cost.new_zeros(mu.shape), cost.new_zeros(nu.shape)
    for sweep in range(sweeps):
        eps = final * anneal ** max(0.0, 1 - 2 * (sweep + 1) / sweeps)
        f = -eps[..., 0] * torch.sub(g[:, None, :], cost).div_(eps).add_(log_nu).logsumexp(dim=2)
        f.masked_fill_(~rows, 0.0)
        g = -eps[..., 0] * torch.sub(f[:, :, None], cost).div_(eps).add_(log_mu).logsumexp(dim=1)
        g.masked_fill_(~columns, 0.0)
    mass = ((f[:, :, None] + g[:, None, :] - cost) / final + log_mu + log_nu).exp()
    residual = (mass.sum(dim=2) - mu).masked_fill(~rows, 0.0).abs().sum(dim=1)
    return TransportPlan(mass, f, g, residual)


def transport_loss(cost: Tensor, plan: TransportPlan, *, entropic: bool = False) -> Tensor:
    """Transport cost ⟨P, C⟩ (B,), whose gradient in the cost is the plan.

    That is the gradient of the entropic optimum, exact once the sweeps have converged. It is the same with or without
    the entropy term: at the optimal plan that term is constant in the cost to first order.

    Args:
        cost: (B, M, N), the cost that the plan was computed for; its gradient reaches both models and the cost weights.
        plan: see :func:`sinkhorn`.
        entropic: add ε KL(P ‖ μ⊗ν), for the value of the optimum itself.
    """
    cost = _where_mass(cost, plan.mass)
    loss = (plan.mass * cost).sum(dim=(1, 2))
    if not entropic:
        return loss
    # log(P / μ⊗ν) = (f + g − C) / ε
    divergence = plan.f[:, :, None] + plan.g[:, None, :] - cost.detach()
    return loss + (plan.mass * divergence).sum(dim=(1, 2))


def c_transform(phi: Tensor, cost: Tensor, mu: Tensor, epsilon: float | Tensor) -> Tensor:
    """Best potential of the columns given one of the rows: φᶜ(y_j) = −ε logsumexp_i((φ(x_i) − C_ij) / ε + log μ_i).

    See Genevay et al. 2016 (arXiv 1605.08527).

    Args:
        phi: (B, M).
        cost: (B, M, N), or (K, B, M, N) for several costs at once.
        mu: (B, M), zero on padding.
        epsilon: one number, or a tensor of the cost's shape without M and N.

    Returns:
        (B, N), or (K, B, N). Values at padded columns are meaningless.
    """
    cost = at_least_float32(cost)
    eps = _epsilon_per_pair(epsilon, cost)
    rows = (mu > 0)[:, :, None]
    gain = phi.to(cost.dtype)[:, :, None].masked_fill(~rows, 0.0) - cost.masked_fill(~rows, 0.0)
    exponents = gain / eps + _log(mu.to(cost.dtype))[:, :, None]
    return (-eps[..., 0] * exponents.logsumexp(dim=-2)).masked_fill(~rows.any(dim=1), 0.0)


def semi_dual(
    phi: Tensor, costs: Tensor, mu: Tensor, nu: Tensor, epsilon: float | Tensor, weights: Tensor | None = None
) -> Tensor:
    """Lower bound ⟨φ, μ⟩ + Σ_k w_k ⟨φᶜₖ, ν⟩ (B,) of Σ_k w_k OT(C_k) for every φ, tight for one cost and its best φ.

    The bound is concave in φ. Maximise it in φ with the costs detached, then minimise it in the costs with φ detached:
    at the best φ its own gradient is zero, and elsewhere that gradient would only train the models to loosen the bound.

    Args:
        phi: (B, M), from :class:`Potential` or free.
        costs: (B, M, N), or (K, B, M, N) for costs that share φ.
        mu: (B, M), zero on padding.
        nu: (B, N), zero on padding.
        epsilon: one number, or a tensor of the costs' shape without M and N.
        weights: (K,), summing to 1, such as a softmax; required for several costs.
    """
    if (costs.dim() == 4) != (weights is not None):
        raise ValueError(f"weights go with costs (K, B, M, N), got costs {tuple(costs.shape)}")
    columns = nu > 0
    transformed = c_transform(phi, costs.masked_fill(~columns[:, None, :], 0.0), mu, epsilon)
    along_columns = (transformed * nu.to(transformed.dtype)).sum(dim=-1)
    if weights is not None:
        along_columns = (weights.to(along_columns.dtype)[:, None] * along_columns).sum(dim=0)
    along_rows = (_where_mass(phi, mu) * mu).sum(dim=-1)
    # A sequence without columns has nothing to transport, and no bound.
    return torch.where(columns.any(dim=-1), along_rows + along_columns, 0.0)


class Potential(nn.Module):
    """Network for the potential of a token, from the token's vector and the mean vector of its text.

    Args:
        width: size of a token's vector.
        hidden: width of the two projections.
        bound: φ stays within ±bound. The best potential varies no more than the cost does, so half of the largest cost
            is enough; 1 is enough for costs up to 2.
    """

    def __init__(self, width: int, hidden: int = 256, bound: float = 1.0) -> None:
        super().__init__()
        self.token = nn.Linear(width, hidden)
        self.context = nn.Linear(width, hidden)
        self.out = nn.Linear(2 * hidden, 1)
        self.bound = bound

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """φ (B, M) of tokens (B, M, width), with a mask (B, M) that is False on padding."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x).masked_fill(~mask[..., None], 0.0)
            mean = x.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)
            context = self.context(mean)[:, None].expand(-1, x.shape[1], -1)
            # Without this nonlinearity φ would be tanh of a linear map, whatever its width.
            both = nn.functional.gelu(torch.cat([self.token(x), context], dim=-1))
            return self.bound * torch.tanh(self.out(both).squeeze(-1))


def _log(mass: Tensor) -> Tensor:
    return mass.log().clamp_min(_LOG_ZERO)


def _epsilon_per_pair(epsilon: float | Tensor, cost: Tensor) -> Tensor:
    """Regularisation ε (…, B, 1, 1), in the cost's dtype."""
    if not isinstance(epsilon, Tensor):
        if not epsilon > 0:
            raise ValueError(f"epsilon must be above 0, got {epsilon}")
        return cost.new_full((1,) * cost.dim(), epsilon)
    if epsilon.shape != cost.shape[:-2]:
        raise ValueError(f"epsilon must have the shape {tuple(cost.shape[:-2])}, got {tuple(epsilon.shape)}")
    return epsilon.to(cost.dtype)[..., None, None]


def _where_mass(values: Tensor, mass: Tensor) -> Tensor:
    """Values where there is mass and 0 elsewhere; padding may hold any value, and a NaN at a position with mass is
    kept."""
    return torch.where(mass == 0, 0.0, at_least_float32(values))


def _check_shapes(cost: Tensor, mu: Tensor, nu: Tensor) -> None:
    if cost.dim() != 3 or mu.shape != cost.shape[:2] or nu.shape != (cost.shape[0], cost.shape[2]):
        raise ValueError(
            f"cost (B, M, N), mu (B, M) and nu (B, N) do not fit: "
            f"{tuple(cost.shape)}, {tuple(mu.shape)}, {tuple(nu.shape)}"
        )
