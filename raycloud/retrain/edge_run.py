"""Windows of an edge in a job: it takes the cloud's weights, serves, and retrains where the cloud's plan says so.

It runs alike in an actor of the cluster and on a device without Ray. A window has two parts, between which the cloud
plans: :meth:`EdgeRun.observe` and :meth:`EdgeRun.retrain`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from raycloud.models.loading import pick_device
from raycloud.retrain.alarms import DriftAlarm
from raycloud.retrain.deployment import Deployment
from raycloud.retrain.domain_data import window_samples
from raycloud.retrain.edge import DriftReport, RetrainEdge, WindowOutcome, WindowPlan
from raycloud.retrain.recipe import RetrainEdgeRecipe, RetrainRecipe
from raycloud.retrain.samples import IGNORE, Samples
from raycloud.retrain.source import Notify, new_model, source_parts
from raycloud.retrain.tasks import TASKS
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.update import BlockUpdate
from raycloud.training.seeding import derive_seed

Record = dict[str, Any]
"""Record of a window, for ``metrics.jsonl``."""


@dataclass(frozen=True)
class EdgeWindow:
    """Result of a window that the cloud planned."""

    record: Record
    update: BlockUpdate | None
    """Changes for the cloud; None if there are none."""
    recalled: int | None
    """Number of the plan's candidate that the edge has taken; None for none."""


@dataclass(frozen=True)
class Observed:
    """Result of serving a window."""

    record: Record
    report: DriftReport | None
    """Report to the cloud; None without an alarm."""


@dataclass(frozen=True)
class _Alarmed:
    """Window that awaits a plan."""

    number: int
    samples: Samples
    report: DriftReport


