"""Log records of a run's actors, sent to its driver, which writes them into the result directory.

An edge shares no disk with the driver, so the records are sent through Ray.
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
    """Return a queue on this process's own node, so that it survives other nodes leaving the cluster."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"name": name, "num_cpus": 0, "scheduling_strategy": here})


@dataclass(frozen=True)
class RunLog:
    """Argument of an actor that sends its log to the driver; the actor calls :meth:`attach` once.

    Args:
        queue: name of the queue's actor; a handle would make the actor's restarts depend on it.
        source: name of the actor in the log.
    """

    queue: str
    source: str = ""

    def of(self, source: str) -> RunLog:
        """Return a copy for the actor called ``source``."""
        return replace(self, source=source)

    def attach(self) -> None:
        """Send the log records of this process from now on; without a queue it does nothing."""
        with suppress(ValueError):
            LOGGER.addHandler(_Sender(ray.get_actor(self.queue), self.source))
            LOGGER.setLevel(logging.INFO)


@contextmanager
def collect_logs(handler: logging.Handler) -> Iterator[RunLog]:
    """Pass the log records of a run's actors to a handler of this process."""
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
        self._actor.put_nowait.remote(record)  # does not wait for a reply: logging must not delay the work


class _Listener(QueueListener):
    """Listener that stops without an error if the queue's actor dies: a lost log does not end the run."""

    def dequeue(self, block: bool) -> Any:
        try:
            return super().dequeue(block)
        except RayError:
            return self._sentinel  # type: ignore[attr-defined]

    def enqueue_sentinel(self) -> None:
        with suppress(RayError):
            super().enqueue_sentinel()
