"""Cloud of block retraining: it plans the windows of edges, and merges what helped into the next version."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raycloud.errors import ModelError
from raycloud.models.weights import Weights, nbytes
from raycloud.retrain.best_plan import best_plan
from raycloud.retrain.domains import DomainMemory, StoredDomain, agreement
from raycloud.retrain.drift import DomainSignature
from raycloud.retrain.edge import MOST_CANDIDATES, DriftReport, WindowPlan
from raycloud.retrain.law import Law
from raycloud.retrain.law_prior import Prior, SimulatedDrift, fit_prior, mean_misses
from raycloud.retrain.plans import Plan, Terms, empty_plan
from raycloud.retrain.update import BlockUpdate
from raycloud.rounds.aggregators import coverage_mean
from raycloud.rounds.contribution import Contribution, form_of
from raycloud.rounds.machine import ClosedRound, Refusal, RoundMachine

MOST_STEPS = 400
"""Largest number of steps of a window."""


@dataclass(frozen=True)
class PlanPrior:
    """Knowledge of plans from simulated drifts, all within the budget of the windows to come."""

    prior: Prior
    misses: Mapping[tuple[int, ...], float]
    """Mean of measured less predicted errors, by set of blocks."""

    @staticmethod
    def of(drifts: Sequence[SimulatedDrift]) -> PlanPrior:
        """Prior of simulated drifts.

        Raises:
            TrainingError: there is none with an error before training.
        """
        prior = fit_prior(drifts, gradients=False)
        return PlanPrior(prior, mean_misses(prior.typical_law, drifts))


class RetrainCloud:
    """Cloud's weights and their versions.

    Args:
        weights: parameters that edges may retrain, by name.
        fingerprint: fingerprint of the model's configuration.
        blocks: paths of the model's blocks.
        prior: what simulated drifts tell of plans; None prefers no block.
        memory: domains that were met before; their changes are those against ``source``.
        source: weights of the source model, which is version 0, by name; None for ``weights``.
        version: version of the weights.
        least_gain: least predicted fall of the error for which a window is retrained.
    """

    def __init__(
        self,
        weights: Weights,
        fingerprint: str,
        blocks: Sequence[str],
        prior: PlanPrior | None,
        memory: DomainMemory,
        *,
        source: Weights | None = None,
        version: int = 0,
        least_gain: float = 0.0,
    ) -> None:
        self._machine = RoundMachine(weights, version=version)
        self.fingerprint, self._blocks, self._prior, self._memory = fingerprint, list(blocks), prior, memory
        self._least_gain, self._changed = least_gain, dict.fromkeys(weights, version)
        self._source = dict(weights if source is None else source)
        self._edges: dict[str, _EdgeState] = {}
        self._sent: dict[str, tuple[dict[str, Tensor], ...]] = {}
        """Candidates of the plan that each edge got last."""
        self._updates: dict[str, tuple[BlockUpdate, DomainSignature]] = {}

    @property
    def version(self) -> int:
        """Version of the weights."""
        return self._machine.version

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights of the version."""
        return self._machine.weights

    @property
    def samples(self) -> int:
        """Number of samples of the updates that the open round has accepted."""
        return sum(update.samples for update, _ in self._updates.values())

    @property
    def domains(self) -> list[StoredDomain]:
        """Domains that were met."""
        return self._memory.domains

    def changed_since(self, version: int) -> dict[str, Tensor]:
        """Weights that changed after a version."""
        return {name: one for name, one in self.weights.items() if self._changed[name] > version}

    def plan(self, report: DriftReport) -> WindowPlan:
        """Plan a window: the best blocks and number of steps within the edge's budget."""
        chosen = self._best_plan(report)
        if chosen.predicted_error is not None and report.error - chosen.predicted_error < self._least_gain:
            chosen = empty_plan(
                report.cost, None, Terms(batch=report.batch, samples=report.samples, spent=report.estimated)
            )
        candidates, left = [], report.budget.bytes - chosen.cost.bytes
        for deltas in self._recalled(report):
            left -= nbytes(deltas)
            if left >= 0:
                candidates.append(deltas)
        self._sent[report.edge] = tuple(candidates)
        return WindowPlan(chosen.trained, chosen.steps, chosen.predicted_error, chosen.cost, tuple(candidates))

    def _recalled(self, report: DriftReport) -> Iterator[dict[str, Tensor]]:
        """Changes that turn an edge's weights, if they are known, into those that fitted domains like its own."""
        own = self._own_weights(report)
        if own is None:
            return
        for known in self._memory.nearest(report.signature, MOST_CANDIDATES):
            found = {}
            for name in {*known.deltas, *own.changed(self._source)}:
                delta, wanted = known.deltas.get(name), self._source[name]
                wanted = wanted if delta is None else wanted + delta
                if not torch.equal(wanted, own.weights[name]):
                    found[name] = wanted - own.weights[name]
            if found:
                yield found

    def _own_weights(self, report: DriftReport) -> _EdgeState | None:
        """Weights of an edge, if all changes that it has made since its version are known."""
        state = self._edges.get(report.edge)
        if state is None or (state.version, state.updates) != (report.version, report.local_updates):
            known = {0: self._source, self.version: self.weights}.get(report.version)
            if known is None or report.local_updates:
                return None
            state = self._edges[report.edge] = _EdgeState(report.version, 0, known)
        return state

    def _best_plan(self, report: DriftReport) -> Plan:
        prior, terms = self._prior, Terms(batch=report.batch, samples=report.samples, spent=report.estimated)
        if prior is None:
            law = Law.neutral(report.start_error, len(report.gains), MOST_STEPS / 4, report.samples)
            return best_plan(report.cost, report.plannable, law, {}, most_steps=MOST_STEPS, least_gain=0.0, **terms)
        law = prior.prior.typical_law(report.start_error)
        return best_plan(report.cost, report.plannable, law, prior.misses, most_steps=MOST_STEPS, **terms)

    def settle(self, edge: str, recalled: int | None) -> None:
        """Take note of which candidate of its plan an edge has taken, before its update is accepted."""
        candidates, state = self._sent.pop(edge, ()), self._edges.get(edge)
        if recalled is None or state is None:
            return
        if recalled < len(candidates):
            self._edges[edge] = state.after(candidates[recalled])
        else:  # a device may tell anything
            del self._edges[edge]

    def open(self, edges: Iterable[str], deadline: float, quorum: int = 1, number: int | None = None) -> int:
        """Open a round for edges, and return its number: the one given, or the next one."""
        number = self._machine.ended + 1 if number is None else number
        form = form_of(self._machine.weights)
        self._machine.open(number, edges, deadline=deadline, quorum=quorum, form=form, partial=True)
        self._updates = {}
        return number

    def accept(self, edge: str, number: int, update: BlockUpdate, signature: DomainSignature) -> Refusal | None:
        """Accept an edge's update of a round, or return why it is refused.

        An update of an older version counts less, and its changes are added to the current weights.
        """
        if update.model != self.fingerprint:
            return Refusal("different_tensors", f"the update is for the model '{update.model}'")
        age = self.version - update.version
        if age < 0:
            return Refusal("wrong_round", f"the update is for version {update.version}, and {self.version} is current")
        try:
            contribution = update.contribution(self.weights)
        except ModelError as error:
            return Refusal("different_tensors", str(error))
        samples = max(1, round(contribution.samples / (1 + age)))
        refused = self._machine.accept(edge, number, replace(contribution, samples=samples))
        state = self._edges.pop(edge, None)
        if refused is None:
            self._updates[edge] = update, signature
            if state is not None and state.version == update.version and not update.index:
                self._edges[edge] = state.after(update.deltas)
        return refused

    def remove(self, edge: str) -> None:
        """Stop waiting for an edge in the open round."""
        self._machine.remove(edge)

    def close(self, now: float) -> ClosedRound | None:
        """Merge the updates of the open round if nobody is awaited or its deadline has passed.

        Blocks that two edges pull apart are not merged: each keeps its changes with its domain.
        """
        former = self.weights
        closed = self._machine.close(now, lambda contributions: self._merged(contributions, former))
        if closed is not None:
            for edge, (_, signature) in self._updates.items():
                if (state := self._edges.get(edge)) is not None:
                    changed = state.changed(self._source)
                    deltas = {name: state.weights[name] - self._source[name] for name in changed}
                    self._memory.store(signature, deltas)
            self._updates = {}
            for name, tensor in self.weights.items():
                if tensor is not former.get(name):
                    self._changed[name] = self.version
        return closed

    def _merged(self, contributions: Sequence[Contribution], former: Weights) -> dict[str, Tensor]:
        apart = tuple(f"{path}." for path in self._blocks if self._disagree(f"{path}.", former))
        kept = [
            replace(one, weights={name: tensor for name, tensor in one.weights.items() if not name.startswith(apart)})
            for one in contributions
        ]
        return coverage_mean(kept, former)

    def _disagree(self, prefix: str, former: Weights) -> bool:
        shapes = {name: tensor.shape for name, tensor in former.items()}
        updates = [update for update, _ in self._updates.values()]
        found = (
            agreement(one, other, shapes, prefix)
            for number, one in enumerate(updates)
            for other in updates[number + 1 :]
        )
        return any(cosine is not None and cosine < 0 for cosine in found)


@dataclass(frozen=True)
class _EdgeState:
    """Weights of an edge: those of a version, with the edge's own updates since then."""

    version: int
    updates: int
    weights: Weights

    def after(self, deltas: Weights) -> _EdgeState:
        """State after changes of the edge."""
        added = {name: self.weights[name] + delta for name, delta in deltas.items()}
        return _EdgeState(self.version, self.updates + 1, {**self.weights, **added})

    def changed(self, source: Weights) -> list[str]:
        """Names of the parameters that differ from the source's."""
        return [name for name, one in self.weights.items() if not torch.equal(one, source[name])]


def retrainable(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy of the floating-point parameters that edges may retrain."""
    return {name: tensor.detach().clone() for name, tensor in weights.items() if tensor.is_floating_point()}
