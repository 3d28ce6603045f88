"""End of sessions: leases, close, and requests in flight."""

from __future__ import annotations

import asyncio

import pytest

from raycloud.link.frames import Frame, SessionKind
from raycloud.split.inference.messages import InferenceKind
from raycloud.split.inference.server import InferenceServer
from tests.clock import Clock
from tests.split.inference.peers import (
    Peer,
    converse,
    gated,
    generate,
    text,
    turns,
    until,
)


@pytest.mark.waits
def test_silent_sessions_are_freed_and_their_memory_with_them(clock: Clock) -> None:
    async def talk(host: InferenceServer) -> None:
        quiet, away, busy = (Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2, 3))
        for peer in (quiet, away, busy):
            await peer.opened()
            await generate(peer, text(4))
        away.leave()
        await away.served
        clock.sleep(0.9)
        assert (await busy.ask(Frame(SessionKind.PING, busy.session, seq=9))).seq == 9
        assert host.sessions == 3
        clock.sleep(0.9)
        await until(lambda: host.sessions == 1)
        assert await quiet.hear() is None
        await quiet.served
        assert quiet.wire.reason == "the session's lease ended"
        assert host.kv_bytes == 4 * 2 * 6 * 2 * 8 * 4
        again = Peer.connect(host, session=quiet.session)
        await again.refused(again.resume(1), "unknown-session")
        reply = await busy.ask(busy.step(2, text(1), 4))
        assert reply.kind is InferenceKind.STEP_OK

    converse(talk, lease_s=1)


@pytest.mark.waits
def test_a_session_with_a_step_away_outlives_its_lease(clock: Clock) -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            peer.say(peer.step(1, text(4), 0))
            await turns()
            clock.sleep(1)
            await asyncio.sleep(0.3)  # several sweeps
            assert host.sessions == 1
            gate.open()
            reply = await peer.hear()
        assert reply and reply.kind is InferenceKind.STEP_OK
        clock.sleep(1)
        await until(lambda: host.sessions == 0)

    converse(talk, lease_s=0.2)


@pytest.mark.waits
def test_a_peer_that_does_not_take_part_in_closing_does_not_hold_up_the_leases(clock: Clock) -> None:
    async def talk(host: InferenceServer) -> None:
        peers = [Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2)]
        for peer in peers:
            await peer.opened()
        closed, waiting = asyncio.Event(), peers[0].wire.close

        async def close(reason: str) -> None:
            await closed.wait()
            await waiting(reason)

        peers[0].wire.close = close  # type: ignore[method-assign]
        clock.sleep(1)
        await until(lambda: host.sessions == 0)
        assert await peers[1].hear() is None
        closed.set()

    converse(talk, lease_s=0.2)


def test_closing_frees_the_session_at_once() -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        await generate(peer, text(8))
        assert (await peer.ask(Frame(SessionKind.CLOSE, peer.session))).kind is SessionKind.CLOSE
        assert (host.sessions, host.kv_bytes) == (0, 0)
        assert await peer.hear() is None
        await peer.served
        again = Peer.connect(host)
        await again.refused(again.resume(1), "unknown-session")
        await again.opened()
        await generate(again, text(8))

    converse(talk)


def test_what_an_ended_session_still_had_away_does_not_touch_its_successor() -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            peer.say(peer.step(1, text(4) * float("nan"), 0))
            peer.say(peer.step(2, text(4), 4))
            other = Peer.connect(host, "you", b"t" * 16)
            await other.opened()
            other.say(other.step(1, text(4), 0))
            await turns()
            peer.say(Frame(SessionKind.CLOSE, peer.session))
            await until(lambda: host.sessions == 1)
            successor = Peer.connect(host)
            await successor.opened()
            gate.open()
            assert await other.hear()
        await generate(successor, text(8))
        assert host.sessions == 2

    converse(talk)


@pytest.mark.waits
def test_leaving_says_goodbye_to_everyone() -> None:
    async def talk(host: InferenceServer) -> None:
        peers = [Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2, 3)]
        for peer in peers:
            await peer.opened()
        peers[1].wire.taken.clear()
        await host.leave()
        for peer in (peers[0], peers[2]):
            farewell = await peer.hear()
            assert farewell and farewell.kind is SessionKind.GOAWAY
            assert await peer.hear() is None
        assert host.sessions == 0
        late = Peer.connect(host)
        assert (await late.open()).kind is SessionKind.BUSY
        late.leave()

    converse(talk, send_s=0.2)
