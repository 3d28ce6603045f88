"""Actor that trains the cloud part of a model with edges of the same cluster."""

from __future__ import annotations

import logging
import os
from functools import cached_property
from pathlib import Path

from torch import Tensor

from raycloud.cluster.actor_channel import ActorService
from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import threads_per_actor
from raycloud.models.loading import load_config, resolve
from raycloud.split.finetune.assembly import plan_of
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.server import TuneLimits, TuneServer
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet

_LOG = logging.getLogger(__name__)
_PRINCIPAL = "cluster"
"""Principal of every connection: a process that can call the actor is already inside the cluster's trust domain."""


class CloudTrainerActor(ActorService):
    """Actor with the resource ``cloud``. It loses its state with its process and recovers from its own disk.

    Make it an actor with ``max_concurrency=CALLS_AT_ONCE``: every waiting call occupies a thread.

    Args:
        recipe: recipe of the edges that will connect.
        folder: folder for checkpoints and the group's rounds; shared by all nodes if the actor may be restarted.
        log: log of the run; None for none.
    """

    def __init__(self, recipe: SplitTuneRecipe, folder: Path, log: RunLog | None = None) -> None:
        if log is not None:
            log.attach()
        self._recipe, self._folder = recipe, folder
        # No method of this class may be a coroutine: Ray would run all of them on one event loop, one at a time.
        super().__init__(lambda connection: self._server.serve(connection, _PRINCIPAL))

    def ready(self) -> None:
        """Load the cloud part. A restarted actor loads it with the first edge that connects.

        Raises:
            RaycloudError: the part cannot be loaded here.
        """
        _ = self._server

    @cached_property
    def _server(self) -> TuneServer:
        recipe = self._recipe
        plans = PlanSet.of(plan_of(recipe, load_config(resolve(recipe.model))))
        part = load_cloud(recipe.model, plans, device=recipe.device, dtype="float32", training=True)
        threads = threads_per_actor(recipe.threads, "cloud", 1)
        server = TuneServer(part, self._folder, limits_for(recipe), threads=threads)
        _LOG.info("ready with blocks [%d, %d), process %d", part.middle.lo, part.middle.hi, os.getpid())
        return server

    def group(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the cloud's and the edges' weights after the group's latest round; the edges' are empty if private.

        Raises:
            TrainingError: no round has ended, or its file cannot be read.
        """
        kept = self._server.saved_group(name, _PRINCIPAL)
        return kept.cloud, kept.edge


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
