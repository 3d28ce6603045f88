"""Sessions resumed over another connection, only by their owner."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from enum import IntEnum

import pytest

from raycloud.link.frames import ErrorReply, ResumeReply, SessionKind, parse_body
from raycloud.split.inference.messages import InferenceKind
from raycloud.split.inference.server import InferenceServer
from tests.split.inference.peers import (
    Peer,
    converse,
    expected,
    gated,
    generate,
    text,
    turns,
)


def test_a_resumed_session_goes_on_without_computing_anew() -> None:
    async def talk(host: InferenceServer) -> None:
        peer, rows = Peer.connect(host), text(8)
        await peer.opened()
        first = await peer.ask(peer.step(1, rows[:4], 0))
        peer.leave()
        await peer.served
        assert host.sessions == 1
        with gated() as gate:
            again = Peer.connect(host)
            resumed = await again.ask(again.resume(1))
            assert resumed.kind is SessionKind.RESUMED
            assert resumed.epoch == 1
            assert parse_body(resumed, ResumeReply) == ResumeReply(next_seq=2)
            assert await again.ask(again.step(1, rows[:4], 0)) == replace(first, epoch=1)
            assert gate.steps == 0
            await generate(again, rows, seq=1)

    converse(talk)


def test_a_step_that_was_computed_meanwhile_is_not_computed_again() -> None:
    async def talk(host: InferenceServer) -> None:
        peer, rows = Peer.connect(host), text(4)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            peer.say(peer.step(1, rows, 0))
            await asyncio.to_thread(gate.reached.wait, 120)
            peer.leave()
            await peer.served
            again = Peer.connect(host)
            resumed = await again.ask(again.resume(1))
            assert parse_body(resumed, ResumeReply) == ResumeReply(next_seq=2)
            again.say(again.step(1, rows, 0))
            await turns()
            gate.open()
            reply = await again.hear()
            assert gate.steps == 1
        assert reply and (reply.epoch, reply.raw) == (1, expected(rows, [4])[0])

    converse(talk)


def test_an_older_connection_is_fenced_off() -> None:
    async def talk(host: InferenceServer) -> None:
        zombie, rows = Peer.connect(host), text(8)
        await zombie.opened()
        await zombie.ask(zombie.step(1, rows[:4], 0))
        peer = Peer.connect(host)
        assert (await peer.ask(peer.resume(1))).kind is SessionKind.RESUMED
        await zombie.served
        assert zombie.wire.reason == "another connection resumed the session"
        for epoch in (0, 1):
            late = Peer.connect(host)
            await late.refused(late.resume(epoch), "epoch")
        assert (await peer.ask(peer.step(2, rows[4:], 4))).raw == expected(rows, [4, 4])[1]
        assert host.sessions == 1

    converse(talk)


@pytest.mark.parametrize("kind", [InferenceKind.STEP, SessionKind.CLOSE, SessionKind.PING])
def test_frames_of_an_older_epoch_are_refused(kind: IntEnum) -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        peer.leave()
        await peer.served
        peer = Peer.connect(host)
        await peer.ask(peer.resume(5))
        await peer.refused(replace(peer.step(1, text(4), 0), kind=kind, epoch=4), "frame")
        assert await peer.hear() is None
        assert host.sessions == 1

    converse(talk)


def test_a_peer_that_does_not_take_part_in_closing_does_not_hold_up_a_resume() -> None:
    async def talk(host: InferenceServer) -> None:
        dead = Peer.connect(host)
        await dead.opened()
        closed, waiting = asyncio.Event(), dead.wire.close

        async def close(reason: str) -> None:
            await closed.wait()
            await waiting(reason)

        dead.wire.close = close  # type: ignore[method-assign]
        peer = Peer.connect(host)
        assert (await peer.ask(peer.resume(1))).kind is SessionKind.RESUMED
        # Now the first resume's own connection is superseded, as it must be known by then.
        last = Peer.connect(host)
        await last.ask(last.resume(2))
        await peer.served
        await generate(last, text(8))
        closed.set()

    # Who waited for the dead one would be cut off after this time.
    converse(talk, handshake_s=20)


def test_nobody_else_can_resume_a_session_or_learn_of_it() -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        thief, guesser = Peer.connect(host, "you"), Peer.connect(host, "you", b"t" * 16)
        real = await thief.ask(thief.resume(1))
        made_up = await guesser.ask(guesser.resume(1))
        assert parse_body(real, ErrorReply) == parse_body(made_up, ErrorReply)
        assert parse_body(real, ErrorReply).code == "unknown-session"
        await generate(peer, text(8))
        assert peer.epoch == 0
        assert host.sessions == 1

    converse(talk)


def test_a_connection_speaks_for_its_own_session_only() -> None:
    async def talk(host: InferenceServer) -> None:
        peer, other = Peer.connect(host), Peer.connect(host, "you", b"t" * 16)
        await peer.opened()
        await other.opened()
        await other.refused(replace(other.step(1, text(4), 0), session=peer.session), "frame")
        await generate(peer, text(8))

    converse(talk)
