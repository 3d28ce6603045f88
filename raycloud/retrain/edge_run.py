"""Windows of an edge in a job: it takes the cloud's weights, serves, and retrains where the cloud's plan says so.

It runs alike in an actor of the cluster and on a device without Ray: :class:`CloudOfEdge` is what lies between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from raycloud.models.loading import pick_device
from raycloud.retrain.alarms import DriftAlarm
from raycloud.retrain.deployment import Deployment
from raycloud.retrain.domain_data import window_samples
from raycloud.retrain.drift import DomainSignature
from raycloud.retrain.edge import DriftReport, Observation, RetrainEdge, WindowOutcome, WindowPlan
from raycloud.retrain.recipe import RetrainEdgeRecipe, RetrainRecipe
from raycloud.retrain.samples import IGNORE, Samples
from raycloud.retrain.source import Notify, new_model, source_parts
from raycloud.retrain.tasks import TASKS
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.update import BlockUpdate
from raycloud.training.seeding import derive_seed

_LOG = logging.getLogger(__name__)
Record = dict[str, Any]
"""Record of a window, for ``metrics.jsonl``."""


class CloudOfEdge(Protocol):
    """The cloud as an edge sees it."""

    def deployment(self, version: int | None) -> Deployment:
        """Return the current state, with the weights that changed since a version; None for all weights."""
        ...

    def plan(self, report: DriftReport) -> WindowPlan:
        """Return the plan of a window."""
        ...


@dataclass(frozen=True)
class EdgeWindow:
    """Result of a window of an edge."""

    record: Record
    update: BlockUpdate | None
    """Changes for the cloud; None if there are none."""
    signature: DomainSignature | None
    """Signature as the cloud may see it; None without an alarm."""


class EdgeRun:
    """Edge of a job.

    Args:
        recipe: recipe of the job.
        edge: the edge in it.
        cloud: the cloud.
        notify: called with one line about what happens.
        source: data of the edge; None for those that the recipe names.
    """

    def __init__(
        self,
        recipe: RetrainRecipe,
        edge: RetrainEdgeRecipe,
        cloud: CloudOfEdge,
        notify: Notify = lambda line: None,
        source: str | None = None,
    ) -> None:
        self._recipe, self._edge, self._cloud, self._notify = recipe, edge, cloud, notify
        parts = source_parts(recipe, source or edge.source, notify)
        self._data = parts.data
        state = cloud.deployment(None)
        task = TASKS[recipe.task]
        labelled = recipe.supervision == "labels"
        drift = recipe.drift
        alarm = DriftAlarm(drift.radius, drift.cool_down, drift.every, usual=state.usual if labelled else None)
        model = new_model(parts).to(pick_device(recipe.device))  # type: ignore[arg-type]
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
            replayed=state.replayed,
            share_means=recipe.statistics == "means",
            judged=drift.window,
        )
        self._run.load(state.weights, state.version)
        self._answered: Samples | None = None

    @property
    def model(self) -> PreTrainedModel:
        """Model of the edge."""
        return self._run.model

    @property
    def version(self) -> int:
        """Version of the cloud's weights that the edge has."""
        return self._run.version

    @property
    def samples(self) -> int:
        """Number of samples of a window."""
        return self._recipe.samples

    def window(self, number: int, on_step: Callable[[int], None] = lambda step: None) -> EdgeWindow:
        """Serve a window of the stream; retrain on an alarm, as the cloud plans.

        Args:
            number: number of the window, from 0.
            on_step: called with the number of steps done.

        Raises:
            DataError: the domain has too few samples.
            TrainingError: gradients stayed non-finite.
        """
        begun = time.monotonic()
        self.adopt()  # an edge that was away has missed rounds
        domain = self._edge.windows[number]
        samples = self._window_samples(number)
        test = self._test(domain)
        record: Record = {"kind": "window", "edge": self._edge.name, "window": number, "domain": domain}
        record |= {"version": self.version, "test_before": self._error(test)}
        seen = self._run.observe(samples)
        record |= {"score": seen.verdict.score, "drifted": seen.verdict.drifted, "cause": seen.cause}
        record |= {"error": seen.error}
        if seen.cause is None:
            self._answered = None
            record |= {"test_after": record["test_before"], "seconds": time.monotonic() - begun}
            return EdgeWindow(record, None, None)
        report = self._run.report(samples, seen)
        plan = self._cloud.plan(report)
        mode = self._recipe.mode
        outcome = None
        if mode != "suggest":
            seed = derive_seed("retrain", self._recipe.seed, self._edge.name, number)
            outcome = self._run.retrain(samples, report, plan, seed, keep=mode == "retrain")
        self._answered = samples
        record |= _told(seen, report, plan, outcome)
        record |= {"test_after": self._error(test), "seconds": time.monotonic() - begun}
        update = None if outcome is None else outcome.update
        return EdgeWindow(record, update, report.signature)

    def adopt(self) -> bool:
        """Take the cloud's current version; True if it is a newer one. Then the last alarm's domain is signed anew."""
        state = self._cloud.deployment(self.version)
        newer = state.version > self.version
        if newer:
            self._run.load(state.weights, state.version, state.detector)
        if self._answered is not None:
            self._run.answer(self._answered)
            self._answered = None
        return newer

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

    def _test(self, domain: str) -> Samples:
        found = self._data.samples(domain, "test")
        return found.select(slice(0, self._recipe.test_samples)).to(self.model.device)

    def _error(self, samples: Samples) -> float:
        return mean_error(self.model, samples, TASKS[self._recipe.task].error)


def _told(seen: Observation, report: DriftReport, plan: WindowPlan, outcome: WindowOutcome | None) -> Record:
    """Facts of an answered alarm for the record."""
    budget = report.budget
    told: Record = {
        "gains": [[one.magnitude, one.snr] for one in report.gains],
        "blocks": len(report.gains),
        "trained": list(plan.trained),
        "steps": plan.steps,
        "head_steps": report.head_steps if plan.steps else 0,
        "predicted_error": plan.predicted_error,
        "planned": {"flops": plan.cost.flops, "memory": plan.cost.memory, "bytes": plan.cost.bytes},
        "budget": {"flops": budget.flops, "memory": budget.memory, "bytes": budget.bytes},
    }
    if outcome is not None:
        cost, result = outcome.cost, outcome.result
        told |= {
            "recalled": outcome.recalled,
            "helped": result is not None and result.helped,
            "held_out_before": None if result is None else result.before,
            "held_out_after": None if result is None else result.after,
            "paid": {"flops": cost.flops, "memory": cost.memory, "bytes": cost.bytes},
            "over_budget": not cost.within(budget),
        }
    return told
