"""Sessions that outlive broken connections: opened, resumed, answered in order, and freed when nobody comes back."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

from raycloud.link.channel import Connection
from raycloud.link.frames import Frame, FrameError, Granted, Kind, Resumed
from raycloud.link.hosting.answers import Refused, TooBusy, ready, refusal
from raycloud.link.hosting.limits import SessionLimits
from raycloud.link.hosting.line import Line, attended, converse
from raycloud.link.hosting.session import Session

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_RETRY_S = 1.0

S = TypeVar("S", bound=Session)


class SessionMetrics(Protocol):
    """A sink of what happens to sessions."""

    def count(self, name: Literal["errors", "sessions_opened", "sessions_expired"], value: float = 1) -> None:
        """Add to a counter."""
        ...

    def level(self, name: Literal["sessions"], value: float) -> None:
        """Set a gauge."""
        ...


@dataclass
class _Attached(Generic[S]):
    """A session and the line that speaks for it at present."""

    session: S
    line: Line


class SessionHost(ABC, Generic[S]):
    """Serves sessions of edges: a base class, to which a service adds what its sessions are and how it answers.

    Everything runs on one event loop; what computes does so elsewhere. Each request of a session is computed once, in
    order, and answered as often as it is sent while its reply is kept. A request that fails once it was accepted ends
    its session, as later ones may have been accepted on top of it.

    Args:
        limits: what is granted.
        metrics: told of sessions and errors.
    """

    kinds: ClassVar[frozenset[Kind]]
    """Of the requests within a session."""
    beat_s: float | None = None
    """So often an edge that waits for a reply is told if others were answered meanwhile; None for never."""

    def __init__(self, limits: SessionLimits, metrics: SessionMetrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._attached: dict[bytes, _Attached[S]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._replied = 0
        """Requests so far, whoever's."""

    # -- what a service says

    @abstractmethod
    def opening(self, frame: Frame, principal: str) -> Callable[[], S]:
        """Check what an OPEN asks for; the session is made by a call of what is returned, if there is room for it.

        Raises:
            FrameError: the body cannot be read.
            Refused: it is not granted.
        """

    @abstractmethod
    def granted(self, session: S) -> Granted:
        """What OPEN_OK says of a new session."""

    def resumed(self, session: S) -> Resumed:
        """What RESUMED says of a session."""
        return Resumed(next_seq=session.next_seq)

    @abstractmethod
    def begin(self, session: S, frame: Frame) -> Awaitable[Frame]:
        """Accept the next request of a session; its reply once awaited, to which session, epoch and seq are added.

        Whatever the reply raises ends the session, :class:`Refused` with its own words.

        Raises:
            FrameError: its body cannot be read; the session is as it was, as with the others.
            Refused: it is not granted.
            TooBusy: not now.
        """

    @abstractmethod
    def freed(self, session: S) -> None:
        """A session ended: let go of what it held, behind what it still has under way."""

    # -- what an edge sees

    @property
    def sessions(self) -> int:
        """Sessions held."""
        return len(self._attached)

    def held(self) -> list[S]:
        """The sessions themselves."""
        # A copy first, at one go: other threads ask as well.
        return [attached.session for attached in list(self._attached.values())]

    async def serve(self, connection: Connection, principal: str) -> None:
        """Speak with one connection until it ends; its session outlives it by the lease.

        Args:
            connection: frames from and to one edge.
            principal: who it is, as the credentials said.
        """
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        async with attended(connection, self._limits) as line:
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
        await asyncio.gather(*map(self._farewell, list(self._attached.values())))

    async def _farewell(self, attached: _Attached[S]) -> None:
        session = attached.session
        await attached.line.close("the replica leaves", Frame(Kind.GOAWAY, session.id, session.epoch))
        self._free(session)

    async def _handshake(self, line: Line, principal: str) -> S | None:
        for _ in range(_ATTEMPTS):
            frame = await line.receive()
            try:
                if frame.kind is Kind.OPEN:
                    session = self._open(frame, principal)
                    reply, content = Kind.OPEN_OK, self.granted(session).pack()
                elif frame.kind is Kind.RESUME:
                    session = self._resume(frame, principal)
                    reply, content = Kind.RESUMED, self.resumed(session).pack()
                else:
                    raise Refused("handshake", f"{frame.kind.name} came where OPEN or RESUME should have")
            except (Refused, TooBusy) as error:
                await line.send(self._refusal(frame, error))
                continue
            session.renew(time.monotonic())
            self._attached[session.id] = _Attached(session, line)
            self._metrics.level("sessions", len(self._attached))
            await line.send(Frame(reply, session.id, session.epoch, payload=content))
            return session
        return None

    def _open(self, frame: Frame, principal: str) -> S:
        if self._leaving:
            raise TooBusy(_RETRY_S)
        make = self.opening(frame, principal)
        if frame.session in self._attached or frame.session == bytes(16):
            raise Refused("session", "this session exists")
        mine = sum(session.principal == principal for session in self.held())
        if len(self._attached) >= self._limits.sessions or mine >= self._limits.sessions_per_principal:
            raise TooBusy(_RETRY_S)
        self._metrics.count("sessions_opened")
        return make()

    def _resume(self, frame: Frame, principal: str) -> S:
        attached = self._attached.get(frame.session)
        # A wrong principal must not learn that the session exists.
        if attached is None or attached.session.principal != principal:
            raise Refused("unknown-session", "no such session here")
        session = attached.session
        if frame.epoch <= session.epoch:
            raise Refused("epoch", f"epoch {frame.epoch} is not newer than {session.epoch}")
        session.epoch = frame.epoch
        self._dismiss(attached.line, "another connection resumed the session")
        return session

    # -- within a session

    async def _converse(self, line: Line, session: S) -> None:
        async def hear() -> Frame | None:
            frame = await line.receive()
            if frame.session != session.id or frame.epoch != session.epoch:
                raise FrameError("a frame of another session or of an older connection")
            if session.id not in self._attached:
                await line.send(refusal(frame, Refused("unknown-session", "the session ended")))
                return None
            session.renew(time.monotonic())
            if frame.kind is Kind.CLOSE:
                self._free(session)
                await line.send(Frame(Kind.CLOSE, session.id, session.epoch))
                return None
            return frame

        async def tell(reply: Frame) -> bool:
            await line.send(reply)
            session.heard_of = self._replied
            # A request that failed ended the session; a connection without one would be held by nothing.
            return reply.kind is not Kind.ERROR or session.id in self._attached

        async def beat() -> None:
            """An edge whose request waits behind those of others need not take the cloud for dead."""
            if self._replied > session.heard_of:
                session.heard_of = self._replied
                await line.send(Frame(Kind.PING, session.id, session.epoch))

        def reply(frame: Frame) -> asyncio.Future[Frame]:
            return self._reply(session, frame)

        await converse(hear, reply, tell, self._limits.unanswered, beat, self.beat_s)

    def _reply(self, session: S, frame: Frame) -> asyncio.Future[Frame]:
        """The reply to a frame within a session, now or when it is computed."""
        try:
            if frame.kind is Kind.PING:
                return ready(Frame(Kind.PING, session.id, session.epoch, frame.seq))
            if frame.kind not in self.kinds:
                raise Refused("kind", f"{frame.kind.name} has no place within a session")
            if session.repeated(frame):
                return self._again(session, frame)
            if len(session.pending) >= self._limits.credit:
                away = f"{len(session.pending)} requests are on their way"
                raise Refused("credit", f"{away}, {self._limits.credit} are granted")
            reply = asyncio.ensure_future(self._finished(session, frame, self.begin(session, frame)))
        except FrameError as error:
            # The frame came as it was sent: sending it again would not help.
            return ready(self._refusal(frame, Refused("request", str(error))))
        except (Refused, TooBusy) as error:
            return ready(self._refusal(frame, error))
        session.accept(frame, reply)
        # Whoever asked may leave; the reply is there when they come back.
        return asyncio.ensure_future(asyncio.shield(reply))

    def _again(self, session: S, frame: Frame) -> asyncio.Future[Frame]:
        if frame.seq in session.replies:
            return ready(replace(session.replies[frame.seq], epoch=session.epoch))

        async def shared(pending: asyncio.Future[Frame]) -> Frame:
            return replace(await asyncio.shield(pending), epoch=session.epoch)

        return asyncio.ensure_future(shared(session.pending[frame.seq]))

    async def _finished(self, session: S, frame: Frame, work: Awaitable[Frame]) -> Frame:
        try:
            computed = await work
            if not self._holds(session):
                # What it was computed from may have been let go of meanwhile.
                raise Refused("unknown-session", "the session ended")
            reply = replace(computed, session=session.id, epoch=session.epoch, seq=frame.seq)
        except Refused as error:
            reply = self._failed(session, frame, error)
        except Exception as error:
            log.exception("%s %d of session %s failed", frame.kind.name, frame.seq, session.id.hex()[:8])
            message = f"the {frame.kind.name.lower()} failed: {type(error).__name__}"
            reply = self._failed(session, frame, Refused("internal", message))
        self._replied += 1
        session.keep_reply(reply)
        # However long it took, the edge has the lease's time to come for it.
        session.renew(time.monotonic())
        return reply

    def _failed(self, session: S, frame: Frame, error: Refused) -> Frame:
        self._free(session)
        return self._refusal(frame, error)

    def _refusal(self, frame: Frame, error: Refused | TooBusy) -> Frame:
        if isinstance(error, Refused):
            self._metrics.count("errors")
        return refusal(frame, error)

    # -- ends

    def _dismiss(self, line: Line, reason: str) -> None:
        """Close a connection without waiting for it: a peer that is gone does not take part in closing."""
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
