"""Multi-cost distillation (MCW-KD, AAAI 2026, doi 10.1609/aaai.v40i39.40619): cross-model attention and transport."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raycloud.distill.head_top_k import head_log_p, head_top_k
from raycloud.distill.objective import LossTerms, ModelSizes, StudentOutput, TeacherOutput, both_ids, register
from raycloud.distill.objective_options import MCWKDOptions
from raycloud.distill.objectives.dskd_cma import DSKDCMA, CrossAttentionProjectors, byte_cost
from raycloud.distill.optimal_transport import (
    Potential,
    at_least_float32,
    relative_epsilon,
    semi_dual,
    sinkhorn,
    transport_loss,
    uniform_marginal,
)
from raycloud.distill.ragged import mask_of, padded
from raycloud.distill.transport_costs import (
    cost_weights,
    information_marginal,
    largest_cost,
    rank_distance,
    rank_kl,
    rank_kl_published,
    salience_cost,
    state_cosine,
    state_distance,
    window_mean,
)

Side = tuple[Tensor, Tensor, Tensor]
_MOMENTUM = 0.99
_LOGIT_COSTS = ("distance", "divergence", "salience")
_STATE_COSTS = ("bytes", "distance", "cosine")


class LearnedCostWeights(nn.Module):
    """Weights of several costs, and a running mean of each cost that serves as its unit.

    Args:
        begin: initial weights.
        relative: divide each cost by its running mean.
    """

    scale: Tensor

    def __init__(self, begin: Sequence[float], *, relative: bool = True) -> None:
        super().__init__()
        self.relative = relative
        self.register_buffer("scale", torch.ones(len(begin)))
        self.register_buffer("seen", torch.tensor(False))
        self._init_weights(torch.tensor(begin) / sum(begin))

    def _init_weights(self, weights: Tensor) -> None:
        self.logits = nn.Parameter(weights.log())

    @property
    def weights(self) -> Tensor:
        """(K,), summing to 1; learned as a softmax."""
        return self.logits.softmax(dim=0)

    def scaled_costs(self, costs: Sequence[Tensor], mu: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """The costs (K, B, M, N) in their units, and their weights (K,). This batch enters the running mean afterwards.

        So a text's loss does not depend on the other texts of its batch.
        """
        found = torch.stack([at_least_float32(cost) for cost in costs])
        weights = self.weights
        if self.relative:
            found = found / self.scale.clone()[:, None, None, None]
        if self.training:
            with torch.no_grad():
                pairs = (mu[:, :, None] * nu[:, None, :]).to(found.dtype)
                self.update((found * pairs).sum(dim=(1, 2, 3)) / pairs.sum().clamp_min(1e-12))
        return found, weights

    def update(self, mean: Tensor) -> None:
        """Update the running means with the mean of each cost (K,), given in current units."""
        if self.relative:
            mean = mean * self.scale
            self.scale.copy_(torch.where(self.seen, _MOMENTUM * self.scale + (1 - _MOMENTUM) * mean, mean))  # type: ignore[arg-type]
            self.scale.clamp_min_(1e-6)
            self.seen.fill_(True)  # type: ignore[operator]


class FixedCostWeights(LearnedCostWeights):
    """Weights that are not trained."""

    untrained: Tensor

    def _init_weights(self, weights: Tensor) -> None:
        self.register_buffer("untrained", weights)

    @property
    def weights(self) -> Tensor:
        """(K,), summing to 1."""
        return self.untrained


class ProjectedCostWeights(FixedCostWeights):
    """Weights that are set to ``transport_costs.cost_weights`` every ``period`` micro-batches.

    They move to the costs that were smallest.
    """

    total: Tensor
    count: Tensor

    def __init__(self, begin: Sequence[float], period: int, *, relative: bool = True) -> None:
        super().__init__(begin, relative=relative)
        self.period = period
        self.register_buffer("total", torch.zeros(len(begin)))
        self.register_buffer("count", torch.tensor(0))

    def update(self, mean: Tensor) -> None:
        """Update the running means, and set the weights from the mean since their last update if it is time."""
        super().update(mean)
        self.total, self.count = self.total + mean, self.count + 1
        if int(self.count) == self.period:
            self.untrained = cost_weights(self.total / self.period).to(self.untrained.dtype)
            self.total, self.count = torch.zeros_like(self.total), torch.zeros_like(self.count)


class MCWKDExtras(CrossAttentionProjectors):
    """Projectors of cross-model attention, a projector for transport, and the weights and potentials of the costs."""

    def __init__(
        self, student: int, teacher: int, logit_costs: LearnedCostWeights, state_costs: LearnedCostWeights, ranks: int
    ) -> None:
        super().__init__(student, teacher)
        self.ot = nn.Linear(teacher, student)
        self.salience = nn.Linear(student, 1)
        self.logit_costs, self.state_costs = logit_costs, state_costs
        self.logit_potential, self.state_potential = Potential(ranks), Potential(student)


@register
class MCWKD(MCWKDOptions, DSKDCMA):
    """Cross-model attention (:class:`DSKDCMA`) and two optimal transports between teacher tokens and student tokens.

    One transport uses what the tokens predict (distance and divergence of ranked probabilities, and a learned
    salience), the other what they represent (their bytes, and distance and cosine of hidden states averaged over a
    window). Each is a text's transport cost times its number of tokens, so that it is weighted like the other terms.

    ``compat: published`` is that of DSKD-CMA, and follows the program (HoangTran223/MCW-KD 70ceb2d,
    ``code/criterions/MCW_KD.py`` and ``ETP.py``) in three more ways:

    - Ranked probabilities are a softmax of the most likely ids' logits alone and sum to 1; their divergence is a plain
      sum. Ours are probabilities over the whole vocabulary, of which 400 ids hold a part.
    - Costs are not scaled, and distances of states are divided by the largest of a text, which passes a gradient. Ours
      are in units of their running means.
    - Plans are computed from ``exp(−sinkhorn_alpha · cost)``: with the published 0.1 they are nearly uniform, and the
      transport is a mean cost. Ours have an ε that is a share of the median cost.

    Not reproduced: edit distances along a warping path, which are zero off it; a salience head and weights that are
    never trained; transports a few hundred times too small; a plan that is a function for the gradient; targets mixed
    with the student's own; prompts among the tokens. Of the second program (``MCW_KD_Dual.py``) the solver
    ``semi_dual`` has the idea, and neither its inner steps nor its network.
    """

    def extras(self, sizes: ModelSizes) -> nn.Module:
        """Projectors, cost weights and potentials."""
        used = self.logit_weights if self.importance == "salience" else self.logit_weights[:2]
        return MCWKDExtras(
            sizes.student_hidden_size,
            sizes.teacher_hidden_size,
            self._costs(used),
            self._costs(self.state_weights),
            self.k,
        )

    def _costs(self, begin: Sequence[float]) -> LearnedCostWeights:
        relative = self.compat == "ours"
        if self.weighting == "projected":
            return ProjectedCostWeights(begin, self.period, relative=relative)
        return (LearnedCostWeights if self.weighting == "learned" else FixedCostWeights)(begin, relative=relative)

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> LossTerms:
        """Sum of the terms of cross-model attention, ``logit_transport`` and ``state_transport``; reports the cost
        weights too."""
        assert isinstance(extras, MCWKDExtras)
        attention = super().loss(student, teacher, extras, chunk=chunk)
        ours, theirs = both_ids(student, teacher)
        student_mask, teacher_mask = mask_of(ours.offsets), mask_of(theirs.offsets)
        h = padded(student.hidden, ours.offsets)
        g = padded(extras.ot(teacher.hidden().to(extras.ot.weight.dtype)), theirs.offsets)
        log_q, _ = head_top_k(student.logits_view(), self.k, self.rank_temperature, chunk=chunk)
        with torch.no_grad():
            log_p, _ = head_top_k(teacher.logits_view(), self.k, self.rank_temperature, chunk=chunk)
        if self.compat == "published":
            log_q, log_p = (one.log_softmax(dim=-1) for one in (log_q, log_p))
        # A vocabulary may have fewer ids than the number of ranks compared.
        q, p = (
            padded(nn.functional.pad(one.exp(), (0, self.k - one.shape[-1])), side.offsets)
            for one, side in ((log_q, ours), (log_p, theirs))
        )
        mass = None
        if self.importance == "information":
            mass = information_marginal(
                padded(head_log_p(teacher.logits_view(), theirs.labels, chunk=chunk), theirs.offsets), teacher_mask
            )
        # The metrics log divides by the number of tokens, so a weight is multiplied by it here.
        weights = {
            f"{which}_weight/{name}": weight * len(ours)
            for which, names, how in (
                ("logit", _LOGIT_COSTS, extras.logit_costs),
                ("state", _STATE_COSTS, extras.state_costs),
            )
            for name, weight in zip(names, how.weights.detach(), strict=False)
        }
        logit_transport, state_transport = self.transports(
            extras, (g, p, teacher_mask), (h, q, student_mask), byte_cost(student, teacher), mass
        )
        total = attention.sum + self.transport * (logit_transport + state_transport)
        transports = {"logit_transport": logit_transport.detach(), "state_transport": state_transport.detach()}
        return LossTerms(total, {**attention.parts, **transports, **weights})

    def transports(
        self, extras: MCWKDExtras, teacher: Side, student: Side, covered: Tensor, mass: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transports by predictions and by states, summed over the student's tokens.

        Args:
            extras: module of this objective.
            teacher: states in the student's hidden size (B, M, d), ranked probabilities (B, M, k), and mask (B, M).
            student: likewise, (B, N, …).
            covered: cost of both sides' bytes (B, M, N).
            mass: mass of the teacher's tokens (B, M); uniform if not given.
        """
        (g, p, teacher_mask), (h, q, student_mask) = teacher, student
        mu = uniform_marginal(teacher_mask, at_least_float32(h).dtype) if mass is None else mass
        published = self.compat == "published"
        predicted = [rank_distance(p, q), (rank_kl_published if published else rank_kl)(p, q)]
        if self.importance == "salience":
            predicted.append(salience_cost(g, h, extras.salience))
        teacher_means, student_means = (
            window_mean(g, teacher_mask, self.radius),
            window_mean(h, student_mask, self.radius),
        )
        distance = state_distance(teacher_means, student_means, 1.0)
        if published:
            distance = distance / largest_cost(distance, teacher_mask, student_mask)
        states = [covered, distance, state_cosine(teacher_means, student_means)]
        return (
            self._transport(predicted, extras.logit_costs, extras.logit_potential, p, teacher_mask, student_mask, mu),
            self._transport(
                states, extras.state_costs, extras.state_potential, teacher_means, teacher_mask, student_mask, mu
            ),
        )

    def _transport(
        self,
        costs: Sequence[Tensor],
        how: LearnedCostWeights,
        potential: Potential,
        tokens: Tensor,
        teacher_mask: Tensor,
        student_mask: Tensor,
        mu: Tensor,
    ) -> Tensor:
        nu, count = uniform_marginal(student_mask, mu.dtype), student_mask.sum(dim=1)
        scaled, weights = how.scaled_costs(costs, mu, nu)
        cost = (weights[:, None, None, None] * scaled).sum(dim=0)
        if self.compat == "published":
            epsilon = cost.new_full((len(cost),), 1 / self.sinkhorn_alpha)
        else:
            epsilon = relative_epsilon(cost, mu, nu, self.share)
        if self.solver == "sinkhorn":
            return (transport_loss(cost, sinkhorn(cost, mu, nu, epsilon, self.sweeps)) * count).sum()
        each = epsilon.expand(len(costs), -1)
        phi = potential(tokens.detach(), teacher_mask)
        bound = semi_dual(phi.detach(), scaled, mu, nu, each, weights)
        # The potential ascends while the models descend: its gradient is negated, its value is the bound.
        climbing = semi_dual(phi, scaled.detach(), mu, nu, each, weights.detach())
        return ((bound + climbing.detach() - climbing) * count).sum()
