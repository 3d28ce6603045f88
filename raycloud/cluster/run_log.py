"""What the actors of a run log, sent to its driver, which writes it into the result directory.

An edge shares no disk with the driver, so the records go through Ray.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler, QueueListener
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycloud.logs import LOGGER


def driver_queue(name: str | None = None) -> Queue:
    """A queue on this process's own node: one that leaves the cluster does not take it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"name": name, "num_cpus": 0, "scheduling_strategy": here})


@dataclass(frozen=True)
class RunLog:
    """Goes with an actor's arguments; the actor calls :meth:`attach` once.

    Args:
        queue: the name of the actor where the driver listens; a handle would tie the actor's restarts to it.
        source: what the actor is called in the log.
    """

    queue: str
    source: str = ""

    def of(self, source: str) -> RunLog:
        """The same for one actor."""
        return replace(self, source=source)

    def attach(self) -> None:
        """Send what this process logs from now on; without a driver that listens the work goes on all the same."""
        with suppress(ValueError):
            LOGGER.addHandler(_Sender(ray.get_actor(self.queue), self.source))
            LOGGER.setLevel(logging.INFO)


@contextmanager
def gathered(handler: logging.Handler) -> Iterator[RunLog]:
    """Hand what the actors of a run log to a handler of this process."""
    name = f"log-{uuid.uuid4().hex[:8]}"
    listener = _Listener(driver_queue(name), handler)
    listener.start()
    try:
        yield RunLog(name)
    finally:
        listener.stop()


class _Sender(QueueHandler):
    def __init__(self, actor: Any, source: str) -> None:
        super().__init__(actor)
        self._actor, self._source = actor, source

    def prepare(self, record: logging.LogRecord) -> Any:
        prepared = super().prepare(record)
        prepared.source = self._source
        return prepared

    def enqueue(self, record: logging.LogRecord) -> None:
        self._actor.put_nowait.remote(record)  # waits for no answer: a log must not hold up the work


class _Listener(QueueListener):
    """A log that is lost, since its queue's process was, does not end the run."""

    def dequeue(self, block: bool) -> Any:
        try:
            return super().dequeue(block)
        except RayError:
            return self._sentinel  # type: ignore[attr-defined]

    def enqueue_sentinel(self) -> None:
        with suppress(RayError):
            super().enqueue_sentinel()
