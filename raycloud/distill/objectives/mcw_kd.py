"""Multi-cost distillation (MCW-KD, AAAI 2026, doi 10.1609/aaai.v40i39.40619): cross-model attention and transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.distill.costs import (
    cost_weights,
    information_marginal,
    largest,
    rank_distance,
    rank_kl,
    salience_cost,
    state_cosine,
    state_distance,
    window_mean,
)
from raycloud.distill.head_top import head_log_p, head_top
from raycloud.distill.objective import Sizes, StudentOutput, TeacherOutput, Terms, both_ids
from raycloud.distill.objectives.dskd_cma import DSKDCMA, CrossProjectors, byte_cost
from raycloud.distill.ragged import mask_of, padded
from raycloud.distill.transport import (
    Potential,
    at_least_float32,
    relative_epsilon,
    semi_dual,
    sinkhorn,
    transport_loss,
    uniform_marginal,
)

Weights = tuple[float, float, float]
Side = tuple[Tensor, Tensor, Tensor]
_MOMENTUM = 0.99
_LOGIT_COSTS = ("distance", "divergence", "salience")
_STATE_COSTS = ("bytes", "distance", "cosine")


class Costs(nn.Module):
    """Weights of several costs, and how large each cost has been, so that they mean the same.

    Args:
        begin: weights to begin with.
        relative: give costs in units of what they have been.
    """

    scale: Tensor

    def __init__(self, begin: Sequence[float], *, relative: bool = True) -> None:
        super().__init__()
        self.relative = relative
        self.register_buffer("scale", torch.ones(len(begin)))
        self.register_buffer("seen", torch.tensor(False))
        self._begin(torch.tensor(begin) / sum(begin))

    def _begin(self, weights: Tensor) -> None:
        self.logits = nn.Parameter(weights.log())

    @property
    def weights(self) -> Tensor:
        """(K,), summing to 1; learned as a softmax."""
        return self.logits.softmax(dim=0)

    def weighed(self, costs: Sequence[Tensor], mu: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """The costs (K, B, M, N) in their units, and their weights (K,); this batch counts from the next one on.

        A text's loss so does not depend on its company.
        """
        found = torch.stack([at_least_float32(cost) for cost in costs])
        weights = self.weights
        if self.relative:
            found = found / self.scale.clone()[:, None, None, None]
        if self.training:
            with torch.no_grad():
                pairs = (mu[:, :, None] * nu[:, None, :]).to(found.dtype)
                self.note((found * pairs).sum(dim=(1, 2, 3)) / pairs.sum().clamp_min(1e-12))
        return found, weights

    def note(self, mean: Tensor) -> None:
        """Take the mean of each cost (K,), as it was given, into account."""
        if self.relative:
            mean = mean * self.scale
            self.scale.copy_(torch.where(self.seen, _MOMENTUM * self.scale + (1 - _MOMENTUM) * mean, mean))  # type: ignore[arg-type]
            self.scale.clamp_min_(1e-6)
            self.seen.fill_(True)  # type: ignore[operator]


class FixedCosts(Costs):
    """Weights that stay."""

    given: Tensor

    def _begin(self, weights: Tensor) -> None:
        self.register_buffer("given", weights)

    @property
    def weights(self) -> Tensor:
        """(K,), summing to 1."""
        return self.given


class ProjectedCosts(FixedCosts):
    """Weights that every ``period`` micro-batches become those of :func:`~raycloud.distill.costs.cost_weights`.

    They move to the costs that were the smallest.
    """

    total: Tensor
    count: Tensor

    def __init__(self, begin: Sequence[float], period: int, *, relative: bool = True) -> None:
        super().__init__(begin, relative=relative)
        self.period = period
        self.register_buffer("total", torch.zeros(len(begin)))
        self.register_buffer("count", torch.tensor(0))

    def note(self, mean: Tensor) -> None:
        """Likewise; the mean of those since the last time decides."""
        super().note(mean)
        self.total, self.count = self.total + mean, self.count + 1
        if int(self.count) == self.period:
            self.given = cost_weights(self.total / self.period).to(self.given.dtype)
            self.total, self.count = torch.zeros_like(self.total), torch.zeros_like(self.count)


class Extras(CrossProjectors):
    """The projectors of cross-model attention, one more for transport, and the weights of the costs."""

    def __init__(self, student: int, teacher: int, logit_costs: Costs, state_costs: Costs, ranks: int) -> None:
        super().__init__(student, teacher)
        self.ot = nn.Linear(teacher, student)
        self.salience = nn.Linear(student, 1)
        self.logit_costs, self.state_costs = logit_costs, state_costs
        self.logit_potential, self.state_potential = Potential(ranks), Potential(student)


class MCWKD(DSKDCMA):
    """:class:`DSKDCMA`, and two transports of the teacher's tokens to the student's.

    One goes by what the tokens predict (distance and divergence of ranked probabilities, and a learned salience), one
    by what they stand for (their bytes, and distance and cosine of states averaged over a window). Each is a text's
    transport cost times its tokens, so that it weighs like the other terms.

    ``compat: published`` is DSKD-CMA's, and also takes costs as they come (distances of states over a text's largest)
    and makes plans of ``exp(−sinkhorn_alpha · cost)``: with the published 0.1 they are all but uniform, and transport a
    mean cost. Not reproduced of the published programs: edit distances along a warping path, which are zero off it; a
    salience head and weights that nobody trains; transports a few hundred times too light; a plan that is a function
    for the gradient; targets blended with the student's own; prompts among the tokens.
    """

    name: Literal["mcw_kd"] = "mcw_kd"  # type: ignore[assignment]
    temperature: float = Field(3.0, gt=0)
    rank_temperature: float = Field(2.0, gt=0)
    """Divides logits before their probabilities are ranked."""
    words: int = Field(400, gt=0)
    """Ranks compared."""
    radius: int = Field(4, ge=0)
    """Tokens to either side of a window."""
    logit_weights: Weights = (0.2, 0.5, 0.3)
    """Of distance, divergence and salience to begin with."""
    state_weights: Weights = (0.3, 0.5, 0.2)
    """Of bytes, distance and cosine to begin with."""
    weighting: Literal["learned", "projected", "fixed"] = "learned"
    """``learned`` with the rest; ``projected`` moves them to the smallest costs, as the first published program does;
    ``fixed`` leaves them."""
    period: int = Field(1000, gt=0)
    """Micro-batches between two projections of the weights."""
    importance: Literal["salience", "information"] = "salience"
    """What makes a token count: ``salience`` is a cost, learned; ``information`` gives the teacher's tokens mass by how
    little it foresaw them, without that cost."""
    transport: float = Field(1.0, ge=0)
    """Weight of both transports beside cross-model attention."""
    solver: Literal["sinkhorn", "semi_dual"] = "sinkhorn"
    """``semi_dual`` trains a potential against the student, as the published second program means to."""
    share: float = Field(0.1, gt=0)
    """ε as a share of the median cost."""
    sweeps: int = Field(30, gt=0)
    sinkhorn_alpha: float = Field(0.1, gt=0)
    """The inverse of ε where ``compat`` is ``published``, which does not use ``share``."""

    def extras(self, sizes: Sizes) -> nn.Module:
        """Projectors, cost weights and potentials."""
        used = self.logit_weights if self.importance == "salience" else self.logit_weights[:2]
        return Extras(sizes.student, sizes.teacher, self._costs(used), self._costs(self.state_weights), self.words)

    def _costs(self, begin: Sequence[float]) -> Costs:
        relative = self.compat == "ours"
        if self.weighting == "projected":
            return ProjectedCosts(begin, self.period, relative=relative)
        return (Costs if self.weighting == "learned" else FixedCosts)(begin, relative=relative)

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> Terms:
        """Terms of cross-model attention, ``logit_transport`` and ``state_transport``, and the weights of costs."""
        assert isinstance(extras, Extras)
        attention = super().loss(student, teacher, extras, chunk=chunk)
        ours, theirs = both_ids(student, teacher)
        mask, other = mask_of(ours.offsets), mask_of(theirs.offsets)
        h = padded(student.rows, ours.offsets)
        g = padded(extras.ot(teacher.rows().to(extras.ot.weight.dtype)), theirs.offsets)
        log_q, _ = head_top(student.lane(), self.words, self.rank_temperature, chunk=chunk)
        with torch.no_grad():
            log_p, _ = head_top(teacher.lane(), self.words, self.rank_temperature, chunk=chunk)
        # A vocabulary may have fewer words than are compared.
        q, p = (
            padded(nn.functional.pad(one.exp(), (0, self.words - one.shape[-1])), side.offsets)
            for one, side in ((log_q, ours), (log_p, theirs))
        )
        mass = None
        if self.importance == "information":
            mass = information_marginal(
                padded(head_log_p(teacher.lane(), theirs.labels, chunk=chunk), theirs.offsets), other
            )
        # Logs divide by the number of tokens: of a weight that leaves itself.
        weights = {
            f"{which}_weight/{name}": weight * len(ours)
            for which, names, how in (
                ("logit", _LOGIT_COSTS, extras.logit_costs),
                ("state", _STATE_COSTS, extras.state_costs),
            )
            for name, weight in zip(names, how.weights.detach(), strict=False)
        }
        far, near = self.transports(extras, (g, p, other), (h, q, mask), byte_cost(student, teacher), mass)
        total = attention.sum + self.transport * (far + near)
        transports = {"logit_transport": far.detach(), "state_transport": near.detach()}
        return Terms(total, {**attention.parts, **transports, **weights})

    def transports(
        self, extras: Extras, teacher: Side, student: Side, covered: Tensor, mass: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both transports, summed over the student's tokens.

        Args:
            extras: of this objective.
            teacher: states in the student's width (B, M, d), ranked probabilities (B, M, k), and mask (B, M).
            student: likewise, (B, N, …).
            covered: what both sides' bytes cost (B, M, N).
            mass: of the teacher's tokens (B, M); uniform where not given.
        """
        (g, p, rows), (h, q, columns) = teacher, student
        mu = uniform_marginal(rows, at_least_float32(h).dtype) if mass is None else mass
        predicted = [rank_distance(p, q), rank_kl(p, q)]
        if self.importance == "salience":
            predicted.append(salience_cost(g, h, extras.salience))
        its, mine = window_mean(g, rows, self.radius), window_mean(h, columns, self.radius)
        distance = state_distance(its, mine, 1.0)
        if self.compat == "published":
            distance = distance / largest(distance, rows, columns)
        states = [covered, distance, state_cosine(its, mine)]
        return (
            self._transport(predicted, extras.logit_costs, extras.logit_potential, p, rows, columns, mu),
            self._transport(states, extras.state_costs, extras.state_potential, its, rows, columns, mu),
        )

    def _transport(
        self,
        costs: Sequence[Tensor],
        how: Costs,
        potential: Potential,
        tokens: Tensor,
        rows: Tensor,
        columns: Tensor,
        mu: Tensor,
    ) -> Tensor:
        nu, count = uniform_marginal(columns, mu.dtype), columns.sum(dim=1)
        scaled, weights = how.weighed(costs, mu, nu)
        cost = (weights[:, None, None, None] * scaled).sum(dim=0)
        if self.compat == "published":
            epsilon = cost.new_full((len(cost),), 1 / self.sinkhorn_alpha)
        else:
            epsilon = relative_epsilon(cost, mu, nu, self.share)
        if self.solver == "sinkhorn":
            return (transport_loss(cost, sinkhorn(cost, mu, nu, epsilon, self.sweeps)) * count).sum()
        each = epsilon.expand(len(costs), -1)
        phi = potential(tokens.detach(), rows)
        bound = semi_dual(phi.detach(), scaled, mu, nu, each, weights)
        # The potential climbs while the models descend: its gradient is turned round, and the value stays the bound's.
        climbing = semi_dual(phi, scaled.detach(), mu, nu, each, weights.detach())
        return ((bound + climbing.detach() - climbing) * count).sum()
