"""Server of sessions that outlive broken connections: opens, resumes, answers in order, and frees expired ones."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar, Generic, TypeVar

from raycloud.link.channel import Connection
from raycloud.link.frames import (
    Frame,
    FrameError,
    OpenRequest,
    ResumeReply,
    ResumeRequest,
    SessionGrant,
    SessionKind,
    parse_body,
)
from raycloud.link.pieces import MessageTooLarge
from raycloud.link.server.connection import FrameConnection, frame_connection, serve_in_order
from raycloud.link.server.limits import SessionLimits
from raycloud.link.server.metrics import NullMetrics, SessionMetrics
from raycloud.link.server.replies import RequestRefused, ServerBusy, completed, error_frame
from raycloud.link.server.session import Session

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_RETRY_S = 1.0

S = TypeVar("S", bound=Session)


@dataclass
class _AttachedSession(Generic[S]):
    """Session and its current connection."""

    session: S
    line: FrameConnection


class SessionServer(ABC, Generic[S]):
    """Server of edges' sessions: a base class; a service adds its kinds of messages, its sessions and its replies.

    Everything runs on one event loop; computation runs elsewhere. Each request of a session is computed once, in order,
    and answered as often as it is sent while its reply is kept. A request that fails after it was accepted ends its
    session, as later requests that depend on it may have been accepted.

    Args:
        limits: limits of connections and sessions.
        metrics: sink for the counts of sessions and errors; None for none.
    """

    service: ClassVar[str]
    """Name of the service."""
    kinds: ClassVar[type[IntEnum]]
    """Kinds of the service's messages."""
    requests: ClassVar[frozenset[IntEnum]]
    """Kinds of the service that are requests."""
    heartbeat_s: float | None = None
    """Seconds between heartbeats (PING) to an edge that waits while others are answered; None for no heartbeats."""

    def __init__(self, limits: SessionLimits, metrics: SessionMetrics | None = None) -> None:
        self._limits = limits
        self._metrics: SessionMetrics = metrics or NullMetrics()
        self._attached: dict[bytes, _AttachedSession[S]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._replies_sent = 0
        """Number of replies computed so far, over all sessions."""

    # -- methods of a service

    @abstractmethod
    def opening(self, frame: Frame, principal: str) -> Callable[[], S]:
        """Check an OPEN frame and return a function that makes the session, called if the limits allow the session.

        Raises:
            FrameError: the body is invalid.
            RequestRefused: the session is refused.
        """

    @abstractmethod
    def granted(self, session: S) -> SessionGrant:
        """Body of OPEN_OK for a new session."""

    def most_bytes(self, kind: IntEnum) -> int:
        """Largest number of raw bytes of a request."""
        return self._limits.message_bytes

    @abstractmethod
    def begin(self, session: S, frame: Frame) -> Awaitable[Frame]:
        """Accept the next request; return an awaitable of its reply, to which session, epoch and seq are added.

        Any error of the awaitable ends the session; for :class:`RequestRefused` the edge receives its code and message.
        An error of this method itself leaves the session unchanged.

        Raises:
            FrameError: the body is invalid.
            RequestRefused: the request is refused.
            ServerBusy: the request may be accepted later.
        """

    @abstractmethod
    def freed(self, session: S) -> None:
        """Release the resources of an ended session, after its requests that are still being computed."""

    # -- connections

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self._attached)

    def held(self) -> list[S]:
        """List of the open sessions."""
        # Copy first, in one atomic call: other threads call this too.
        return [attached.session for attached in list(self._attached.values())]

    async def serve(self, connection: Connection, principal: str) -> None:
        """Serve one connection until it ends; its session outlives it by the lease.

        Args:
            connection: connection to one edge.
            principal: principal of the edge, from its credentials.
        """
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        async with frame_connection(connection, self._limits, self.kinds) as line:
            try:
                async with asyncio.timeout(self._limits.handshake_s):
                    session = await self._handshake(line, principal)
                if session is not None:
                    await self._converse(line, session)
            except FrameError:
                self._metrics.count("errors")
                raise

    async def leave(self) -> None:
        """Tell every edge to resume elsewhere, and free everything."""
        self._leaving = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*map(self._send_goaway, list(self._attached.values())))

    async def _send_goaway(self, attached: _AttachedSession[S]) -> None:
        session = attached.session
        await attached.line.close("the replica leaves", Frame(SessionKind.GOAWAY, session.id, session.epoch))
        self._free(session)

    async def _handshake(self, line: FrameConnection, principal: str) -> S | None:
        for _ in range(_ATTEMPTS):
            frame = await line.receive()
            try:
                if frame.kind is SessionKind.OPEN:
                    session = self._open(frame, principal)
                    reply, content = SessionKind.OPEN_OK, self.granted(session).pack()
                elif frame.kind is SessionKind.RESUME:
                    session = self._resume(frame, principal)
                    received = session.incoming.received(session.next_seq)
                    content = ResumeReply(next_seq=session.next_seq, received=received).pack()
                    reply = SessionKind.RESUMED
                else:
                    raise RequestRefused("handshake", f"{frame.kind.name} came where OPEN or RESUME should have")
            except (RequestRefused, ServerBusy) as error:
                await line.send(self._refusal(frame, error))
                continue
            session.renew(time.monotonic())
            self._attached[session.id] = _AttachedSession(session, line)
            self._metrics.level("sessions", len(self._attached))
            await line.send(Frame(reply, session.id, session.epoch, body=content))
            return session
        return None

    def _open(self, frame: Frame, principal: str) -> S:
        if self._leaving:
            raise ServerBusy(_RETRY_S)
        if (asked := parse_body(frame, OpenRequest).service) != self.service:
            raise RequestRefused("service", f"the edge asks for the service '{asked}', this is '{self.service}'")
        make = self.opening(frame, principal)
        if frame.session in self._attached or frame.session == bytes(16):
            raise RequestRefused("session", "this session exists")
        mine = sum(session.principal == principal for session in self.held())
        if len(self._attached) >= self._limits.sessions or mine >= self._limits.sessions_per_principal:
            raise ServerBusy(_RETRY_S)
        self._metrics.count("sessions_opened")
        return make()

    def _resume(self, frame: Frame, principal: str) -> S:
        attached = self._attached.get(frame.session)
        # A wrong principal must not learn that the session exists.
        if attached is None or attached.session.principal != principal:
            raise RequestRefused("unknown-session", "no such session here")
        session = attached.session
        if frame.epoch <= session.epoch:
            raise RequestRefused("epoch", f"epoch {frame.epoch} is not newer than {session.epoch}")
        resumed = parse_body(frame, ResumeRequest)
        session.epoch = frame.epoch
        session.resume_replies(frame.ack, resumed.received)
        self._dismiss(attached.line, "another connection resumed the session")
        return session

    # -- within a session

    async def _converse(self, line: FrameConnection, session: S) -> None:
        async def hear() -> Frame | None:
            while True:
                frame = await line.receive()
                if frame.session != session.id or frame.epoch != session.epoch:
                    raise FrameError("a frame of another session or of an older connection")
                if session.id not in self._attached:
                    await line.send(error_frame(frame, RequestRefused("unknown-session", "the session ended")))
                    return None
                session.renew(time.monotonic())
                if frame.kind is SessionKind.CLOSE:
                    self._free(session)
                    await line.send(Frame(SessionKind.CLOSE, session.id, session.epoch))
                    return None
                if isinstance(frame.kind, SessionKind):
                    return frame
                try:
                    if (whole := session.incoming.add(frame, self.most_bytes(frame.kind))) is not None:
                        return whole
                except MessageTooLarge as error:
                    await line.send(self._refusal(frame, RequestRefused("size", str(error))))

        async def tell(reply: Frame) -> bool:
            await line.send(reply, session.begin_of(reply))
            session.last_seen = self._replies_sent
            # A request that failed ended the session; a connection without one would be held by nothing.
            return reply.kind is not SessionKind.ERROR or session.id in self._attached

        async def beat() -> None:
            """Send PING if other requests were answered meanwhile, so that the waiting edge does not time out."""
            if self._replies_sent > session.last_seen:
                session.last_seen = self._replies_sent
                await line.send(Frame(SessionKind.PING, session.id, session.epoch))

        def reply(frame: Frame) -> asyncio.Future[Frame]:
            return self._reply(session, frame)

        await serve_in_order(hear, reply, tell, self._limits.unanswered, beat, self.heartbeat_s)

    def _reply(self, session: S, frame: Frame) -> asyncio.Future[Frame]:
        """Future of the reply to a frame within a session."""
        try:
            if frame.kind is SessionKind.PING:
                return completed(Frame(SessionKind.PING, session.id, session.epoch, frame.seq))
            if frame.kind not in self.requests:
                raise RequestRefused("kind", f"{frame.kind.name} has no place within a session")
            session.drop_replies(frame.ack)
            if session.repeated(frame):
                return self._again(session, frame)
            if len(session.pending) >= self._limits.credit:
                away = f"{len(session.pending)} requests are on their way"
                raise RequestRefused("credit", f"{away}, {self._limits.credit} are granted")
            reply = asyncio.ensure_future(self._finished(session, frame, self.begin(session, frame)))
        except FrameError as error:
            # The frame arrived undamaged: sending it again would not help.
            return completed(self._refusal(frame, RequestRefused("request", str(error))))
        except (RequestRefused, ServerBusy) as error:
            return completed(self._refusal(frame, error))
        session.accept(frame, reply)
        # The edge may disconnect; the reply is kept until it returns.
        return asyncio.ensure_future(asyncio.shield(reply))

    def _again(self, session: S, frame: Frame) -> asyncio.Future[Frame]:
        if frame.seq in session.replies:
            return completed(replace(session.replies[frame.seq], epoch=session.epoch))

        async def shared(pending: asyncio.Future[Frame]) -> Frame:
            return replace(await asyncio.shield(pending), epoch=session.epoch)

        return asyncio.ensure_future(shared(session.pending[frame.seq]))

    async def _finished(self, session: S, frame: Frame, work: Awaitable[Frame]) -> Frame:
        try:
            computed = await work
            if not self._holds(session):
                # The state it was computed from may have been released meanwhile.
                raise RequestRefused("unknown-session", "the session ended")
            reply = replace(computed, session=session.id, epoch=session.epoch, seq=frame.seq)
        except RequestRefused as error:
            reply = self._failed(session, frame, error)
        except Exception as error:
            log.exception("%s %d of session %s failed", frame.kind.name, frame.seq, session.id.hex()[:8])
            message = f"the {frame.kind.name.lower()} failed: {type(error).__name__}"
            reply = self._failed(session, frame, RequestRefused("internal", message))
        self._replies_sent += 1
        session.last_seen += 1  # not an answer to another one, of which a heartbeat would tell
        session.keep_reply(reply)
        # The edge has a full lease to fetch the reply, however long the computation took.
        session.renew(time.monotonic())
        return reply

    def _failed(self, session: S, frame: Frame, error: RequestRefused) -> Frame:
        self._free(session)
        return self._refusal(frame, error)

    def _refusal(self, frame: Frame, error: RequestRefused | ServerBusy) -> Frame:
        if isinstance(error, RequestRefused):
            self._metrics.count("errors")
        return error_frame(frame, error)

    # -- ends

    def _dismiss(self, line: FrameConnection, reason: str) -> None:
        """Close a connection without waiting: a peer that is gone does not take part in the closing handshake."""
        task = asyncio.create_task(line.close(reason))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _free(self, session: S) -> None:
        if self._holds(session):
            del self._attached[session.id]
            self._metrics.level("sessions", len(self._attached))
            self.freed(session)

    def _holds(self, session: S) -> bool:
        attached = self._attached.get(session.id)
        return attached is not None and attached.session is session

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._limits.lease_s / 4))
            now = time.monotonic()
            for attached in list(self._attached.values()):
                if attached.session.expires < now and not attached.session.pending:
                    self._metrics.count("sessions_expired")
                    self._free(attached.session)
                    self._dismiss(attached.line, "the session's lease ended")
