"""Crowds and vandals: what no peer can do to another."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace

import msgpack
import torch

from raycloud.link.frames import MAX_FRAME, Frame, Kind, Open, Resumed, body
from raycloud.split.cloud.host import Host
from tests.split.cloud.peers import (
    ASKED,
    WIDTH,
    Peer,
    coded,
    converse,
    expected,
    generate,
    text,
    until,
)


def test_a_slow_reader_loses_its_connection_and_holds_nobody_up() -> None:
    async def talk(host: Host) -> None:
        slow, other = Peer.connect(host), Peer.connect(host, "you", b"t" * 16)
        await slow.opened()
        await other.opened()
        slow.wire.taken.clear()
        for number in range(200):
            slow.say(Frame(Kind.PING, slow.session, seq=number))
        await asyncio.sleep(0.05)
        # One reply is being sent and 16 wait; who asks for more is not even read any further.
        assert slow.wire.up.qsize() >= 200 - 18
        await generate(other, text(24))
        started = time.monotonic()
        await slow.served
        assert time.monotonic() - started < 5
        assert host.sessions == 2
        back = Peer.connect(host)
        assert (await back.ask(back.resume(1))).kind is Kind.RESUMED
        await generate(back, text(8))

    converse(talk, send_s=0.3)


def test_a_peer_that_takes_its_replies_may_ask_as_often_as_it_likes() -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        for number in range(200):
            peer.say(Frame(Kind.PING, peer.session, seq=number))
            if number >= 8:
                reply = await peer.hear()
                assert reply and reply.seq == number - 8
        await generate_after(peer, 8)

    async def generate_after(peer: Peer, waiting: int) -> None:
        for _ in range(waiting):
            await peer.hear()
        await generate(peer, text(8))

    converse(talk)


def test_steps_of_a_slow_reader_are_resumed_where_it_stopped() -> None:
    async def talk(host: Host) -> None:
        slow, rows = Peer.connect(host), text(16)
        await slow.opened()
        slow.wire.taken.clear()
        steps = [slow.step(seq, rows[4 * seq - 4 : 4 * seq], 4 * seq - 4) for seq in (1, 2, 3, 4)]
        for step in steps:
            slow.say(step)
        await slow.served
        back = Peer.connect(host)
        resumed = body(await back.ask(back.resume(1)), Resumed)
        right = expected(rows, [4, 4, 4, 4])
        for step, payload in zip(steps, right, strict=True):
            assert (await back.ask(replace(step, epoch=1))).payload == payload
        assert 2 <= resumed.next_seq <= 5

    converse(talk, send_s=0.2)


def test_two_hundred_idle_connections_do_not_disturb_a_generation() -> None:
    async def talk(host: Host) -> None:
        idle = [Peer.connect(host, session=number.to_bytes(16, "big")) for number in range(1, 201)]
        for number, peer in enumerate(idle):
            if number % 2:
                await peer.opened()
        busy = Peer.connect(host)
        await busy.opened()
        await generate(busy, text(32))
        assert host.sessions == 101

    converse(talk, sessions=200, sessions_per_principal=200)


def _vandalise(rng: random.Random, frame: Frame) -> bytes:
    """The bytes of a frame after one kind of damage."""
    data = bytearray(frame.pack())
    numbers = ("seq", "ack", "keep", "pos", "rows", "out_rows", "first", "second", "codec")
    damages: list[Callable[[], bytes]] = [
        lambda: bytes(data[: rng.randrange(len(data))]),
        lambda: bytes(data) + rng.randbytes(rng.randrange(1, 50)),
        lambda: rng.randbytes(rng.randrange(300)),
        lambda: bytes(data[:at]) + bytes([data[at] ^ rng.randrange(1, 256)]) + bytes(data[at + 1 :]),
        lambda: replace(frame, kind=rng.choice(list(Kind))).pack(),
        lambda: replace(frame, **{rng.choice(numbers): rng.choice((0, 1, 2, 5, 255))}).pack(),
        lambda: replace(frame, **{rng.choice(numbers[2:6]): 2**32 - 1}).pack(),
        lambda: replace(frame, payload=rng.randbytes(len(frame.payload))).pack(),
        lambda: replace(frame, payload=coded(torch.full((4, WIDTH), float("nan")))).pack(),
        lambda: replace(frame, epoch=rng.randrange(3), session=rng.randbytes(16)).pack(),
        lambda: frame.pack(),
    ]
    at = rng.randrange(len(data))
    return rng.choice(damages)()


def test_ten_thousand_bad_frames_leave_the_host_as_it_was() -> None:
    rng, rows = random.Random(7), text(4)

    async def vandal(host: Host, number: int) -> int:
        """One connection that says what it should not until it is thrown out."""
        peer = Peer.connect(host, f"vandal {number % 5}", rng.randbytes(16))
        if number % 7:
            peer.say(peer.opening() if number % 3 else _vandalise(rng, peer.opening()))
        frames = [_vandalise(rng, peer.step(seq, rows, 4 * seq - 4)) for seq in range(1, 12)]
        if not number % 4:
            rng.shuffle(frames)
        if not number % 400:
            frames.append(bytes(MAX_FRAME + 1))
        for frame in frames:
            peer.say(frame)
        # Those who may stay say so in the end, the others are gone by then.
        peer.leave()
        async with asyncio.timeout(20):
            await peer.served
        return len(frames) + 1

    async def talk(host: Host) -> None:
        good, said = Peer.connect(host), 0
        await good.opened()
        await generate(good, text(8))
        for first in range(0, 850, 50):
            said += sum(await asyncio.gather(*(vandal(host, first + number) for number in range(50))))
            await good.ask(Frame(Kind.PING, good.session))
        assert said >= 10_000
        assert (await good.ask(good.step(3, text(1), 8))).kind is Kind.STEP_OK
        fresh = Peer.connect(host, "you", b"t" * 16)
        await fresh.opened()
        await generate(fresh, text(30))
        await good.ask(Frame(Kind.CLOSE, good.session))
        await fresh.ask(Frame(Kind.CLOSE, fresh.session))
        await until(lambda: host.sessions == 0)

    converse(talk, lease_s=1.5, sessions=2000, sessions_per_principal=2000, rows=16)


def test_openings_with_odd_values_never_break_the_host() -> None:
    rng = random.Random(3)
    values: list[object] = [
        None,
        -1,
        0,
        2**63,
        2**64 - 1,
        "",
        "x" * 200,
        [],
        [0],
        [2**60],
        [1] * 600,
        {},
        1.5,
        True,
        b"b",
    ]

    async def talk(host: Host) -> None:
        for number in range(300):
            peer = Peer.connect(host, session=rng.randbytes(16))
            asked = {name: rng.choice(values) if rng.random() < 0.4 else value for name, value in _asked().items()}
            reply = await peer.ask(Frame(Kind.OPEN, peer.session, payload=msgpack.packb(asked)))
            assert reply.kind in (Kind.OPEN_OK, Kind.ERROR), number
            peer.leave()
            await peer.served
        fresh = Peer.connect(host)
        await fresh.opened()
        await generate(fresh, text(8))

    converse(talk, sessions=2000, sessions_per_principal=2000)


def _asked() -> dict[str, object]:
    return {name: getattr(ASKED, name) for name in Open.model_fields}
