"""Multi-cost distillation (MCW-KD, AAAI 2026, doi 10.1609/aaai.v40i39.40619): cross-model attention and transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.distill.costs import (
    rank_distance,
    rank_kl,
    salience_cost,
    span_cost,
    state_cosine,
    state_distance,
    window_mean,
)
from raycloud.distill.head_top import head_top
from raycloud.distill.objective import Ids, Sizes, StudentOutput, TeacherOutput, Terms, both_ids
from raycloud.distill.objectives.dskd_cma import DSKDCMA, CrossProjectors
from raycloud.distill.ragged import mask_of, padded
from raycloud.distill.transport import (
    Potential,
    relative_epsilon,
    semi_dual,
    sinkhorn,
    transport_loss,
    uniform_marginal,
)

Weights = tuple[float, float, float]
Side = tuple[Tensor, Tensor, Tensor]
_MOMENTUM = 0.99


class Costs(nn.Module):
    """Weights of several costs, learned as a softmax, and how large each cost has been, so that they mean the same."""

    scale: Tensor

    def __init__(self, begin: Sequence[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(begin).log())
        self.register_buffer("scale", torch.ones(len(begin)))
        self.register_buffer("seen", torch.tensor(False))

    @property
    def weights(self) -> Tensor:
        """(K,), summing to 1."""
        return self.logits.softmax(dim=0)

    def scaled(self, costs: Sequence[Tensor], mu: Tensor, nu: Tensor) -> Tensor:
        """The costs (K, B, M, N) in units of what they were until now; this batch counts from the next one on.

        A text's loss so does not depend on its company.
        """
        stacked = torch.stack([cost.float() for cost in costs])
        units = self.scale.clone()
        if self.training:
            with torch.no_grad():
                pairs = (mu[:, :, None] * nu[:, None, :]).to(stacked.dtype)
                mean = (stacked * pairs).sum(dim=(1, 2, 3)) / pairs.sum().clamp_min(1e-12)
                self.scale.copy_(torch.where(self.seen, _MOMENTUM * self.scale + (1 - _MOMENTUM) * mean, mean))  # type: ignore[arg-type]
                self.scale.clamp_min_(1e-6)
                self.seen.fill_(True)  # type: ignore[operator]
        return stacked / units[:, None, None, None]


class Extras(CrossProjectors):
    """The projectors of cross-model attention, one more for transport, and the weights of the costs."""

    def __init__(self, student: int, teacher: int, logit_weights: Weights, state_weights: Weights, ranks: int) -> None:
        super().__init__(student, teacher)
        self.ot = nn.Linear(teacher, student)
        self.salience = nn.Linear(student, 1)
        self.logit_costs, self.state_costs = Costs(logit_weights), Costs(state_weights)
        self.logit_potential, self.state_potential = Potential(ranks), Potential(student)


class MCWKD(DSKDCMA):
    """:class:`DSKDCMA`, and two transports of the teacher's tokens to the student's.

    One goes by what the tokens predict (distance and divergence of ranked probabilities, and a learned salience), one
    by what they stand for (their bytes, and distance and cosine of states averaged over a window). Each is a text's
    transport cost times its tokens, so that it weighs like the other terms.
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
    """Of distance, divergence and salience to begin with; they are learned."""
    state_weights: Weights = (0.3, 0.5, 0.2)
    """Of bytes, distance and cosine to begin with."""
    transport: float = Field(1.0, ge=0)
    """Weight of both transports beside cross-model attention."""
    solver: Literal["sinkhorn", "semi_dual"] = "sinkhorn"
    """``semi_dual`` trains a potential against the student, as the published second program means to."""
    share: float = Field(0.1, gt=0)
    """ε as a share of the median cost."""
    sweeps: int = Field(30, gt=0)

    def extras(self, sizes: Sizes) -> nn.Module:
        """Projectors, cost weights and potentials."""
        return Extras(sizes.student, sizes.teacher, self.logit_weights, self.state_weights, self.words)

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> Terms:
        """Terms of cross-model attention, ``logit_transport`` and ``state_transport``."""
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
        spans = teacher.spans or (_places(ours), _places(theirs))
        covered = span_cost(padded(spans[1], theirs.offsets), padded(spans[0], ours.offsets))
        far, near = self.transports(extras, (g, p, other), (h, q, mask), covered)
        total = attention.sum + self.transport * (far + near)
        return Terms(total, {**attention.parts, "logit_transport": far.detach(), "state_transport": near.detach()})

    def transports(self, extras: Extras, teacher: Side, student: Side, covered: Tensor) -> tuple[Tensor, Tensor]:
        """Both transports, summed over the student's tokens.

        Args:
            extras: of this objective.
            teacher: states in the student's width (B, M, d), ranked probabilities (B, M, k), and mask (B, M).
            student: likewise, (B, N, …).
            covered: what both sides' bytes cost (B, M, N).
        """
        (g, p, rows), (h, q, columns) = teacher, student
        predicted = [rank_distance(p, q), rank_kl(p, q), salience_cost(g, h, extras.salience)]
        its, mine = window_mean(g, rows, self.radius), window_mean(h, columns, self.radius)
        states = [covered, state_distance(its, mine, 1.0), state_cosine(its, mine)]
        return (
            self._transport(predicted, extras.logit_costs, extras.logit_potential, p, rows, columns),
            self._transport(states, extras.state_costs, extras.state_potential, its, rows, columns),
        )

    def _transport(
        self, costs: Sequence[Tensor], how: Costs, potential: Potential, tokens: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        mu, nu = uniform_marginal(rows), uniform_marginal(columns)
        scaled, count = how.scaled(costs, mu, nu), columns.sum(dim=1)
        cost = (how.weights[:, None, None, None] * scaled).sum(dim=0)
        epsilon = relative_epsilon(cost, mu, nu, self.share)
        if self.solver == "sinkhorn":
            return (transport_loss(cost, sinkhorn(cost, mu, nu, epsilon, self.sweeps)) * count).sum()
        each = epsilon.expand(len(costs), -1)
        phi = potential(tokens.detach(), rows)
        bound = semi_dual(phi.detach(), scaled, mu, nu, each, how.weights)
        # The potential climbs while the models descend: its gradient is turned round, and the value stays the bound's.
        climbing = semi_dual(phi, scaled.detach(), mu, nu, each, how.weights.detach())
        return ((bound + climbing.detach() - climbing) * count).sum()


def _places(ids: Ids) -> Tensor:
    """Spans (n, 2) of tokens that are a byte each: where both sides have the same tokens, all that is asked of them."""
    start = torch.arange(len(ids), device=ids.offsets.device) - ids.offsets[:-1].repeat_interleave(ids.offsets.diff())
    return torch.stack([start, start + 1], dim=1)
