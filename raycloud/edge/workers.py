"""Generations in worker threads, read from the event loop, with limits on the running and the waiting ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any, Generic, TypeVar

Event = TypeVar("Event")


class QueueFull(Exception):
    """Refusal of a generation because the limits of running and waiting ones are reached."""


class ServerStopping(Exception):
    """End of a generation because the server stops."""


class Generation(Generic[Event]):
    """Events of one answer, made in a thread and read with ``async for``.

    A whole generation runs in one thread, because a model or a socket may keep state per thread.

    Args:
        events: generator of the events; the thread closes it as soon as it ends, fails or is cancelled.
    """

    def __init__(self, events: Generator[Event, None, None]) -> None:
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[Event] | Exception | None] = asyncio.Queue()
        self._cancelled = threading.Event()

    def __aiter__(self) -> Generation[Event]:
        return self

    async def __anext__(self) -> Event:
        match await self._queue.get():
            case (event,):
                return event
            case None:
                raise StopAsyncIteration
            case Exception() as error:
                raise error
        raise AssertionError  # the queue holds nothing else

    def cancel(self) -> None:
        """Stop without a reader: the thread ends before its next event."""
        self._cancelled.set()

    def stop(self) -> None:
        """Stop because the server stops: the reader gets :class:`ServerStopping`.

        The thread ends before its next event.
        """
        self.cancel()
        self._tell(ServerStopping())

    def work(self) -> None:
        """Produce the events; called in the thread."""
        with closing(self._events):
            try:
                if not self._cancelled.is_set():
                    for event in self._events:
                        self._tell((event,))
                        if self._cancelled.is_set():
                            return
            except Exception as error:  # the reader raises it where the error can be returned to the client
                self._tell(error)
            else:
                self._tell(None)

    def _tell(self, what: tuple[Event] | Exception | None) -> None:
        with suppress(RuntimeError):  # the server is gone, and so is its loop
            self._loop.call_soon_threadsafe(self._queue.put_nowait, what)


class Workers:
    """Pool of worker threads for generations.

    Args:
        running: number of threads.
        waiting: number of generations that may wait for a thread.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self._threads = ThreadPoolExecutor(running, thread_name_prefix="generation")
        self._most = running + waiting
        self._generations: set[Generation[Any]] = set()

    @property
    def active(self) -> int:
        """Number of generations that run or wait."""
        return len(self._generations)

    def start(self, events: Generator[Event, None, None]) -> Generation[Event]:
        """Start a generation, or queue it.

        Raises:
            QueueFull: too many generations wait already.
        """
        if self.active >= self._most:
            raise QueueFull
        generation = Generation(events)
        self._generations.add(generation)
        done = self._threads.submit(generation.work)
        done.add_done_callback(lambda _: self._generations.discard(generation))
        return generation

    def close(self) -> None:
        """Stop all running and waiting generations."""
        generations = tuple(self._generations)
        # All are cancelled before any is told: the thread of one that ends would begin the next one.
        for generation in generations:
            generation.cancel()
        for generation in generations:
            generation.stop()
        self._threads.shutdown(wait=False)
