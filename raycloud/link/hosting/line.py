"""One connection in frames: how long it is waited for, how it ends, and replies in the order of the requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from raycloud.link.channel import Connection, LinkDown
from raycloud.link.frames import Frame, FrameError, Kind, unpack
from raycloud.link.hosting.answers import Refused, refusal
from raycloud.link.hosting.limits import ConnectionLimits

log = logging.getLogger(__name__)

T = TypeVar("T")


class Line:
    """A connection in frames. A peer that does not take one in time is as good as gone.

    Args:
        connection: to one edge.
        send_s: how long it has to take a frame.
    """

    def __init__(self, connection: Connection, send_s: float) -> None:
        self._connection, self._send_s = connection, send_s

    async def receive(self) -> Frame:
        """The next frame.

        Raises:
            LinkDown: the peer is gone.
            FrameError: what came is no frame.
        """
        return unpack(await self._connection.receive())

    async def send(self, frame: Frame) -> None:
        """Send a frame.

        Raises:
            LinkDown: the peer is gone, or does not take it.
        """
        try:
            # Not wait_for: before Python 3.12 it may swallow a cancellation, and who sends would never end.
            async with asyncio.timeout(self._send_s):
                await self._connection.send(frame.pack())
        except TimeoutError:
            raise LinkDown("the peer does not take its replies") from None

    async def close(self, reason: str, last: Frame | None = None) -> None:
        """Close the connection, after a last frame for those who still listen."""
        if last is not None:
            try:
                await self.send(last)
            except LinkDown:
                log.debug("a peer left before its last frame")
        await self._connection.close(reason)


@asynccontextmanager
async def attended(connection: Connection, limits: ConnectionLimits) -> AsyncIterator[Line]:
    """A connection for as long as it lasts; it is closed at the end, and told why.

    That the peer leaves, sends what is no frame, or opens nothing in time (a TimeoutError) is no error out here.

    Args:
        connection: to one edge.
        limits: of the connection.
    """
    line, reason, last = Line(connection, limits.send_s), "closed", None
    try:
        yield line
    except TimeoutError:
        reason = f"no session was opened within {limits.handshake_s:g} s"
    except FrameError as error:
        # What comes after such bytes cannot be trusted; a session can, and is there to be resumed.
        reason = str(error)
        last = refusal(Frame(Kind.ERROR), Refused("frame", reason))
    except LinkDown:
        pass
    finally:
        await line.close(reason, last)


async def converse(
    hear: Callable[[], Awaitable[Frame | None]],
    reply: Callable[[Frame], asyncio.Future[T]],
    tell: Callable[[T], Awaitable[bool]],
    unanswered: int,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
    every_s: float | None = None,
) -> None:
    """Hear requests while replies are computed and told, in the order of the requests.

    Args:
        hear: the next request; None ends the conversation.
        reply: begins its reply, which does not raise.
        tell: sends a reply; False ends the conversation.
        unanswered: how many replies may wait.
        meanwhile: done again and again while a reply is waited for.
        every_s: how often; None for never.

    Raises:
        FrameError: more requests came.
        LinkError: whatever ``hear``, ``tell`` and ``meanwhile`` raise.
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
