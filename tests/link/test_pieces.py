"""Large messages: joined from their pieces, refused when too large, and continued on the next connection."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.client import SessionClient
from raycloud.link.frames import PIECE_BYTES, Frame, FrameError, unpack
from raycloud.link.pieces import MessageTooLarge, PieceAssembler
from raycloud.link.server import SessionLimits
from tests.link.adder import Adder, AdderKind, Begun, Start

RAW = random.Random(1).randbytes(3 * PIECE_BYTES + 17)
MOST = 4 * PIECE_BYTES


def pieces(raw: bytes = RAW, seq: int = 3) -> list[Frame]:
    frame = Frame(AdderKind.ECHO, seq=seq, body=b"a map", raw=raw)
    return [unpack(data, AdderKind) for data in frame.pieces()]


def test_pieces_make_up_the_message() -> None:
    assembler = PieceAssembler()
    first, *others = pieces()
    assert assembler.add(first, MOST) is None
    assert [assembler.add(piece, MOST) for piece in others[:-1]] == [None, None]
    assert assembler.received(3) == 3 * PIECE_BYTES and assembler.received(4) == 0
    # The last piece may come over another connection, whose epoch the message then has.
    whole = assembler.add(replace(others[-1], epoch=2), MOST)
    assert whole == Frame(AdderKind.ECHO, seq=3, epoch=2, body=b"a map", raw=RAW)
    assert assembler.received(3) == 0
    small = pieces(b"small")[0]
    assert assembler.add(small, MOST) == small


def test_a_message_that_begins_again_replaces_the_one_in_progress() -> None:
    assembler = PieceAssembler()
    assembler.add(pieces()[0], MOST)
    again = [assembler.add(piece, MOST) for piece in pieces(RAW[::-1], seq=4)]
    assert again[-1] is not None and again[-1].raw == RAW[::-1]


@pytest.mark.parametrize(
    "change",
    [{"seq": 4}, {"kind": AdderKind.ADD}, {"offset": 5}, {"rest": 0}, {"rest": 2**31}, {"raw": b""}],
)
def test_a_piece_that_does_not_follow_is_refused(change: dict[str, object]) -> None:
    assembler = PieceAssembler()
    first, second, *_ = pieces()
    assembler.add(first, MOST)
    with pytest.raises(FrameError, match=r"continues no message|the size of the message changed"):
        assembler.add(replace(second, **change), MOST)  # type: ignore[arg-type]


def test_a_message_too_large_is_refused_once_before_it_is_kept() -> None:
    assembler = PieceAssembler()
    first, *others = pieces()
    with pytest.raises(MessageTooLarge, match=f"ECHO: {len(RAW)} raw bytes; allowed: {len(RAW) - 1}"):
        assembler.add(first, len(RAW) - 1)
    assert [assembler.add(piece, len(RAW) - 1) for piece in others] == [None] * 3
    assert assembler.received(3) == 0
    small = pieces(b"small", seq=3)[0]
    assert assembler.add(small, 5) == small


# -- over a link


@pytest.fixture
def host() -> Iterator[Adder]:
    made = Adder(SessionLimits(credit=2))
    yield made
    made.loopback.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.link.client._FIRST_WAIT_S", 0.005)
    monkeypatch.setattr("raycloud.link.client._FAREWELL_S", 0.1)


def client(
    host: Adder, wrap: Callable[[Channel], Channel] = lambda channel: channel, most: int = MOST
) -> SessionClient[bytes, Begun]:
    return SessionClient(
        lambda session: wrap(host.loopback.connect()),
        AdderKind,
        Start(),
        Begun,
        lambda raw: Frame(AdderKind.ECHO, body=b"", raw=raw),
        lambda unanswered: unanswered,
        60.0,
        most_bytes=lambda raw: most,
    )


class Breaking:
    """Channels that break after a number of messages, in each direction counted over all channels, and record sizes."""

    def __init__(self, breaks: set[int]) -> None:
        self._breaks, self._events = breaks, itertools.count()
        self.up, self.down = list[int](), list[int]()

    def __call__(self, inner: Channel) -> Channel:
        outer = self

        class Breakable:
            def send(self, data: bytes) -> None:
                outer.pass_by(inner)
                outer.up.append(len(data))
                inner.send(data)

            def receive(self, timeout_s: float) -> bytes:
                data = inner.receive(timeout_s)
                outer.pass_by(inner)
                outer.down.append(len(data))
                return data

            def close(self) -> None:
                inner.close()

        return Breakable()

    def pass_by(self, inner: Channel) -> None:
        if next(self._events) in self._breaks:
            inner.close()
            raise LinkDown("cut")


def test_large_requests_and_replies_cross_whole(host: Adder) -> None:
    edge = client(host)
    edge.send([RAW, b"small", RAW[:PIECE_BYTES]])
    for raw in (RAW, b"small", RAW[:PIECE_BYTES]):
        asked, reply = edge.receive()
        assert asked == raw and reply.raw == raw[::-1]
    assert edge.meter.messages["ECHO"] == 4 + 1 + 1 == edge.meter.messages["ECHO_OK"]
    edge.close()


@pytest.mark.parametrize("at", range(14))
def test_a_break_at_any_message_changes_no_byte(at: int, host: Adder) -> None:
    breaking = Breaking({at})
    edge = client(host, breaking)
    edge.send([RAW])
    assert edge.receive()[1].raw == RAW[::-1]
    edge.send([b"after"])
    assert edge.receive()[1].raw == b"retfa"
    assert host.counts["computed"] == 2
    edge.close()


def test_a_large_request_and_its_reply_go_on_where_they_broke_off(host: Adder) -> None:
    # OPEN, OPEN_OK, then two pieces of four; later two pieces of the reply.
    breaking = Breaking({4, 12})
    edge = client(host, breaking)
    edge.send([RAW])
    assert edge.receive()[1].raw == RAW[::-1]
    large = [size for size in breaking.up if size > PIECE_BYTES], [size for size in breaking.down if size > PIECE_BYTES]
    assert [len(sizes) for sizes in large] == [3, 3], "a piece crossed twice"
    assert sum(breaking.up) < len(RAW) + 2000 and sum(breaking.down) < len(RAW) + 2000
    edge.close()


def test_a_request_too_large_is_one_line(host: Adder) -> None:
    edge = client(host)
    edge.send([bytes(9 * 2**20)])
    with pytest.raises(LinkError, match=r"^the cloud refused a request: ECHO: 9437184 raw bytes; allowed: 8388608$"):
        edge.receive()
    edge.close()


def test_a_reply_too_large_is_one_line(host: Adder) -> None:
    edge = client(host, most=len(RAW) - 1)
    edge.send([RAW])
    with pytest.raises(LinkError, match=rf"^the cloud's answer is too large: ECHO_OK: {len(RAW)} raw bytes; allowed"):
        edge.receive()
    edge.close()
