"""Actor of an edge whose model is retrained block by block."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import threads_per_actor
from raycloud.errors import ClusterError, RaycloudError
from raycloud.models.threads import torch_threads
from raycloud.retrain.deployment import Deployment
from raycloud.retrain.drift import DomainSignature
from raycloud.retrain.edge import DriftReport, WindowPlan
from raycloud.retrain.edge_run import EdgeRun, Record
from raycloud.retrain.recipe import RetrainRecipe
from raycloud.retrain.update import BlockUpdate

_LOG = logging.getLogger(__name__)
_ANSWER_S = 600.0
"""Timeout in seconds of one call of the cloud's actor."""


@dataclass(frozen=True)
class NodeWindow:
    """Result of a window, for the driver."""

    record: Record
    update: BlockUpdate | None
    """Changes for the cloud; None if there are none."""
    signature: DomainSignature | None
    """Signature of the domain as the cloud may see it; None without an alarm."""


class CloudActor:
    """The cloud's actor as an edge calls it; it is looked up by name, for a handle would tie restarts to it.

    Args:
        name: name of the actor.
        namespace: its namespace.
    """

    def __init__(self, name: str, namespace: str) -> None:
        self._name, self._namespace = name, namespace

    def deployment(self, version: int | None, changed: Iterable[str] = ()) -> Deployment:
        """Ask for the current state; see :meth:`CloudRun.deployment`."""
        found: Deployment = self._ask("deployment", version, list(changed))
        return found

    def plan(self, report: DriftReport) -> WindowPlan:
        """Ask for the plan of a window."""
        found: WindowPlan = self._ask("plan", report)
        return found

    def settle(self, edge: str, recalled: int | None) -> None:
        """Tell which candidate of its plan an edge has taken."""
        self._ask("settle", edge, recalled)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            actor = ray.get_actor(self._name, namespace=self._namespace)
            return ray.get(getattr(actor, method).remote(*arguments), timeout=_ANSWER_S)
        except RayTaskError as error:
            if isinstance(error.cause, RaycloudError):
                raise error.cause from None
            raise
        except (RayError, ValueError) as error:
            raise ClusterError(f"the cloud's model does not answer: {str(error).splitlines()[0]}") from None


class EdgeNode:
    """Actor with the resource ``edge``. It loses its state with its process, and begins again with the cloud's version.

    Args:
        index: index of its edge in the recipe's ``edges``.
        recipe: recipe of the job.
        cloud: name of the cloud's actor.
        namespace: namespace of the cloud's actor.
        log: log of the run; None for none.
    """

    def __init__(
        self, index: int, recipe: RetrainRecipe, cloud: str, namespace: str, log: RunLog | None = None
    ) -> None:
        if log is not None:
            log.attach()
        self._recipe, self._edge = recipe, recipe.edges[index]
        self._cloud = CloudActor(cloud, namespace)

    def ping(self) -> None:
        """Return at once: the process is there."""

    def window(self, number: int) -> NodeWindow:
        """Serve a window, and retrain where the cloud plans it.

        Args:
            number: number of the window, from 0.

        Raises:
            RaycloudError: the edge's data cannot be used, or its training failed.
        """
        with torch_threads(self._threads):
            run = self._run
            seen = run.observe(number, self._cloud.deployment(run.version, run.changed))
            if seen.report is None:
                return NodeWindow(seen.record, None, None)
            done = run.retrain(self._cloud.plan(seen.report))
            self._cloud.settle(self._edge.name, done.recalled)
            return NodeWindow(seen.record | done.record, done.update, seen.report.signature)

    def adopt(self, domain: str) -> tuple[int, float]:
        """Take the cloud's current version; return it, and the error on the test of a domain.

        Args:
            domain: domain of the last window.
        """
        with torch_threads(self._threads):
            self._run.adopt(self._cloud.deployment(self._run.version, self._run.changed))
            return self._run.version, self._run.test_error(domain)

    @property
    def _threads(self) -> int:
        actors = len(self._recipe.edges) - len(self._recipe.devices)
        return threads_per_actor(self._recipe.threads, "edge", actors)

    @cached_property
    def _run(self) -> EdgeRun:
        run = EdgeRun(self._recipe, self._edge, self._cloud.deployment(None), partial(_LOG.info, "%s"))
        _LOG.info("ready at version %d, process %d", run.version, os.getpid())
        return run
