"""One of several edges that fine-tune a model together, as an actor on an edge node."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import ray

from raycloud.cluster.actor_channel import ActorChannel
from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import computing_with, share_of_cores
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.network import Shaped
from raycloud.split.finetune.journal import Record
from raycloud.split.finetune.member import Member
from raycloud.split.finetune.recipe import SplitTuneRecipe

_LOG = logging.getLogger(__name__)
What = Literal["before", "alone", "together"]


class EdgeTuner:
    """An actor with the resource ``edge``. It loses its memory with its process and recovers from its own disk.

    Args:
        index: which of the recipe's edges it is.
        recipe: the whole recipe.
        cloud: the name of the cloud's actor; a handle would tie this one's restarts to it.
        folder: for checkpoints and what the edge has learned; on its own disk where none is shared.
        run: the run's id, which is the group's name as well.
        log: the run's; None for none.
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
        self._member: Member | None = None

    @ray.method(concurrency_group="control")
    def news(self, pid: int, since: int) -> tuple[int, list[Record]]:
        """The number of this process, and what has been done in it: all, or from the record ``since`` of ``pid`` on."""
        return os.getpid(), self._news[since if pid == os.getpid() else 0 :]

    def do(self, what: What) -> Record:
        """What an edge does before, alone or together, from wherever its disk says that it stands, and its metrics.

        Raises:
            DataError: the edge has no texts.
            LinkError: the cloud cannot be reached for a minute, or refuses.
            TrainingError: gradients stay non-finite.
        """
        recipe = self._recipe
        with computing_with(share_of_cores(recipe.threads, "edge", len(recipe.edges))):
            if self._member is None:
                self._member = Member(
                    recipe, self._edge.name, self._folder, self._channel, run=self._run, group=self._run
                )
                _LOG.info("ready with %d texts, process %d", self._member.facts()["train_texts"], os.getpid())
            member = self._member
            match what:
                case "before":
                    return {**member.before(), **member.facts()}
                case "alone":
                    return member.alone(self._told)
                case "together":
                    return member.together(self._told)

    def forget(self, what: What) -> None:
        """Let go of the checkpoints of what is done and known to be."""
        if self._member is not None:
            self._member.forget(what)

    def _told(self, record: Record) -> None:
        if record["kind"] == "meeting":
            counted = "counted in" if record["counted"] else "left out of"
            _LOG.info("%s round %d", counted, record["round"])
        self._news.append({**record, "edge": self._edge.name})

    def _channel(self, session: str) -> Channel:
        try:
            actor: Any = ray.get_actor(self._cloud)
        except ValueError:
            raise LinkDown("the cloud's actor is gone") from None
        network = self._recipe.network
        channel = ActorChannel(actor)
        return channel if network is None else Shaped(channel, network.network())