class EdgeRun:
    """Edge of a job.

    Args:
        recipe: recipe of the job.
        edge: the edge in it.
        state: current state of the cloud, with all weights.
        notify: called with one line about what happens.
        source: data of the edge; None for those that the recipe names.
    """

    def __init__(
        self,
        recipe: RetrainRecipe,
        edge: RetrainEdgeRecipe,
        state: Deployment,
        notify: Notify = lambda line: None,
        source: str | None = None,
    ) -> None:
        self._recipe, self._edge = recipe, edge
        parts = source_parts(recipe, source or edge.source, notify)
        self._data = parts.data
        task = TASKS[recipe.task]
        labelled = recipe.supervision == "labels"
        drift = recipe.drift
        alarm = DriftAlarm(drift.radius, drift.cool_down, drift.every, usual=state.usual if labelled else None)
        device = pick_device(recipe.device)
        model = new_model(parts).to(device)  # type: ignore[arg-type]
        self._run = RetrainEdge(
            edge.name,
            model,
            state.fingerprint,
            task,
            state.detector,
            alarm,
            recipe.budget,
            recipe.training,
            supervision=recipe.supervision,
            replayed=None if state.replayed is None else state.replayed.to(device),
            share_means=recipe.statistics == "means",
            judged=drift.window,
        )
        self._run.load(state.weights, state.version)
        self._current: _Alarmed | None = None
        self._window: Samples | None = None
        """Samples of the last window until the round ends."""
        self._answered = False

    @property
    def model(self) -> PreTrainedModel:
        """Model of the edge."""
        return self._run.model

    @property
    def version(self) -> int:
        """Version of the cloud's weights that the edge has."""
        return self._run.version

    @property
    def updates(self) -> int:
        """Number of changes that the edge has made itself since its version."""
        return len(self._run.changes)

    @property
    def changed(self) -> frozenset[str]:
        """Names of the parameters that the edge has changed itself since its version."""
        return frozenset().union(*self._run.changes)

    def observe(self, number: int, state: Deployment) -> Observed:
        """Serve a window of the stream, and report to the cloud if it raises an alarm.

        Args:
            number: number of the window, from 0.
            state: current state of the cloud, with what changed since the edge's version.

        Raises:
            DataError: the domain has too few samples.
            TrainingError: a gradient is not finite.
        """
        begun = time.monotonic()
        domain = self._edge.windows[number]
        samples = self._window_samples(number)
        record: Record = {"kind": "window", "edge": self._edge.name, "window": number, "domain": domain}
        record |= {"version": self.version, "test_before": self.test_error(domain)}
        self._current, self._window = None, samples
        seen = self._run.observe(samples)
        record |= {"score": seen.verdict.score, "drifted": seen.verdict.drifted, "cause": seen.cause}
        record |= {"error": seen.error, "test_after": record["test_before"]}
        if seen.cause is None:
            return Observed(record | {"seconds": time.monotonic() - begun}, None)
        # Others may have met the domain before, so that the cloud's version is the better start.
        if self._consider(state):
            seen = replace(seen, error=self._run.error(samples))
            record |= {"version": self.version, "error": seen.error}
        report = self._run.report(samples, seen, self._seed(number))
        self._current = _Alarmed(number, samples, report)
        return Observed(record | _reported(report) | {"seconds": time.monotonic() - begun}, report)

    def retrain(self, plan: WindowPlan) -> EdgeWindow:
        """Retrain as the cloud plans the window that was observed last.

        Raises:
            TrainingError: gradients stayed non-finite.
        """
        begun, current = time.monotonic(), self._current
        if current is None:
            raise ValueError("no window awaits a plan")
        mode, outcome = self._recipe.mode, None
        if mode != "suggest":
            seed = self._seed(current.number)
            outcome = self._run.retrain(current.samples, current.report, plan, seed, keep=mode == "retrain")
        self._answered, self._current = True, None
        record = _planned(current.report, plan, outcome)
        record |= {"test_after": self.test_error(self._edge.windows[current.number])}
        record |= {"train_seconds": time.monotonic() - begun}
        if outcome is None or mode != "retrain":
            return EdgeWindow(record, None, None)
        return EdgeWindow(record, outcome.update, outcome.recalled)

    def adopt(self, state: Deployment) -> None:
        """End a window: take the cloud's version if it is as good in this domain; sign a domain that was answered."""
        if self._window is None:
            return
        self._consider(state)
        if self._answered:
            self._run.answer(self._window)
        self._answered, self._window = False, None

    def _consider(self, state: Deployment) -> bool:
        if state.version <= self.version or self._window is None:
            return False
        return self._run.consider(state.weights, state.version, state.detector, self._window)

    def test_error(self, domain: str) -> float:
        """Error of the edge's model on the test samples of a domain."""
        return self._error(self._test(domain))

    def _window_samples(self, number: int) -> Samples:
        windows, recipe = self._edge.windows, self._recipe
        before = windows[:number].count(windows[number])
        key = (recipe.seed, self._edge.name)
        found = window_samples(self._data, windows[number], before, recipe.samples, *key)
        if recipe.supervision == "none" and recipe.task != "language_modelling":
            found = Samples(found.inputs, torch.full_like(found.labels, IGNORE))  # labels are not even at hand
        return found.to(self.model.device)

    def _seed(self, number: int) -> int:
        return derive_seed("retrain", self._recipe.seed, self._edge.name, number)

    def _test(self, domain: str) -> Samples:
        found = self._data.samples(domain, "test")
        return found.at_most(self._recipe.test_samples).to(self.model.device)

    def _error(self, samples: Samples) -> float:
        return mean_error(self.model, samples, TASKS[self._recipe.task].error)


def _reported(report: DriftReport) -> Record:
    """Facts of an alarm for the record."""
    budget = report.budget
    return {
        "gains": [[one.magnitude, one.snr] for one in report.gains],
        "blocks": len(report.gains),
        "budget": {"flops": budget.flops, "memory": budget.memory, "bytes": budget.bytes},
    }


def _planned(report: DriftReport, plan: WindowPlan, outcome: WindowOutcome | None) -> Record:
    """Facts of an answered alarm for the record."""
    told: Record = {
        "trained": list(plan.trained),
        "steps": plan.steps,
        "head_steps": report.head_steps if plan.steps else 0,
        "predicted_error": plan.predicted_error,
        "planned": {"flops": plan.cost.flops, "memory": plan.cost.memory, "bytes": plan.cost.bytes},
    }
    if outcome is not None:
        cost, result = outcome.cost, outcome.result
        told |= {
            "recalled": outcome.recalled is not None,
            "helped": result is not None and result.helped,
            "held_out_before": None if result is None else result.before,
            "held_out_after": None if result is None else result.after,
            "paid": {"flops": cost.flops, "memory": cost.memory, "bytes": cost.bytes},
            "over_budget": not cost.within(report.budget),
        }
    return told
