"""Connection that carries frames: timeouts, closing, and replies in the order of the requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import TypeVar

from raycloud.link.channel import Connection, LinkDown
from raycloud.link.frames import Frame, FrameError, SessionKind, unpack
from raycloud.link.server.limits import SessionLimits
from raycloud.link.server.replies import RequestRefused, error_frame

log = logging.getLogger(__name__)

T = TypeVar("T")


class FrameConnection:
    """Connection that carries frames. A peer that does not accept a frame in time counts as disconnected.

    Args:
        connection: connection to one edge.
        send_s: seconds within which the peer must accept a frame.
        kinds: kinds of the service's messages.
    """

    def __init__(self, connection: Connection, send_s: float, kinds: type[IntEnum]) -> None:
        self._connection, self._send_s, self._kinds = connection, send_s, kinds

    async def receive(self) -> Frame:
        """Receive the next frame.

        Raises:
            LinkDown: the peer is gone.
            FrameError: the received bytes are no frame.
        """
        return unpack(await self._connection.receive(), self._kinds)

    async def send(self, frame: Frame, begin: int = 0) -> None:
        """Send a message, in pieces if it is large, without its first ``begin`` raw bytes.

        Raises:
            LinkDown: the peer is gone, or does not accept a piece in time.
        """
        try:
            for data in frame.pieces(begin):
                # Not wait_for: before Python 3.12 it may swallow a cancellation, and the sending task would never end.
                async with asyncio.timeout(self._send_s):
                    await self._connection.send(data)
        except TimeoutError:
            raise LinkDown("the peer does not take its replies") from None

    async def close(self, reason: str, last: Frame | None = None) -> None:
        """Close the connection, after a last frame if one is given and the peer still accepts it."""
        if last is not None:
            try:
                await self.send(last)
            except LinkDown:
                log.debug("a peer left before its last frame")
        await self._connection.close(reason)


@asynccontextmanager
async def frame_connection(
    connection: Connection, limits: SessionLimits, kinds: type[IntEnum]
) -> AsyncIterator[FrameConnection]:
    """Context of a connection; it closes the connection at the end and sends the peer the reason.

    LinkDown, FrameError and TimeoutError (no session opened in time) end the context without an error to the caller.

    Args:
        connection: connection to one edge.
        limits: limits of the connection.
        kinds: kinds of the service's messages.
    """
    line, reason, last = FrameConnection(connection, limits.send_s, kinds), "closed", None
    try:
        yield line
    except TimeoutError:
        reason = f"no session was opened within {limits.handshake_s:g} s"
    except FrameError as error:
        # Later bytes of this connection cannot be trusted; its session can, and may be resumed.
        reason = str(error)
        last = error_frame(Frame(SessionKind.ERROR), RequestRefused("frame", reason))
    except LinkDown:
        pass
    finally:
        await line.close(reason, last)


async def serve_in_order(
    hear: Callable[[], Awaitable[Frame | None]],
    reply: Callable[[Frame], asyncio.Future[T]],
    tell: Callable[[T], Awaitable[bool]],
    unanswered: int,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
    every_s: float | None = None,
) -> None:
    """Receive requests while replies are computed, and send the replies in the order of the requests.

    Args:
        hear: receives the next request; None ends the connection.
        reply: begins the reply to a request, as a future that does not raise.
        tell: sends a reply; False ends the connection.
        unanswered: largest number of requests without a reply.
        meanwhile: called repeatedly while the next reply is not yet computed.
        every_s: seconds between these calls; None for no calls.

    Raises:
        FrameError: more than ``unanswered`` requests arrived.
        LinkError: any error of ``hear``, ``tell`` and ``meanwhile``.
    """
    outbox: asyncio.Queue[asyncio.Future[T]] = asyncio.Queue()

    async def listen() -> None:
        while (frame := await hear()) is not None:
            if outbox.qsize() >= unanswered:
                raise FrameError(f"{outbox.qsize()} requests are unanswered, {unanswered} are allowed")
            outbox.put_nowait(reply(frame))

    async def speak() -> None:
        going = True
        while going:
            due = await outbox.get()
            try:
                while meanwhile is not None and not (await asyncio.wait({due}, timeout=every_s))[0]:
                    if not due.done():  # it may have finished just as the wait ended
                        await meanwhile()
            except BaseException:
                due.cancel()
                raise
            going = await tell(await due)

    both = {asyncio.create_task(listen()), asyncio.create_task(speak())}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in both:
            task.cancel()
        results = await asyncio.gather(*both, return_exceptions=True)
        while not outbox.empty():
            outbox.get_nowait().cancel()
    for error in results:
        if isinstance(error, Exception):
            raise error
