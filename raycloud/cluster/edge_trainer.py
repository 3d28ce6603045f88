"""Actor of one of several edges that fine-tune a split model together."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray

from raycloud.cluster.actor_channel import ActorChannel
from raycloud.cluster.device_rounds import NAMESPACE
from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import threads_per_actor
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.network import EmulatedChannel
from raycloud.models.threads import torch_threads
from raycloud.split.finetune.group_member import MemberRun
from raycloud.split.finetune.metrics_log import Record
from raycloud.split.finetune.recipe import SplitTuneRecipe

_LOG = logging.getLogger(__name__)
Phase = Literal["before", "alone", "together"]


class EdgeTrainerActor:
    """Actor with the resource ``edge``. It loses its state with its process and recovers from its own disk.

    Args:
        index: index of its edge in the recipe's ``edges``.
        recipe: whole recipe of the split fine-tuning.
        cloud: name of the cloud's actor; a handle would make this actor's restarts depend on that actor.
        folder: folder for checkpoints and trained weights; on the edge's own disk where none is shared.
        run: id of the run, which is also the group's name.
        log: log of the run; None for none.
    """

    def __init__(
        self,
        index: int,
        recipe: SplitTuneRecipe,
        cloud: str,
        folder: Path,
        run: str,
        log: RunLog | None = None,
    ) -> None:
        if log is not None:
            log.attach()
        self._recipe, self._edge, self._cloud = recipe, recipe.edges[index], cloud
        self._folder, self._run = folder / self._edge.name, run
        self._news: list[Record] = []
        self._member: MemberRun | None = None

    @ray.method(concurrency_group="control")
    def news(self, pid: int, since: int) -> tuple[int, list[Record]]:
        """Return this process's id and its records: from index ``since`` on if ``pid`` is this process, else all."""
        return os.getpid(), self._news[since if pid == os.getpid() else 0 :]

    def do(self, what: Phase) -> Record:
        """Run one phase ("before", "alone" or "together") from the state on disk, and return its metrics.

        Raises:
            DataError: the edge has no texts.
            LinkError: the cloud cannot be reached for a minute, or refuses the edge.
            TrainingError: gradients stay non-finite.
        """
        recipe = self._recipe
        with torch_threads(threads_per_actor(recipe.threads, "edge", len(recipe.edges) - len(recipe.devices))):
            if self._member is None:
                self._member = MemberRun(
                    recipe,
                    self._edge.name,
                    self._folder,
                    self._channel,
                    run=self._run,
                    group=self._run,
                    notify=partial(_LOG.info, "%s"),
                )
                _LOG.info("ready with %d texts, process %d", self._member.facts()["train_texts"], os.getpid())
            member = self._member
            match what:
                case "before":
                    return {**member.before(), **member.facts()}
                case "alone":
                    return member.alone(self._on_record)
                case "together":
                    return member.together(self._on_record)

    def forget(self, what: Phase) -> None:
        """Delete the checkpoints of a phase whose result has been recorded."""
        if self._member is not None:
            self._member.forget(what)

    def _on_record(self, record: Record) -> None:
        if record["kind"] == "round":
            counted = "counted in" if record["counted"] else "left out of"
            _LOG.info("%s round %d", counted, record["round"])
        self._news.append({**record, "edge": self._edge.name})

    def _channel(self, session: str) -> Channel:
        try:
            actor: Any = ray.get_actor(self._cloud, namespace=NAMESPACE)
        except ValueError:
            raise LinkDown("the cloud's actor is gone") from None
        network = self._recipe.network
        channel = ActorChannel(actor)
        return channel if network is None else EmulatedChannel(channel, network.network())
