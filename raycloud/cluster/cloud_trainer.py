"""Actor that trains the cloud part of a model with edges of the same cluster, and with devices over the link."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Awaitable, Coroutine
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from raycloud.cluster.actor_channel import ActorService
from raycloud.cluster.device_rounds import FAREWELL_S, DeviceCall
from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import threads_per_actor
from raycloud.link.channel import Connection
from raycloud.models.loading import load_config, resolve
from raycloud.rounds.service import DeviceGone, RoundServer
from raycloud.rounds.versions import VersionStore
from raycloud.split.finetune.assembly import plan_of
from raycloud.split.finetune.device_member import device_members
from raycloud.split.finetune.metrics_log import Record
from raycloud.split.finetune.phase_report import PHASES, PhaseReport
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.server import TuneLimits, TuneServer
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet

_LOG = logging.getLogger(__name__)
_PRINCIPAL = "cluster"
"""Principal of every session that trains: the edges of a job are one group, whether they are actors or devices. A
process that can call the actor is inside the cluster's trust domain; a device has shown a token."""

T = TypeVar("T")


class CloudTrainerActor(ActorService):
    """Actor with the resource ``cloud``. It loses its state with its process and recovers from its own disk.

    Make it an actor with ``max_concurrency=CALLS_AT_ONCE``: every waiting call occupies a thread.

    Args:
        recipe: recipe of the edges that will connect.
        folder: folder for checkpoints and the group's rounds; shared by all nodes if the actor may be restarted.
        history: history of the edges' group, on the same disk.
        run: id of the run, which devices keep their state under.
        log: log of the run; None for none.
    """

    def __init__(
        self, recipe: SplitTuneRecipe, folder: Path, history: VersionStore, run: str, log: RunLog | None = None
    ) -> None:
        if log is not None:
            log.attach()
        self._recipe, self._folder, self._history, self._run = recipe, folder, history, run
        self._attempts = itertools.count(1)
        self._newest: dict[str, int] = {}
        """Latest attempt to have a device run a phase."""
        self._reports: dict[str, list[PhaseReport]] = {edge.name: [] for edge in recipe.devices}
        # No method of this class may be a coroutine: Ray would run all of them on one event loop, one at a time.
        super().__init__(self._serve)

    def _serve(
        self, connection: Connection, principal: str = _PRINCIPAL, service: str = "split-tune"
    ) -> Awaitable[None]:
        if service == "rounds" and self._recipe.devices:
            return self._rounds.serve(connection, principal)
        return self._server.serve(connection, _PRINCIPAL)

    def ready(self) -> None:
        """Load the cloud part. A restarted actor loads it with the first edge that connects.

        Raises:
            RaycloudError: the part cannot be loaded here.
        """
        _ = self._server
        if self._recipe.devices:
            _ = self._rounds

    @cached_property
    def _server(self) -> TuneServer:
        recipe = self._recipe
        plans = PlanSet.of(plan_of(recipe, load_config(resolve(recipe.model))))
        part = load_cloud(recipe.model, plans, device=recipe.device, dtype="float32", training=True)
        threads = threads_per_actor(recipe.threads, "cloud", 1)
        server = TuneServer(part, self._folder, limits_for(recipe), threads=threads, history=self._history)
        _LOG.info("ready with blocks [%d, %d), process %d", part.middle.lo, part.middle.hi, os.getpid())
        return server

    @cached_property
    def _rounds(self) -> RoundServer:
        members = device_members(self._recipe, self._run)
        _LOG.info("devices may take part as %s", ", ".join(members))
        return RoundServer(members)

    def group(self, name: str) -> dict[str, Tensor]:
        """Return what the group shares after its latest round.

        Raises:
            TrainingError: no round has ended, or its file cannot be read.
        """
        return self._server.saved_group(name, _PRINCIPAL).shared

    # -- for devices

    def run_phase(self, name: str, what: str) -> Record:
        """Wait for a device, have it run one phase, and return its metrics.

        Raises:
            DeviceGone: the device goes.
        """
        attempt = self._newest[name] = next(self._attempts)
        self._do(self._rounds.prepare(name))
        update = None
        if attempt == self._newest[name]:  # the driver may have gone on without the device meanwhile
            update = self._do(self._rounds.train(name, attempt, PHASES.index(what), {}))
        if update is None:
            raise DeviceGone(f"the device '{name}' was asked for something newer")
        self._reports[name].append(update.report)
        return dict(update.report.found())

    def records(self, name: str, pid: int, since: int) -> tuple[int, list[Record]]:
        """Return this process's id and a device's records: all, or from index ``since`` on if ``pid`` is this process.

        Raises:
            DeviceGone: it is not there.
        """
        if not self._rounds.present(name):
            raise DeviceGone(f"the device '{name}' is not there")
        records = [record for report in self._reports[name] for record in report.records_of(name)]
        return os.getpid(), records[since if pid == os.getpid() else 0 :]

    def finish(self) -> None:
        """Tell the devices that there is nothing more to do."""
        if self._recipe.devices:
            self._do(self._rounds.finish({edge.name: {} for edge in self._recipe.devices}, FAREWELL_S))

    def _do(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._service.loop).result()


class DeviceEdge:
    """Handle of a device with the methods that the handle of an edge's actor has.

    Args:
        actor: handle of :class:`CloudTrainerActor`.
        name: name of the device's edge.
    """

    def __init__(self, actor: Any, name: str) -> None:
        self.do, self.news = DeviceCall(actor.run_phase, name), DeviceCall(actor.records, name)


def limits_for(recipe: SplitTuneRecipe) -> TuneLimits:
    """Return limits that are large enough for everything the edges of a recipe may request."""
    # A dead edge leaves its session behind until the lease ends; its next session must still fit.
    sessions = 4 * len(recipe.edges)
    usual = TuneLimits()
    tokens = max(usual.tokens, recipe.data.max_length * recipe.training.batch_size)
    return TuneLimits(
        sessions=sessions,
        sessions_per_principal=sessions,
        tokens=tokens,
        micro_batches=max(usual.micro_batches, recipe.max_in_flight),
        outstanding=max(usual.outstanding, tokens * recipe.max_in_flight),
        runs=max(usual.runs, sessions),
    )
