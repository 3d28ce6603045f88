"""A host of a few lines: what a service says is answered, and what it raises is refused, whatever the service is."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest

from raycloud.link.channel import Channel, Connection, LinkDown, Loopback
from raycloud.link.frames import Body, Busy, Frame, Kind, Refusal, Resumed, body, unpack
from raycloud.link.hosting import Refused, Session, SessionHost, SessionLimits, TooBusy


class Number(Body):
    value: int


class Adder(SessionHost[Session]):
    """Adds what it is told; what it cannot add it refuses in one way or another."""

    kinds = frozenset({Kind.STEP})

    def __init__(self) -> None:
        self.sums, self.counts = Counter[bytes](), Counter[str]()
        super().__init__(SessionLimits(sessions=2, replies=2, credit=2), self)

    def count(self, name: str, value: float = 1) -> None:
        self.counts[name] += int(value)

    def level(self, name: str, value: float) -> None:
        self.counts[name] = int(value)

    def opening(self, frame: Frame, principal: str) -> Callable[[], Session]:
        start = body(frame, Number).value
        if start < 0:
            raise Refused("start", "a sum begins at 0 or more")

        def make() -> Session:
            self.sums[frame.session] = start
            return Session(id=frame.session, principal=principal, epoch=frame.epoch, limits=SessionLimits(replies=2))

        return make

    def granted(self, session: Session) -> Body:
        return Number(value=self.sums[session.id])

    def begin(self, session: Session, frame: Frame) -> Awaitable[Frame]:
        value = body(frame, Number).value
        if value == 0:
            raise TooBusy(0.25)
        if value < -9:
            raise Refused("large", "too much to take away")
        return self.added(session, value)

    async def added(self, session: Session, value: int) -> Frame:
        await asyncio.sleep(0)
        if value == 13:
            raise Refused("unlucky", "13 is not added")
        if value == 99:
            raise RuntimeError("a secret")
        self.sums[session.id] += value
        return Frame(Kind.STEP_OK, payload=Number(value=self.sums[session.id]).pack())

    def freed(self, session: Session) -> None:
        del self.sums[session.id]


@pytest.fixture
def host() -> Adder:
    return Adder()


@pytest.fixture
def service(host: Adder) -> Iterator[Loopback]:
    async def serve(connection: Connection) -> None:
        await host.serve(connection, "me")

    loopback = Loopback(serve)
    yield loopback
    loopback.close()


def ask(
    channel: Channel, kind: Kind, value: int = 0, *, name: bytes = b"s" * 16, epoch: int = 0, seq: int = 0
) -> Frame:
    channel.send(Frame(kind, name, epoch, seq, payload=Number(value=value).pack()).pack())
    reply = unpack(channel.receive(20))
    assert (reply.session, reply.epoch) == (name, epoch)
    return reply


def refused(frame: Frame) -> tuple[str, str]:
    assert frame.kind is Kind.ERROR, frame
    refusal = body(frame, Refusal)
    return refusal.code, refusal.message


def test_replies_are_of_the_session_and_each_request_is_computed_once(service: Loopback, host: Adder) -> None:
    channel = service.connect()
    assert body(ask(channel, Kind.OPEN, 5), Number).value == 5
    for seq, value in ((1, 10), (2, 20), (2, 20), (1, 10)):
        reply = ask(channel, Kind.STEP, value, seq=seq)
        assert (reply.kind, reply.seq, body(reply, Number).value) == (Kind.STEP_OK, seq, {1: 15, 2: 35}[seq])
    channel.close()
    channel = service.connect()
    assert body(ask(channel, Kind.RESUME, epoch=1), Resumed) == Resumed(next_seq=3)
    assert body(ask(channel, Kind.STEP, 20, epoch=1, seq=2), Number).value == 35
    assert ask(channel, Kind.CLOSE, epoch=1).kind is Kind.CLOSE
    assert not host.sums and host.counts == {"sessions": 0, "sessions_opened": 1}


def test_what_a_service_does_not_grant_changes_nothing(service: Loopback, host: Adder) -> None:
    channel = service.connect()
    assert refused(ask(channel, Kind.OPEN, -1)) == ("start", "a sum begins at 0 or more")
    ask(channel, Kind.OPEN, 1)
    assert refused(ask(channel, Kind.STEP, -10, seq=1))[0] == "large"
    busy = ask(channel, Kind.STEP, 0, seq=1)
    assert busy.kind is Kind.BUSY and body(busy, Busy).retry_after_s == 0.25
    channel.send(Frame(Kind.STEP, b"s" * 16, seq=1, payload=b"\xc1").pack())
    assert refused(unpack(channel.receive(20))) == ("request", "STEP: the body is no MessagePack map")
    assert refused(ask(channel, Kind.ASK, seq=1)) == ("kind", "ASK has no place within a session")
    assert body(ask(channel, Kind.STEP, 1, seq=1), Number).value == 2
    assert host.counts["errors"] == 4


@pytest.mark.parametrize(
    ("value", "said"), [(13, ("unlucky", "13 is not added")), (99, ("internal", "the step failed: RuntimeError"))]
)
def test_a_request_that_fails_ends_its_session(
    value: int, said: tuple[str, str], service: Loopback, host: Adder
) -> None:
    channel = service.connect()
    ask(channel, Kind.OPEN)
    ask(channel, Kind.STEP, 1, seq=1)
    assert refused(ask(channel, Kind.STEP, value, seq=2)) == said
    with pytest.raises(LinkDown):
        channel.receive(20)
    assert not host.sums and host.sessions == 0
    channel = service.connect()
    assert refused(ask(channel, Kind.RESUME, epoch=1))[0] == "unknown-session"


def test_a_session_is_not_made_where_there_is_no_room(service: Loopback, host: Adder) -> None:
    for name in (b"a" * 16, b"b" * 16):
        assert ask(service.connect(), Kind.OPEN, name=name).kind is Kind.OPEN_OK
    assert ask(service.connect(), Kind.OPEN, name=b"c" * 16).kind is Kind.BUSY
    assert refused(ask(service.connect(), Kind.OPEN, -1, name=b"d" * 16))[0] == "start"
    assert host.sums.keys() == {b"a" * 16, b"b" * 16}
