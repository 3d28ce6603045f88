"""The protocol: what the cloud answers to each frame of an edge, whatever channel it comes through."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from raycloud.link.channel import Connection, LinkDown
from raycloud.link.frames import (
    Body,
    Busy,
    Frame,
    FrameError,
    Kind,
    Open,
    Opened,
    Refusal,
    Resumed,
    body,
    unpack,
)
from raycloud.split.cloud.engine import Engine, Expired, Job, NonFinite
from raycloud.split.cloud.limits import Limits
from raycloud.split.cloud.metrics import Metrics, NoMetrics
from raycloud.split.cloud.session import Refused, Session
from raycloud.split.plan import PlanSet
from raycloud.split.terms import CODEC_NUMBERS, Codecs

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_NEVER = float("inf")


@dataclass
class _Attached:
    """A session and the connection that speaks for it at present."""

    session: Session
    connection: Connection


class Host:
    """Serves the sessions of one replica. Everything but the engine runs on one event loop.

    Args:
        engine: computes.
        codecs: the calibrated codecs, by name and cut.
        limits: what is granted.
        metrics: told of sessions, errors and memory.
        replica: a name for people.
    """

    def __init__(
        self,
        engine: Engine,
        codecs: Codecs,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        replica: str = "",
    ) -> None:
        self._engine, self._codecs, self._limits = engine, codecs, limits or Limits()
        self._metrics, self._replica = metrics or NoMetrics(), replica
        self._attached: dict[bytes, _Attached] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._leaving = False

    @property
    def sessions(self) -> int:
        """Sessions held."""
        return len(self._attached)

    @property
    def kv_bytes(self) -> int:
        """What the keys and values of all accepted tokens take."""
        tokens = sum(attached.session.tokens for attached in self._attached.values())
        return tokens * self._engine.kv_bytes_per_token

    async def serve(self, connection: Connection, principal: str) -> None:
        """Speak with one connection until it ends; its session outlives it by the lease.

        Args:
            connection: frames from and to one edge.
            principal: who it is, as the credentials said.
        """
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        reason = "closed"
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                session = await self._handshake(connection, principal)
            if session is not None:
                await self._converse(connection, session)
        except TimeoutError:
            reason = f"no session was opened within {self._limits.handshake_s:g} s"
        except FrameError as error:
            # The bytes cannot be trusted any further; the session can, and is there to be resumed.
            self._metrics.count("errors")
            reason = str(error)
            await self._try_to_send(connection, _refusal(Frame(Kind.ERROR), Refused("frame", str(error))))
        except LinkDown:
            pass
        finally:
            await connection.close(reason)

    async def leave(self) -> None:
        """Tell every edge to resume elsewhere, and free everything."""
        self._leaving = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*map(self._farewell, list(self._attached.values())))

    async def _farewell(self, attached: _Attached) -> None:
        await self._try_to_send(attached.connection, Frame(Kind.GOAWAY, attached.session.id, attached.session.epoch))
        await attached.connection.close("the replica leaves")
        self._free(attached.session)

    async def _handshake(self, connection: Connection, principal: str) -> Session | None:
        for _ in range(_ATTEMPTS):
            frame = unpack(await connection.receive())
            try:
                if frame.kind is Kind.OPEN:
                    session = self._open(frame, principal)
                    granted = Opened(
                        lease_s=self._limits.lease_s,
                        max_tokens=session.max_tokens,
                        max_rows=self._limits.rows,
                        credit=self._limits.credit,
                        replica=self._replica,
                    )
                    reply, answer = Kind.OPEN_OK, granted.pack()
                elif frame.kind is Kind.RESUME:
                    session = self._resume(frame, principal)
                    reply, answer = Kind.RESUMED, Resumed(tokens=session.tokens, next_seq=session.next_seq).pack()
                else:
                    raise Refused("handshake", f"{frame.kind.name} came where OPEN or RESUME should have")
            except Refused as error:
                self._metrics.count("errors")
                await self._send(connection, _refusal(frame, error))
                continue
            except _TooBusy as error:
                await self._send(connection, _answer(Kind.BUSY, frame, Busy(retry_after_s=error.retry_after_s)))
                continue
            self._attached[session.id] = _Attached(session, connection)
            self._metrics.level("sessions", len(self._attached))
            await self._send(connection, Frame(reply, session.id, session.epoch, payload=answer))
            return session
        return None

    def _open(self, frame: Frame, principal: str) -> Session:
        asked = body(frame, Open)
        part, limits = self._engine.part, self._limits
        if self._leaving:
            raise _TooBusy(1.0)
        if asked.fingerprint != part.fingerprint:
            raise Refused("fingerprint", f"the edge's model {asked.fingerprint[:12]} is not {part.fingerprint[:12]}")
        try:
            plans = PlanSet(tuple(asked.firsts), tuple(asked.seconds))
            boundaries = {cut: self._codecs.boundary(asked.codec, cut) for cut in plans.cuts}
        except Exception as error:  # an unknown codec, a cut that was not calibrated, impossible cuts
            raise Refused("codec", str(error)) from None
        held = part.plans.cloud
        if plans.cloud.start < held.start or plans.cloud.stop > held.stop:
            asked_for = f"[{plans.cloud.start}, {plans.cloud.stop})"
            raise Refused("plan", f"blocks {asked_for} are asked for, [{held.start}, {held.stop}) are here")
        if self._codecs.fingerprint(asked.codec) != asked.calibration:
            raise Refused("calibration", f"codec {asked.codec} is calibrated differently here")
        if frame.session in self._attached or frame.session == bytes(16):
            raise Refused("session", "this session exists")
        mine = sum(attached.session.principal == principal for attached in self._attached.values())
        if len(self._attached) >= limits.sessions or mine >= limits.sessions_per_principal:
            raise _TooBusy(1.0)
        max_tokens = min(asked.max_tokens, limits.tokens, part.config.max_position_embeddings)
        self._metrics.count("sessions_opened")
        return Session(
            frame.session,
            principal,
            self._engine.open(plans),
            plans,
            boundaries,
            CODEC_NUMBERS[asked.codec],
            max_tokens,
            limits,
            time.monotonic() + limits.lease_s,
            frame.epoch,
        )

    def _resume(self, frame: Frame, principal: str) -> Session:
        attached = self._attached.get(frame.session)
        # A wrong principal must not learn that the session exists.
        if attached is None or attached.session.principal != principal:
            raise Refused("unknown-session", "no such session here")
        session = attached.session
        if frame.epoch <= session.epoch:
            raise Refused("epoch", f"epoch {frame.epoch} is not newer than {session.epoch}")
        session.epoch = frame.epoch
        session.renew(time.monotonic())
        self._dismiss(attached.connection, "another connection resumed the session")
        return session

    async def _converse(self, connection: Connection, session: Session) -> None:
        outbox: asyncio.Queue[asyncio.Future[Frame]] = asyncio.Queue()
        both = {
            asyncio.create_task(self._read(connection, session, outbox)),
            asyncio.create_task(self._write(connection, session, outbox)),
        }
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            results = await asyncio.gather(*both, return_exceptions=True)
        for error in results:
            if isinstance(error, Exception):
                raise error

    async def _read(
        self, connection: Connection, session: Session, outbox: asyncio.Queue[asyncio.Future[Frame]]
    ) -> None:
        while True:
            frame = unpack(await connection.receive())
            if frame.session != session.id or frame.epoch != session.epoch:
                raise FrameError("a frame of another session or of an older connection")
            if session.id not in self._attached:
                gone = Refused("unknown-session", "the session ended")
                await self._send(connection, _refusal(frame, gone))
                return
            session.renew(time.monotonic())
            if frame.kind is Kind.CLOSE:
                self._free(session)
                await self._send(connection, Frame(Kind.CLOSE, session.id, session.epoch))
                return
            if outbox.qsize() >= self._limits.unanswered:
                raise FrameError(f"{outbox.qsize()} replies are waiting to be taken")
            outbox.put_nowait(self._reply(session, frame))

    def _reply(self, session: Session, frame: Frame) -> asyncio.Future[Frame]:
        """The reply to a frame within a session, now or when it is computed."""
        loop = asyncio.get_running_loop()
        try:
            if frame.kind is Kind.PING:
                return _ready(loop, Frame(Kind.PING, session.id, session.epoch, frame.seq))
            if frame.kind not in (Kind.STEP, Kind.REPLAY):
                raise Refused("kind", f"{frame.kind.name} has no place within a session")
            return self._step(session, frame)
        except Refused as error:
            self._metrics.count("errors")
            return _ready(loop, _refusal(frame, error))
        except _TooBusy as error:
            return _ready(loop, _answer(Kind.BUSY, frame, Busy(retry_after_s=error.retry_after_s)))

    def _step(self, session: Session, frame: Frame) -> asyncio.Future[Frame]:
        loop = asyncio.get_running_loop()
        if session.repeated(frame):
            if frame.seq in session.replies:
                return _ready(loop, replace(session.replies[frame.seq], epoch=session.epoch))
            return asyncio.ensure_future(self._again(session, session.pending[frame.seq]))
        plan = session.check(frame)
        if len(session.pending) >= self._limits.credit:
            raise Refused("credit", f"{len(session.pending)} steps are on their way, {self._limits.credit} are granted")
        stop = frame.pos + frame.rows
        more = max(0, stop - session.tokens) * self._engine.kv_bytes_per_token
        if self._engine.waiting >= self._limits.queue or self.kv_bytes + more > self._limits.kv_bytes:
            raise _TooBusy(0.2)
        job = Job(
            session.state,
            plan,
            frame.pos,
            frame.rows,
            frame.out_rows,
            frame.keep,
            frame.payload,
            session.boundaries[plan.first],
            session.boundaries[plan.second],
            time.monotonic() + frame.deadline_s if frame.deadline_s else _NEVER,
        )
        session.accept(frame)
        done = asyncio.wrap_future(self._engine.submit(job), loop=loop)
        reply = asyncio.ensure_future(self._finished(session, frame, done))
        session.pending[frame.seq] = reply
        self._metrics.level("kv_bytes", self.kv_bytes)
        return asyncio.ensure_future(asyncio.shield(reply))

    async def _again(self, session: Session, pending: asyncio.Future[Frame]) -> Frame:
        reply = await asyncio.shield(pending)
        return replace(reply, epoch=session.epoch)

    async def _finished(self, session: Session, frame: Frame, done: asyncio.Future[bytes]) -> Frame:
        try:
            payload = await done
            stop = frame.pos + frame.rows
            reply = Frame(
                Kind.STEP_OK,
                session.id,
                session.epoch,
                frame.seq,
                pos=stop - frame.out_rows,
                rows=frame.out_rows,
                first=frame.first,
                second=frame.second,
                codec=frame.codec,
                payload=payload,
            )
        except NonFinite as error:
            reply = self._failed(session, frame, Refused("non-finite", str(error)))
        except Expired as error:
            reply = self._failed(session, frame, Refused("expired", str(error)))
        except ValueError as error:
            reply = self._failed(session, frame, Refused("position", str(error)))
        except Exception as error:
            log.exception("step %d of session %s failed", frame.seq, session.id.hex()[:8])
            reply = self._failed(session, frame, Refused("internal", f"the step failed: {type(error).__name__}"))
        session.pending.pop(frame.seq, None)
        session.keep_reply(reply)
        return reply

    def _failed(self, session: Session, frame: Frame, error: Refused) -> Frame:
        # Later steps were accepted on top of this one: the session cannot go on.
        self._metrics.count("errors")
        self._free(session)
        return _refusal(frame, error)

    async def _write(
        self, connection: Connection, session: Session, outbox: asyncio.Queue[asyncio.Future[Frame]]
    ) -> None:
        while True:
            frame = await (await outbox.get())
            await self._send(connection, frame)
            if frame.kind is Kind.ERROR and session.id not in self._attached:
                # A step that failed ended the session; a connection without one would be held by nothing.
                return

    async def _send(self, connection: Connection, frame: Frame) -> None:
        try:
            # Not wait_for: before Python 3.12 it may swallow a cancellation, and the writer would never end.
            async with asyncio.timeout(self._limits.send_s):
                await connection.send(frame.pack())
        except TimeoutError:
            raise LinkDown("the peer does not take its replies") from None

    async def _try_to_send(self, connection: Connection, frame: Frame) -> None:
        try:
            await self._send(connection, frame)
        except LinkDown:
            log.debug("a peer left before its last frame")

    def _dismiss(self, connection: Connection, reason: str) -> None:
        """Close a connection without waiting for it: a peer that is gone does not take part in closing."""
        task = asyncio.create_task(connection.close(reason))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _free(self, session: Session) -> None:
        attached = self._attached.get(session.id)
        if attached is not None and attached.session is session:
            del self._attached[session.id]
            self._engine.free(session.state)
            self._metrics.level("sessions", len(self._attached))
            self._metrics.level("kv_bytes", self.kv_bytes)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._limits.lease_s / 4))
            now = time.monotonic()
            for attached in list(self._attached.values()):
                if attached.session.expires < now and not attached.session.pending:
                    self._metrics.count("sessions_expired")
                    self._free(attached.session)
                    self._dismiss(attached.connection, "the session's lease ended")


class _TooBusy(Exception):
    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


def _answer(kind: Kind, frame: Frame, content: Body) -> Frame:
    return Frame(kind, frame.session, frame.epoch, frame.seq, payload=content.pack())


def _refusal(frame: Frame, error: Refused) -> Frame:
    content = Refusal(code=error.code, message=str(error)[:500], expected=error.expected)
    return _answer(Kind.ERROR, frame, content)


def _ready(loop: asyncio.AbstractEventLoop, frame: Frame) -> asyncio.Future[Frame]:
    done: asyncio.Future[Frame] = loop.create_future()
    done.set_result(frame)
    return done
