"""Cloud of block retraining: it plans the windows of edges, and merges what helped into the next version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from raycloud.errors import ModelError
from raycloud.models.weights import Weights
from raycloud.retrain.domains import DomainMemory, StoredDomain, agreement
from raycloud.retrain.drift import DomainSignature
from raycloud.retrain.edge import DriftReport, WindowPlan
from raycloud.retrain.law import Law
from raycloud.retrain.law_prior import Prior
from raycloud.retrain.planner import plan
from raycloud.retrain.plans import Plan, Terms, empty_plan, steps_grid
from raycloud.retrain.update import BlockUpdate
from raycloud.rounds.aggregators import coverage_mean
from raycloud.rounds.contribution import Contribution, form_of
from raycloud.rounds.machine import ClosedRound, Refusal, RoundMachine

MOST_STEPS = 400
"""Largest number of steps of a window."""


class RetrainCloud:
    """Cloud's weights and their versions.

    Args:
        weights: parameters that edges may retrain, by name.
        fingerprint: fingerprint of the model's configuration.
        blocks: paths of the model's blocks.
        prior: what simulated drifts tell of gains; None prefers no block.
        memory: domains that were met before.
        version: version of the weights.
        least_gain: least predicted fall of the error for which a window is retrained.
    """

    def __init__(
        self,
        weights: Weights,
        fingerprint: str,
        blocks: Sequence[str],
        prior: Prior | None,
        memory: DomainMemory,
        *,
        version: int = 0,
        least_gain: float = 0.0,
    ) -> None:
        self._machine = RoundMachine(weights, version=version)
        self.fingerprint, self._blocks, self._prior, self._memory = fingerprint, list(blocks), prior, memory
        self._least_gain, self._changed = least_gain, dict.fromkeys(weights, version)
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
        if chosen.predicted_error is not None and report.start_error - chosen.predicted_error < self._least_gain:
            chosen = empty_plan(
                report.cost, None, Terms(batch=report.batch, samples=report.samples, spent=report.spent)
            )
        known = self._memory.find(report.signature)
        deltas = {} if known is None else known.deltas
        return WindowPlan(chosen.trained, chosen.steps, chosen.predicted_error, chosen.cost, deltas)

    def _best_plan(self, report: DriftReport) -> Plan:
        terms = Terms(batch=report.batch, samples=report.samples, spent=report.spent)
        grid = steps_grid(report.cost, report.budget, most=MOST_STEPS, **terms)
        law = self._law(report)
        return plan(
            report.cost,
            report.budget,
            law,
            steps_grid=grid,
            batch=report.batch,
            samples=report.samples,
            spent=report.spent,
            stretch=True,
        )

    def _law(self, report: DriftReport) -> Law:
        if self._prior is None:
            return Law.neutral(report.start_error, len(report.gains), MOST_STEPS / 4, report.samples)
        magnitudes, ratios = [one.magnitude for one in report.gains], [one.snr for one in report.gains]
        return self._prior.law(magnitudes, ratios, report.start_error)

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
        if refused is None:
            self._updates[edge] = update, signature
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
            for update, signature in self._updates.values():
                self._memory.store(signature, update.deltas)
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


def retrainable(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy of the floating-point parameters that edges may retrain."""
    return {name: tensor.detach().clone() for name, tensor in weights.items() if tensor.is_floating_point()}
