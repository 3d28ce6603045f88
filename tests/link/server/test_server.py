"""Session server with a minimal service: results are answered and errors refused, for any service."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import pytest

from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import (
    BusyReply,
    ErrorReply,
    Frame,
    Packable,
    ResumeReply,
    ResumeRequest,
    SessionKind,
    parse_body,
    unpack,
)
from raycloud.link.server import SessionLimits
from tests.link.adder import Adder, AdderKind, Begun, Number, Start


@pytest.fixture
def host() -> Iterator[Adder]:
    made = Adder(SessionLimits(sessions=2, credit=2))
    yield made
    made.loopback.close()


def ask(
    channel: Channel, kind: IntEnum, value: int = 0, *, name: bytes = b"s" * 16, epoch: int = 0, seq: int = 0
) -> Frame:
    bodies: dict[IntEnum, Packable] = {SessionKind.OPEN: Start(value=value), SessionKind.RESUME: ResumeRequest()}
    channel.send(Frame(kind, name, epoch, seq, body=bodies.get(kind, Number(value=value)).pack()).pack())
    reply = unpack(channel.receive(60), AdderKind)
    assert (reply.session, reply.epoch) == (name, epoch)
    return reply


def refused(frame: Frame) -> tuple[str, str]:
    assert frame.kind is SessionKind.ERROR, frame
    refusal = parse_body(frame, ErrorReply)
    return refusal.code, refusal.message


def test_replies_are_of_the_session_and_each_request_is_computed_once(host: Adder) -> None:
    channel = host.loopback.connect()
    assert parse_body(ask(channel, SessionKind.OPEN, 5), Begun).start == 5
    for seq, value in ((1, 10), (2, 20), (2, 20), (1, 10)):
        reply = ask(channel, AdderKind.ADD, value, seq=seq)
        assert (reply.kind, reply.seq, parse_body(reply, Number).value) == (AdderKind.ADD_OK, seq, {1: 15, 2: 35}[seq])
    channel.close()
    channel = host.loopback.connect()
    assert parse_body(ask(channel, SessionKind.RESUME, epoch=1), ResumeReply) == ResumeReply(next_seq=3)
    assert parse_body(ask(channel, AdderKind.ADD, 20, epoch=1, seq=2), Number).value == 35
    assert ask(channel, SessionKind.CLOSE, epoch=1).kind is SessionKind.CLOSE
    assert not host.sums and host.counts == {"sessions": 0, "sessions_opened": 1, "computed": 2}


def test_what_a_service_does_not_grant_changes_nothing(host: Adder) -> None:
    channel = host.loopback.connect()
    assert refused(ask(channel, SessionKind.OPEN, -1)) == ("start", "a sum begins at 0 or more")
    ask(channel, SessionKind.OPEN, 1)
    assert refused(ask(channel, AdderKind.ADD, -10, seq=1))[0] == "large"
    busy = ask(channel, AdderKind.ADD, 0, seq=1)
    assert busy.kind is SessionKind.BUSY and parse_body(busy, BusyReply).retry_after_s == 0.25
    channel.send(Frame(AdderKind.ADD, b"s" * 16, seq=1, body=b"\xc1").pack())
    assert refused(unpack(channel.receive(60), AdderKind)) == ("request", "ADD: the body is no MessagePack map")
    assert refused(ask(channel, AdderKind.ADD_OK, seq=1)) == ("kind", "ADD_OK has no place within a session")
    assert parse_body(ask(channel, AdderKind.ADD, 1, seq=1), Number).value == 2
    assert host.counts["errors"] == 4


@pytest.mark.parametrize(
    ("value", "said"), [(13, ("unlucky", "13 is not added")), (99, ("internal", "the add failed: RuntimeError"))]
)
def test_a_request_that_fails_ends_its_session(value: int, said: tuple[str, str], host: Adder) -> None:
    channel = host.loopback.connect()
    ask(channel, SessionKind.OPEN)
    ask(channel, AdderKind.ADD, 1, seq=1)
    assert refused(ask(channel, AdderKind.ADD, value, seq=2)) == said
    with pytest.raises(LinkDown):
        channel.receive(20)
    assert not host.sums and host.sessions == 0
    channel = host.loopback.connect()
    assert refused(ask(channel, SessionKind.RESUME, epoch=1))[0] == "unknown-session"


def test_a_session_is_not_made_where_there_is_no_room(host: Adder) -> None:
    for name in (b"a" * 16, b"b" * 16):
        assert ask(host.loopback.connect(), SessionKind.OPEN, name=name).kind is SessionKind.OPEN_OK
    assert ask(host.loopback.connect(), SessionKind.OPEN, name=b"c" * 16).kind is SessionKind.BUSY
    assert refused(ask(host.loopback.connect(), SessionKind.OPEN, -1, name=b"d" * 16))[0] == "start"
    assert host.sums.keys() == {b"a" * 16, b"b" * 16}
