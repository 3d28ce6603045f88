"""The cloud's part of a model as an actor that trains it with edges of the cluster."""

from __future__ import annotations

import logging
import os
from functools import cached_property
from pathlib import Path

from torch import Tensor

from raycloud.cluster.actor_channel import ActorService
from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import share_of_cores
from raycloud.models.loading import load_config, resolve
from raycloud.split.finetune.assembly import plan_of
from raycloud.split.finetune.host import TuneHost, TuneLimits
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet

_LOG = logging.getLogger(__name__)
_PRINCIPAL = "cluster"
"""Who may call an actor is inside the cluster's trust already."""


class CloudTuner(ActorService):
    """An actor with the resource ``cloud``. It loses its memory with its process and recovers from its own disk.

    Make it an actor with ``max_concurrency=CALLS_AT_ONCE``: waiting calls hold threads.

    Args:
        recipe: of the edges that will come.
        folder: for checkpoints and the group's rounds; where the actor may start again, a folder that all nodes see.
        log: the run's; None for none.
    """

    def __init__(self, recipe: SplitTuneRecipe, folder: Path, log: RunLog | None = None) -> None:
        if log is not None:
            log.attach()
        self._recipe, self._folder = recipe, folder
        # No method of this class may be a coroutine: Ray would run all of them on one event loop, one at a time.
        super().__init__(lambda connection: self._host.serve(connection, _PRINCIPAL))

    def ready(self) -> None:
        """Load the part; one that starts again does so with the first edge that comes.

        Raises:
            RaycloudError: it cannot be had here.
        """
        _ = self._host

    @cached_property
    def _host(self) -> TuneHost:
        recipe = self._recipe
        plans = PlanSet.of(plan_of(recipe, load_config(resolve(recipe.model))))
        part = load_cloud(recipe.model, plans, device=recipe.device, dtype="float32", training=True)
        threads = share_of_cores(recipe.threads, "cloud", 1)
        host = TuneHost(part, self._folder, limits_for(recipe), threads=threads)
        _LOG.info("ready with blocks [%d, %d), process %d", part.middle.lo, part.middle.hi, os.getpid())
        return host

    def group(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The cloud's and the edges' weights as the group's latest round left them; the latter empty if private.

        Raises:
            TrainingError: no round has ended, or its file cannot be read.
        """
        kept = self._host.kept(name, _PRINCIPAL)
        return kept.cloud, kept.edge


def limits_for(recipe: SplitTuneRecipe) -> TuneLimits:
    """Room for whatever the edges of a recipe may ask for."""
    # An edge that died leaves a session behind until its lease ends; it must find room for the next one.
    sessions = 4 * len(recipe.edges)
    usual = TuneLimits()
    tokens = max(usual.tokens, recipe.data.max_length * recipe.training.batch_size)
    return TuneLimits(
        sessions=sessions,
        sessions_per_principal=sessions,
        tokens=tokens,
        micros=max(usual.micros, recipe.depth),
        outstanding=max(usual.outstanding, tokens * recipe.depth),
        runs=max(usual.runs, sessions),
    )
