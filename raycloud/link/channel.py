"""Channels that carry frames between the two ends of a link. A channel moves bytes and does not interpret them."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Protocol

from raycloud.errors import LinkError
from raycloud.link.meter import Meter


class LinkDown(LinkError):
    """Error of a channel that broke or was closed; a new channel may work."""


class Channel(Protocol):
    """Channel at the edge's end of a link. One thread sends, one receives; either may close."""

    def send(self, data: bytes) -> None:
        """Send one message.

        Raises:
            LinkDown: the channel is broken or closed.
        """
        ...

    def receive(self, timeout_s: float) -> bytes:
        """Receive the next message.

        Raises:
            TimeoutError: no message arrived in time.
            LinkDown: the channel is broken or closed.
        """
        ...

    def close(self) -> None:
        """Close the channel; closing twice is harmless."""
        ...


class Connection(Protocol):
    """Connection at the cloud's end of a link."""

    async def receive(self) -> bytes:
        """Receive the next message.

        Raises:
            LinkDown: the peer is gone.
        """
        ...

    async def send(self, data: bytes) -> None:
        """Send one message; return when the peer has accepted it.

        Raises:
            LinkDown: the peer is gone.
        """
        ...

    async def close(self, reason: str) -> None:
        """Close the connection; closing twice is harmless."""
        ...


class MeteredChannel:
    """Channel that counts the messages it carries and their bytes, as the kinds ``up`` and ``down``."""

    def __init__(self, inner: Channel, meter: Meter) -> None:
        self._inner, self._meter = inner, meter

    def send(self, data: bytes) -> None:
        """Count a message, then send it."""
        self._meter.add("up", len(data))
        self._inner.send(data)

    def receive(self, timeout_s: float) -> bytes:
        """Receive a message, then count it."""
        data = self._inner.receive(timeout_s)
        self._meter.add("down", len(data))
        return data

    def close(self) -> None:
        """Close the channel."""
        self._inner.close()


class Loopback:
    """Channels within one process to a service that runs on an event loop in its own thread.

    Args:
        serve: coroutine function that serves one connection until it ends; further arguments are those of
            :meth:`connect`.
    """

    def __init__(self, serve: Callable[..., Awaitable[None]]) -> None:
        self._serve = serve
        self.loop = asyncio.new_event_loop()
        self._lock, self._open = threading.Lock(), True
        self._thread = threading.Thread(target=self.loop.run_forever, name="loopback", daemon=True)
        self._thread.start()

    def connect(self, *about: str) -> Channel:
        """Open a new channel to the service.

        Args:
            about: what the service must know of the peer, such as its principal.

        Raises:
            LinkDown: the service has stopped.
        """
        connection = _LoopbackEnd(self.loop)
        with self._lock:
            if not self._open:
                raise LinkDown("the service has stopped")
            asyncio.run_coroutine_threadsafe(self._run(connection, *about), self.loop)
        return _LoopbackChannel(connection)

    async def _run(self, connection: _LoopbackEnd, *about: str) -> None:
        try:
            await self._serve(connection, *about)
        finally:
            await connection.close("served")

    def close(self) -> None:
        """Stop the service and end the connections that are still open."""

        async def stop() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with self._lock:
            self._open = False  # otherwise a client could connect to a loop that is about to end, and wait forever
        asyncio.run_coroutine_threadsafe(stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class _LoopbackEnd:
    """Service's end of a loopback channel; None in a queue marks the end of the stream."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.up: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.down: queue.Queue[bytes | None] = queue.Queue()
        self.closed = threading.Event()

    async def receive(self) -> bytes:
        data = await self.up.get()
        if data is None:
            self.up.put_nowait(None)
            raise LinkDown("the peer closed the channel")
        return data

    async def send(self, data: bytes) -> None:
        if self.closed.is_set():
            raise LinkDown("the channel is closed")
        self.down.put(data)

    async def close(self, reason: str) -> None:
        self.end()

    def end(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self.down.put(None)
            self.loop.call_soon_threadsafe(self.up.put_nowait, None)


class _LoopbackChannel:
    def __init__(self, end: _LoopbackEnd) -> None:
        self._end = end

    def send(self, data: bytes) -> None:
        if self._end.closed.is_set():
            raise LinkDown("the channel is closed")
        self._end.loop.call_soon_threadsafe(self._end.up.put_nowait, data)

    def receive(self, timeout_s: float) -> bytes:
        try:
            data = self._end.down.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            raise TimeoutError from None
        if data is None:
            self._end.down.put(None)
            raise LinkDown("the channel is closed")
        return data

    def close(self) -> None:
        if not self._end.loop.is_closed():
            self._end.end()
