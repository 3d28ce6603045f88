"""Actor with the cloud's model of block retraining, for edges of the same cluster and for devices over the link."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Coroutine, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from raycloud.cluster.actor_channel import ActorService
from raycloud.cluster.device_rounds import FAREWELL_S, DeviceCall
from raycloud.cluster.edge_node import NodeWindow
from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import threads_per_actor
from raycloud.models.threads import torch_threads
from raycloud.models.weights import Weights
from raycloud.retrain.cloud_run import CloudFacts, CloudRun
from raycloud.retrain.deployment import Deployment
from raycloud.retrain.drift import DomainSignature
from raycloud.retrain.edge import DriftReport, WindowPlan
from raycloud.retrain.messages import ObservedMessage, RetrainedMessage, plan_tensors, present
from raycloud.retrain.recipe import RetrainRecipe
from raycloud.retrain.update import BlockUpdate
from raycloud.rounds.machine import ClosedRound, Refusal
from raycloud.rounds.service import DeviceGone, DeviceUpdate, RoundServer

_LOG = logging.getLogger(__name__)
_POLL_S = 2.0

T = TypeVar("T")


class CloudModel(ActorService):
    """Actor with the resource ``cloud``. It loses its state with its process and continues with the version on disk.

    Make it an actor with ``max_concurrency=CALLS_AT_ONCE`` or more: every waiting call occupies a thread.

    Args:
        recipe: recipe of the job.
        folder: result directory; shared by all nodes if the actor may be restarted.
        run: id of the run, which devices keep their state under.
        log: log of the run; None for none.
    """

    def __init__(self, recipe: RetrainRecipe, folder: Path, run: str, log: RunLog | None = None) -> None:
        if log is not None:
            log.attach()
        self._recipe, self._folder, self._run_id = recipe, folder, run
        self._turn = threading.Lock()
        self._news = ""
        self._attempts = itertools.count(1)
        self._newest: dict[str, int] = {}
        """Latest window that each device was asked for."""
        self._device_weights: dict[tuple[str, str], tuple[int | None, frozenset[str]]] = {}
        """Version that each device's process has, and parameters that it has changed; a new one gets all weights."""
        # No method of this class may be a coroutine: Ray would run all of them on one event loop, one at a time.
        super().__init__(lambda connection, principal, service: self._rounds.serve(connection, principal))

    def prepare(self) -> CloudFacts:
        """Load or train the source model, or load the newest version; return its facts.

        Raises:
            RaycloudError: the model or the data of its source domain cannot be used.
        """
        with self._turn:
            facts = self._run.facts()
        if self._recipe.devices:
            _ = self._rounds
        return facts

    def news(self) -> str:
        """Return what was done last while the model is prepared."""
        return self._news

    def deployment(self, version: int | None, changed: Sequence[str] = ()) -> Deployment:
        """Return the current state for an edge; see :meth:`CloudRun.deployment`."""
        with self._turn:
            return self._run.deployment(version, changed)

    def plan(self, report: DriftReport) -> WindowPlan:
        """Plan a window of an edge."""
        with self._turn:
            return self._run.plan(report)

    def open_round(self, number: int, edges: Sequence[str]) -> None:
        """Open a round for edges."""
        with self._turn:
            self._run.open(number, edges)

    def accept(self, edge: str, number: int, update: BlockUpdate, signature: DomainSignature) -> Refusal | None:
        """Accept an edge's update of a round, or return why it is refused."""
        with self._turn:
            return self._run.accept(edge, number, update, signature)

    def settle(self, edge: str, recalled: int | None) -> None:
        """Take note of which candidate of its plan an edge has taken, before its update is accepted."""
        with self._turn:
            self._run.settle(edge, recalled)

    def remove(self, edge: str) -> None:
        """Stop waiting for an edge in the open round."""
        with self._turn:
            self._run.remove(edge)

    def close_round(self) -> tuple[ClosedRound, float] | None:
        """Merge the round if nobody is awaited; return it with the error of the source domain, None if it goes on."""
        with self._turn, torch_threads(self._threads):
            return self._run.close()

    def save(self) -> None:
        """Write the model of the current version."""
        with self._turn:
            self._run.save()

    # -- for devices

    def device_window(self, name: str, number: int) -> NodeWindow:
        """Wait for a device, have it serve a window, and retrain where it is planned.

        Raises:
            DeviceGone: the device goes.
            TrainingError: the device says that its training failed.
        """
        self._newest[name] = number
        self._await(name, number)
        process = self._rounds.process(name)
        version, changed = self._device_weights.get((name, process), (None, frozenset[str]()))
        seen = self._exchange(name, 2 * number, self.deployment(version, sorted(changed)).tensors())
        assert isinstance(seen.report, ObservedMessage)
        if seen.report.record.version != version:
            changed = frozenset()
        self._device_weights[name, process] = seen.report.record.version, changed
        record = present(seen.report.record) | {"edge": name, "window": number}
        if seen.report.report is None:
            return NodeWindow(record, None, None)
        report = seen.report.report.report(name)
        plan = self.plan(report)
        done = self._exchange(name, 2 * number + 1, plan_tensors(plan))
        assert isinstance(done.report, RetrainedMessage)
        told = done.report
        self.settle(name, told.recalled)
        if told.record.recalled or told.record.helped:
            changed |= {*done.weights, *(key for one in plan.candidates for key in one)}
            self._device_weights[name, process] = seen.report.record.version, changed
        update = None
        if done.weights:
            update = BlockUpdate(told.fingerprint, told.version, report.samples, done.weights)
        return NodeWindow(record | present(told.record), update, report.signature)

    def device_adopts(self, name: str, domain: str) -> tuple[int, float] | None:
        """Return None: a device takes the version with its next window."""
        return None

    def finish(self) -> None:
        """Tell the devices that there is nothing more to do, with the weights of the last version."""
        if self._recipe.devices:
            state = self.deployment(None).tensors()
            self._do(self._rounds.finish({edge.name: state for edge in self._recipe.devices}, FAREWELL_S))

    def _await(self, name: str, number: int) -> None:
        """Wait until a device is there, or is asked for a later window; each wait occupies a thread."""
        while True:
            try:
                self._do(asyncio.wait_for(self._rounds.prepare(name), _POLL_S))
            except TimeoutError:
                if self._newest[name] == number:
                    continue
            if self._newest[name] != number:
                raise DeviceGone(f"the device '{name}' was asked for something newer")
            return

    def _exchange(self, name: str, number: int, tensors: Weights) -> DeviceUpdate:
        found = self._do(self._rounds.train(name, next(self._attempts), number, tensors, any_form=True))
        if found is None:
            raise DeviceGone(f"the device '{name}' was asked for something newer")
        expected = RetrainedMessage if number % 2 else ObservedMessage
        if not isinstance(found.report, expected):
            raise DeviceGone(f"the device '{name}' answered something else")
        return found

    def _do(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._service.loop).result()

    @cached_property
    def _rounds(self) -> RoundServer:
        with self._turn:
            members = self._run.device_members(self._run_id)
        _LOG.info("devices may take part as %s", ", ".join(members))
        return RoundServer(members)

    @property
    def _threads(self) -> int:
        return threads_per_actor(self._recipe.threads, "cloud", 1)

    @cached_property
    def _run(self) -> CloudRun:
        with torch_threads(self._threads):
            return CloudRun(self._recipe, self._folder, self._notify)

    def _notify(self, line: str) -> None:
        self._news = line
        _LOG.info("%s", line)


class DeviceNode:
    """Handle of a device with the methods that the handle of :class:`~raycloud.cluster.edge_node.EdgeNode` has.

    Args:
        actor: handle of :class:`CloudModel`.
        name: name of the device's edge.
    """

    def __init__(self, actor: Any, name: str) -> None:
        self.window, self.adopt = DeviceCall(actor.device_window, name), DeviceCall(actor.device_adopts, name)
