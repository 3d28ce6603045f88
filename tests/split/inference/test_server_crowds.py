"""Many and hostile peers: no peer affects another."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import msgpack
import pytest
import torch

from raycloud.link.frames import MAX_FRAME, Frame, ResumeReply, SessionKind, parse_body
from raycloud.split.inference.messages import InferenceKind, OpenInference
from raycloud.split.inference.server import InferenceServer
from tests.clock import Clock
from tests.split.inference.peers import (
    ASKED,
    WIDTH,
    Peer,
    changed,
    coded,
    converse,
    expected,
    generate,
    text,
    turns,
    until,
)


@pytest.mark.waits
def test_a_slow_reader_loses_its_connection_and_holds_nobody_up() -> None:
    async def talk(host: InferenceServer) -> None:
        slow, other = Peer.connect(host), Peer.connect(host, "you", b"t" * 16)
        await slow.opened()
        await other.opened()
        slow.wire.taken.clear()
        for number in range(200):
            slow.say(Frame(SessionKind.PING, slow.session, seq=number))
        await turns()
        # One reply is being sent and 16 wait; who asks for more is not even read any further.
        assert slow.wire.up.qsize() >= 200 - 18
        await generate(other, text(24))
        await slow.served
        assert host.sessions == 2
        back = Peer.connect(host)
        assert (await back.ask(back.resume(1))).kind is SessionKind.RESUMED
        await generate(back, text(8))

    converse(talk, send_s=0.3)


def test_a_peer_that_takes_its_replies_may_ask_as_often_as_it_likes() -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        for number in range(200):
            peer.say(Frame(SessionKind.PING, peer.session, seq=number))
            if number >= 8:
                reply = await peer.hear()
                assert reply and reply.seq == number - 8
        await generate_after(peer, 8)

    async def generate_after(peer: Peer, waiting: int) -> None:
        for _ in range(waiting):
            await peer.hear()
        await generate(peer, text(8))

    converse(talk)


@pytest.mark.waits
def test_steps_of_a_slow_reader_are_resumed_where_it_stopped() -> None:
    async def talk(host: InferenceServer) -> None:
        slow, rows = Peer.connect(host), text(16)
        await slow.opened()
        slow.wire.taken.clear()
        steps = [slow.step(seq, rows[4 * seq - 4 : 4 * seq], 4 * seq - 4) for seq in (1, 2, 3, 4)]
        for step in steps:
            slow.say(step)
        await slow.served
        back = Peer.connect(host)
        resumed = parse_body(await back.ask(back.resume(1)), ResumeReply)
        right = expected(rows, [4, 4, 4, 4])
        for step, payload in zip(steps, right, strict=True):
            assert (await back.ask(replace(step, epoch=1))).raw == payload
        assert 2 <= resumed.next_seq <= 5

    converse(talk, send_s=0.2)


def test_two_hundred_idle_connections_do_not_disturb_a_generation() -> None:
    async def talk(host: InferenceServer) -> None:
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
    """Damage the bytes of a frame in one way."""
    data = bytearray(frame.pack())
    header, step = ("seq", "ack", "offset", "rest"), ("keep", "start", "tokens", "wanted", "start_block", "end_block")
    step = step if frame.kind is InferenceKind.STEP else header
    damages: list[Callable[[], bytes]] = [
        lambda: bytes(data[: rng.randrange(len(data))]),
        lambda: bytes(data) + rng.randbytes(rng.randrange(1, 50)),
        lambda: rng.randbytes(rng.randrange(300)),
        lambda: bytes(data[:at]) + bytes([data[at] ^ rng.randrange(1, 256)]) + bytes(data[at + 1 :]),
        lambda: replace(frame, kind=rng.choice([*SessionKind, *InferenceKind])).pack(),
        lambda: changed(frame, **{rng.choice(header + step): rng.choice((0, 1, 2, 5, 255))}).pack(),
        lambda: changed(frame, **{rng.choice(step): 2**16 - 1}).pack(),
        lambda: replace(frame, raw=rng.randbytes(len(frame.raw))).pack(),
        lambda: replace(frame, raw=coded(torch.full((4, WIDTH), float("nan")))).pack(),
        lambda: replace(frame, epoch=rng.randrange(3), session=rng.randbytes(16)).pack(),
        lambda: frame.pack(),
    ]
    at = rng.randrange(len(data))
    return rng.choice(damages)()


@pytest.mark.waits
def test_ten_thousand_bad_frames_leave_the_host_as_it_was(clock: Clock) -> None:
    rng, rows = random.Random(7), text(4)

    async def vandal(host: InferenceServer, number: int) -> int:
        """Connection that sends invalid frames until the server closes it."""
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
        async with asyncio.timeout(240):
            await peer.served
        return len(frames) + 1

    async def talk(host: InferenceServer) -> None:
        good, said = Peer.connect(host), 0
        await good.opened()
        await generate(good, text(8))
        for first in range(0, 850, 50):
            said += sum(await asyncio.gather(*(vandal(host, first + number) for number in range(50))))
            await good.ask(Frame(SessionKind.PING, good.session))
        assert said >= 10_000
        assert (await good.ask(good.step(3, text(1), 8))).kind is InferenceKind.STEP_OK
        fresh = Peer.connect(host, "you", b"t" * 16)
        await fresh.opened()
        await generate(fresh, text(30))
        await good.ask(Frame(SessionKind.CLOSE, good.session))
        await fresh.ask(Frame(SessionKind.CLOSE, fresh.session))
        clock.sleep(2)
        await until(lambda: host.sessions == 0)

    converse(talk, lease_s=1, sessions=2000, sessions_per_principal=2000, step_tokens=16)


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

    async def talk(host: InferenceServer) -> None:
        for number in range(300):
            peer = Peer.connect(host, session=rng.randbytes(16))
            asked = {name: rng.choice(values) if rng.random() < 0.4 else value for name, value in _asked().items()}
            reply = await peer.ask(Frame(SessionKind.OPEN, peer.session, body=msgpack.packb(asked)))
            assert reply.kind in (SessionKind.OPEN_OK, SessionKind.ERROR), number
            peer.leave()
            await peer.served
        fresh = Peer.connect(host)
        await fresh.opened()
        await generate(fresh, text(8))

    converse(talk, sessions=2000, sessions_per_principal=2000)


def _asked() -> dict[str, object]:
    return {name: getattr(ASKED, name) for name in OpenInference.model_fields}
