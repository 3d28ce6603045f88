"""A host of a few lines: what a service says is answered, and what it raises is refused, whatever the service is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import Busy, Frame, Kind, Refusal, Resumed, body, unpack
from raycloud.link.hosting import SessionLimits
from tests.link.adder import Adder, Begun, Number


@pytest.fixture
def host() -> Iterator[Adder]:
    made = Adder(SessionLimits(sessions=2, credit=2))
    yield made
    made.loopback.close()


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


def test_replies_are_of_the_session_and_each_request_is_computed_once(host: Adder) -> None:
    channel = host.loopback.connect()
    assert body(ask(channel, Kind.OPEN, 5), Begun).start == 5
    for seq, value in ((1, 10), (2, 20), (2, 20), (1, 10)):
        reply = ask(channel, Kind.STEP, value, seq=seq)
        assert (reply.kind, reply.seq, body(reply, Number).value) == (Kind.STEP_OK, seq, {1: 15, 2: 35}[seq])
    channel.close()
    channel = host.loopback.connect()
    assert body(ask(channel, Kind.RESUME, epoch=1), Resumed) == Resumed(next_seq=3)
    assert body(ask(channel, Kind.STEP, 20, epoch=1, seq=2), Number).value == 35
    assert ask(channel, Kind.CLOSE, epoch=1).kind is Kind.CLOSE
    assert not host.sums and host.counts == {"sessions": 0, "sessions_opened": 1}


def test_what_a_service_does_not_grant_changes_nothing(host: Adder) -> None:
    channel = host.loopback.connect()
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
def test_a_request_that_fails_ends_its_session(value: int, said: tuple[str, str], host: Adder) -> None:
    channel = host.loopback.connect()
    ask(channel, Kind.OPEN)
    ask(channel, Kind.STEP, 1, seq=1)
    assert refused(ask(channel, Kind.STEP, value, seq=2)) == said
    with pytest.raises(LinkDown):
        channel.receive(20)
    assert not host.sums and host.sessions == 0
    channel = host.loopback.connect()
    assert refused(ask(channel, Kind.RESUME, epoch=1))[0] == "unknown-session"


def test_a_session_is_not_made_where_there_is_no_room(host: Adder) -> None:
    for name in (b"a" * 16, b"b" * 16):
        assert ask(host.loopback.connect(), Kind.OPEN, name=name).kind is Kind.OPEN_OK
    assert ask(host.loopback.connect(), Kind.OPEN, name=b"c" * 16).kind is Kind.BUSY
    assert refused(ask(host.loopback.connect(), Kind.OPEN, -1, name=b"d" * 16))[0] == "start"
    assert host.sums.keys() == {b"a" * 16, b"b" * 16}
