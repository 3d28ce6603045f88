"""The cloud's side of the protocol: what opens, resumes and ends a session, and what no peer can do to another."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace

import msgpack
import pytest
import torch

from raycloud.link.frames import MAX_CONTROL, MAX_FRAME, Busy, Frame, Kind, Open, Refusal, Resumed, body
from raycloud.split.cloud.host import Host
from tests.split.cloud.peers import (
    ASKED,
    FIRST,
    NARROW,
    SECOND,
    WIDTH,
    Peer,
    coded,
    converse,
    expected,
    gated,
    generate,
    text,
    until,
)

# -- opening


def test_a_session_is_granted_what_the_limits_allow() -> None:
    async def talk(host: Host) -> None:
        granted = await Peer.connect(host).opened(max_tokens=60)
        assert (granted.lease_s, granted.max_rows, granted.credit) == (7.0, 5, 3)
        assert (granted.max_tokens, granted.replica) == (60, "r1")
        assert (await Peer.connect(host, session=b"t" * 16).opened(max_tokens=10**9)).max_tokens == 90
        assert host.sessions == 2

    converse(talk, lease_s=7, rows=5, credit=3, tokens=90)


def test_no_more_tokens_are_granted_than_the_model_has_positions() -> None:
    async def talk(host: Host) -> None:
        assert (await Peer.connect(host).opened(max_tokens=10**9)).max_tokens == 128

    converse(talk)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"fingerprint": "another"}, "fingerprint", "the edge's model another is not model"),
        ({"calibration": "c"}, "calibration", "calibrated differently"),
        ({"codec": "zip"}, "codec", "no codec 'zip'"),
        ({"codec": "int8"}, "codec", "needs a calibration"),
        ({"firsts": [0]}, "plan", r"blocks \[0, 4\) are asked for, \[1, 5\) are here"),
        ({"seconds": [6]}, "plan", r"blocks \[2, 6\)"),
        ({"seconds": [2**62]}, "plan", "are asked for"),
        ({"seconds": [2**64 - 1]}, "plan", "are asked for"),
        ({"firsts": [-1]}, "codec", "cuts of 0 or more"),
        ({"firsts": [4], "seconds": [2]}, "codec", "at or below"),
    ],
)
def test_openings_that_do_not_fit_are_refused(changes: dict[str, object], code: str, message: str) -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        refusal = await peer.refused(peer.opening(**changes), code)
        assert re.search(message, refusal.message), refusal.message
        assert host.sessions == 0
        await peer.opened()

    converse(talk, part=NARROW)


def test_one_id_is_one_session() -> None:
    async def talk(host: Host) -> None:
        await Peer.connect(host).opened()
        again = Peer.connect(host)
        await again.refused(again.opening(), "session")
        nameless = Peer.connect(host, session=bytes(16))
        await nameless.refused(nameless.opening(), "session")
        assert host.sessions == 1

    converse(talk)


@pytest.mark.parametrize("limits", [{"sessions": 2}, {"sessions_per_principal": 2}])
def test_too_many_sessions_have_to_wait(limits: dict[str, int]) -> None:
    async def talk(host: Host) -> None:
        peers = [Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2, 3)]
        for peer in peers[:2]:
            await peer.opened()
        busy = await peers[2].open()
        assert busy.kind is Kind.BUSY
        assert body(busy, Busy).retry_after_s > 0
        stranger = await Peer.connect(host, "you", b"y" * 16).open()
        assert stranger.kind is (Kind.BUSY if "sessions" in limits else Kind.OPEN_OK)
        await peers[0].ask(Frame(Kind.CLOSE, peers[0].session))
        await peers[2].opened()

    converse(talk, **limits)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.OPEN, Kind.RESUME)])
def test_every_conversation_begins_with_a_session(kind: Kind) -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        refusal = await peer.refused(Frame(kind, peer.session, payload=ASKED.pack()), "handshake")
        assert f"{kind.name} came where OPEN or RESUME should have" in refusal.message

    converse(talk)


def test_attempts_to_open_are_counted() -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        for _ in range(3):
            await peer.refused(peer.opening(fingerprint="another"), "fingerprint")
        assert await peer.hear() is None
        await peer.served
        assert peer.wire.reason == "closed"

    converse(talk)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", msgpack.packb({"codec": 1}), bytes(MAX_CONTROL + 1)],
    ids=["empty", "noise", "map", "huge"],
)
def test_openings_that_cannot_be_read_end_the_connection(payload: bytes) -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        await peer.refused(Frame(Kind.OPEN, peer.session, payload=payload), "frame")
        assert await peer.hear() is None
        await peer.served
        assert host.sessions == 0

    converse(talk)


def test_connections_without_a_session_are_closed_in_time() -> None:
    async def talk(host: Host) -> None:
        silent, slow = Peer.connect(host), Peer.connect(host, session=b"t" * 16)
        await slow.refused(slow.opening(fingerprint="another"), "fingerprint")
        for peer in (silent, slow):
            assert await peer.hear() is None
            await peer.served
            assert peer.wire.reason == "no session was opened within 0.2 s"

    converse(talk, handshake_s=0.2)


# -- steps


def test_steps_give_what_the_middle_gives() -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        await generate(peer, text(30))
        assert host.kv_bytes > 0

    converse(talk)


def test_several_steps_may_be_away_and_are_answered_in_order() -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(12)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            for seq in (1, 2, 3):
                at = 4 * seq - 4
                peer.say(peer.step(seq, rows[at : at + 4], at))
            await asyncio.sleep(0.05)
            gate.open()
            replies = [await peer.hear() for _ in range(3)]
        assert [reply.seq for reply in replies if reply] == [1, 2, 3]
        assert [reply.payload for reply in replies if reply] == expected(rows, [4, 4, 4])

    converse(talk, credit=4)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"codec": 1}, "codec"),
        ({"first": 1}, "plan"),
        ({"second": 5}, "plan"),
        ({"first": SECOND, "second": FIRST}, "plan"),
        ({"rows": 0}, "rows"),
        ({"rows": 5}, "payload"),
        ({"rows": 2**32 - 1}, "rows"),
        ({"pos": 5}, "position"),
        ({"pos": 2**32 - 5}, "tokens"),
        ({"keep": 5}, "position"),
        ({"out_rows": 9}, "rows"),
        ({"payload": bytes(511)}, "payload"),
        ({"payload": b""}, "payload"),
        ({"seq": 3}, "gap"),
        ({"seq": 0}, "gap"),
        ({"kind": Kind.REPLAY}, "rows"),
        ({"kind": Kind.OPEN}, "kind"),
        ({"kind": Kind.STEP_OK}, "kind"),
        ({"kind": Kind.RESUME}, "kind"),
    ],
)
def test_steps_that_do_not_fit_are_refused_and_change_nothing(changes: dict[str, object], code: str) -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(8)
        await peer.opened()
        right = expected(rows, [4, 4])
        assert (await peer.ask(peer.step(1, rows[:4], 0))).payload == right[0]
        step = peer.step(2, rows[4:], 4)
        refusal = await peer.refused(replace(step, **changes), code)  # type: ignore[arg-type]
        assert refusal.expected == (2 if code == "gap" else 0)
        assert (await peer.ask(step)).payload == right[1]

    converse(talk, rows=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_no_numbers_end_their_session_alone(value: float) -> None:
    async def talk(host: Host) -> None:
        peer, other = Peer.connect(host), Peer.connect(host, "you", b"t" * 16)
        await peer.opened()
        await other.opened()
        rows = text(4)
        rows[2, 5] = value
        await peer.refused(peer.step(1, rows, 0), "non-finite")
        assert host.sessions == 1
        await generate(other, text(8))
        assert await peer.hear() is None
        await peer.served

    converse(talk)


def test_a_failed_step_ends_its_connection() -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(4)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            for seq, part in enumerate((rows, rows * float("nan"), rows), start=1):
                peer.say(peer.step(seq, part, 4 * seq - 4))
            await asyncio.sleep(0.05)
            gate.open()
            kinds = [frame and frame.kind for frame in [await peer.hear() for _ in range(3)]]
        # Nothing holds a connection without a session.
        assert kinds == [Kind.STEP_OK, Kind.ERROR, None]
        await peer.served
        assert host.sessions == 0

    converse(talk)


def test_a_step_that_breaks_the_engine_is_answered() -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        await peer.opened()

        def fail(*_: object) -> None:
            raise MemoryError("a secret")

        hook = NARROW.middle.blocks[1].register_forward_pre_hook(fail)
        try:
            refusal = await peer.refused(peer.step(1, text(4), 0), "internal")
        finally:
            hook.remove()
        assert refusal.message == "the step failed: MemoryError"
        fresh = Peer.connect(host)
        await fresh.opened()
        await generate(fresh, text(8))

    converse(talk, part=NARROW)


def test_more_steps_than_the_credit_are_refused() -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(12)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            for seq in (1, 2, 3):
                peer.say(peer.step(seq, rows[4 * seq - 4 : 4 * seq], 4 * seq - 4))
            await asyncio.sleep(0.05)
            gate.open()
            first, second, third = [await peer.hear() for _ in range(3)]
        assert first and second and third
        assert (first.kind, second.kind) == (Kind.STEP_OK, Kind.STEP_OK)
        assert body(third, Refusal).code == "credit"
        await asyncio.sleep(0)
        assert (await peer.ask(peer.step(3, rows[8:], 8))).payload == expected(rows, [4, 4, 4])[2]

    converse(talk, credit=2)


def test_a_full_memory_makes_steps_wait_until_others_left() -> None:
    async def talk(host: Host) -> None:
        peer, other = Peer.connect(host), Peer.connect(host, session=b"t" * 16)
        await peer.opened()
        await other.opened()
        rows = text(8)
        assert (await peer.ask(peer.step(1, rows, 0))).kind is Kind.STEP_OK
        for _ in range(2):
            busy = await other.ask(other.step(1, rows, 0))
            assert busy.kind is Kind.BUSY
            assert busy.seq == 1
        await peer.ask(Frame(Kind.CLOSE, peer.session))
        await generate(other, rows)

    # Keys and values of 12 tokens in 6 blocks of 2 heads of 8 float32.
    converse(talk, kv_bytes=12 * 2 * 6 * 2 * 8 * 4)


def test_a_full_queue_makes_steps_wait() -> None:
    async def talk(host: Host) -> None:
        peers = [Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2, 3)]
        for peer in peers:
            await peer.opened()
        with gated() as gate:
            gate.shut()
            peers[0].say(peers[0].step(1, text(4), 0))
            await asyncio.to_thread(gate.reached.wait, 20)
            peers[1].say(peers[1].step(1, text(4), 0))
            await asyncio.sleep(0.05)
            assert (await peers[2].ask(peers[2].step(1, text(4), 0))).kind is Kind.BUSY
            gate.open()
            for peer in peers[:2]:
                reply = await peer.hear()
                assert reply and reply.kind is Kind.STEP_OK
        await generate(peers[2], text(8))

    converse(talk, queue=1)


def test_a_step_whose_deadline_passed_is_not_computed() -> None:
    async def talk(host: Host) -> None:
        peer, other = Peer.connect(host), Peer.connect(host, session=b"t" * 16)
        await peer.opened()
        await other.opened()
        with gated() as gate:
            gate.shut()
            peer.say(peer.step(1, text(4), 0))
            await asyncio.to_thread(gate.reached.wait, 20)
            other.say(other.step(1, text(4), 0, deadline_s=0.1))
            await asyncio.sleep(0.3)
            gate.open()
            reply = await peer.hear()
            assert reply and reply.kind is Kind.STEP_OK
            late = await other.hear()
            assert late and body(late, Refusal).code == "expired"
            assert gate.steps == 1
        assert host.sessions == 1

    converse(talk)


# -- repeats


def test_repeated_steps_are_answered_from_the_store() -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(12)
        await peer.opened()
        with gated() as gate:
            steps = [peer.step(seq, rows[4 * seq - 4 : 4 * seq], 4 * seq - 4) for seq in (1, 2, 3)]
            replies = [await peer.ask(step) for step in steps]
            for _ in range(2):
                assert [await peer.ask(step) for step in steps] == replies
            assert gate.steps == 3

    converse(talk)


def test_a_step_repeated_while_it_is_computed_is_computed_once() -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(4)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            for _ in range(3):
                peer.say(peer.step(1, rows, 0))
            await asyncio.sleep(0.05)
            gate.open()
            replies = [await peer.hear() for _ in range(3)]
            assert gate.steps == 1
        assert [reply.payload for reply in replies if reply] == expected(rows, [4]) * 3

    converse(talk)


def test_forgotten_replies_are_gone() -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(6)
        await peer.opened()
        for at in range(5):
            await peer.ask(peer.step(at + 1, rows[at : at + 1], at))
        for seq in (1, 3):
            refusal = await peer.refused(peer.step(seq, rows[seq - 1 : seq], seq - 1), "gone")
            assert refusal.expected == 6
        for seq in (4, 5, 6):
            reply = await peer.ask(peer.step(seq, rows[seq - 1 : seq], seq - 1))
            assert reply.payload == expected(rows, [1] * 6)[seq - 1]

    converse(talk, replies=2)


# -- resuming


def test_a_resumed_session_goes_on_without_computing_anew() -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(8)
        await peer.opened()
        first = await peer.ask(peer.step(1, rows[:4], 0))
        peer.leave()
        await peer.served
        assert host.sessions == 1
        with gated() as gate:
            again = Peer.connect(host)
            resumed = await again.ask(again.resume(1))
            assert resumed.kind is Kind.RESUMED
            assert resumed.epoch == 1
            assert body(resumed, Resumed) == Resumed(tokens=4, next_seq=2)
            assert await again.ask(again.step(1, rows[:4], 0)) == replace(first, epoch=1)
            assert gate.steps == 0
            await generate(again, rows, seq=1)

    converse(talk)


def test_a_step_that_was_computed_meanwhile_is_not_computed_again() -> None:
    async def talk(host: Host) -> None:
        peer, rows = Peer.connect(host), text(4)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            peer.say(peer.step(1, rows, 0))
            await asyncio.to_thread(gate.reached.wait, 20)
            peer.leave()
            await peer.served
            again = Peer.connect(host)
            resumed = await again.ask(again.resume(1))
            assert body(resumed, Resumed) == Resumed(tokens=4, next_seq=2)
            again.say(again.step(1, rows, 0))
            await asyncio.sleep(0.05)
            gate.open()
            reply = await again.hear()
            assert gate.steps == 1
        assert reply and (reply.epoch, reply.payload) == (1, expected(rows, [4])[0])

    converse(talk)


def test_an_older_connection_is_fenced_off() -> None:
    async def talk(host: Host) -> None:
        zombie, rows = Peer.connect(host), text(8)
        await zombie.opened()
        await zombie.ask(zombie.step(1, rows[:4], 0))
        peer = Peer.connect(host)
        assert (await peer.ask(peer.resume(1))).kind is Kind.RESUMED
        await zombie.served
        assert zombie.wire.reason == "another connection resumed the session"
        for epoch in (0, 1):
            late = Peer.connect(host)
            await late.refused(late.resume(epoch), "epoch")
        assert (await peer.ask(peer.step(2, rows[4:], 4))).payload == expected(rows, [4, 4])[1]
        assert host.sessions == 1

    converse(talk)


@pytest.mark.parametrize("kind", [Kind.STEP, Kind.CLOSE, Kind.PING])
def test_frames_of_an_older_epoch_are_refused(kind: Kind) -> None:
    async def talk(host: Host) -> None:
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
    async def talk(host: Host) -> None:
        dead = Peer.connect(host)
        await dead.opened()
        closed, waiting = asyncio.Event(), dead.wire.close

        async def close(reason: str) -> None:
            await closed.wait()
            await waiting(reason)

        dead.wire.close = close  # type: ignore[method-assign]
        peer = Peer.connect(host)
        async with asyncio.timeout(0.4):
            assert (await peer.ask(peer.resume(1))).kind is Kind.RESUMED
        # Now the first resume's own connection is superseded, as it must be known by then.
        last = Peer.connect(host)
        await last.ask(last.resume(2))
        await peer.served
        await generate(last, text(8))
        closed.set()

    converse(talk, handshake_s=0.5)


def test_nobody_else_can_resume_a_session_or_learn_of_it() -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        thief, guesser = Peer.connect(host, "you"), Peer.connect(host, "you", b"t" * 16)
        real = await thief.ask(thief.resume(1))
        made_up = await guesser.ask(guesser.resume(1))
        assert body(real, Refusal) == body(made_up, Refusal)
        assert body(real, Refusal).code == "unknown-session"
        await generate(peer, text(8))
        assert peer.epoch == 0
        assert host.sessions == 1

    converse(talk)


def test_a_connection_speaks_for_its_own_session_only() -> None:
    async def talk(host: Host) -> None:
        peer, other = Peer.connect(host), Peer.connect(host, "you", b"t" * 16)
        await peer.opened()
        await other.opened()
        await other.refused(replace(other.step(1, text(4), 0), session=peer.session), "frame")
        await generate(peer, text(8))

    converse(talk)


# -- ends


def test_silent_sessions_are_freed_and_their_memory_with_them() -> None:
    async def talk(host: Host) -> None:
        quiet, away, busy = (Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2, 3))
        for peer in (quiet, away, busy):
            await peer.opened()
            await generate(peer, text(4))
        away.leave()
        await away.served
        until_freed = time.monotonic() + 20
        while host.sessions > 1:
            assert time.monotonic() < until_freed
            assert (await busy.ask(Frame(Kind.PING, busy.session, seq=9))).seq == 9
            await asyncio.sleep(0.05)
        assert await quiet.hear() is None
        await quiet.served
        assert quiet.wire.reason == "the session's lease ended"
        assert host.kv_bytes == 4 * 2 * 6 * 2 * 8 * 4
        again = Peer.connect(host, session=quiet.session)
        await again.refused(again.resume(1), "unknown-session")
        reply = await busy.ask(busy.step(2, text(1), 4))
        assert reply.kind is Kind.STEP_OK

    converse(talk, lease_s=1.5)


def test_a_session_with_a_step_away_outlives_its_lease() -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            peer.say(peer.step(1, text(4), 0))
            await asyncio.sleep(0.6)
            assert host.sessions == 1
            gate.open()
            reply = await peer.hear()
        assert reply and reply.kind is Kind.STEP_OK
        await until(lambda: host.sessions == 0)

    converse(talk, lease_s=0.2)


def test_a_peer_that_does_not_take_part_in_closing_does_not_hold_up_the_leases() -> None:
    async def talk(host: Host) -> None:
        peers = [Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2)]
        for peer in peers:
            await peer.opened()
        closed, waiting = asyncio.Event(), peers[0].wire.close

        async def close(reason: str) -> None:
            await closed.wait()
            await waiting(reason)

        peers[0].wire.close = close  # type: ignore[method-assign]
        await until(lambda: host.sessions == 0)
        assert await peers[1].hear() is None
        closed.set()

    converse(talk, lease_s=0.2)


def test_closing_frees_the_session_at_once() -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        await generate(peer, text(8))
        assert (await peer.ask(Frame(Kind.CLOSE, peer.session))).kind is Kind.CLOSE
        assert (host.sessions, host.kv_bytes) == (0, 0)
        assert await peer.hear() is None
        await peer.served
        again = Peer.connect(host)
        await again.refused(again.resume(1), "unknown-session")
        await again.opened()
        await generate(again, text(8))

    converse(talk)


def test_what_an_ended_session_still_had_away_does_not_touch_its_successor() -> None:
    async def talk(host: Host) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            peer.say(peer.step(1, text(4) * float("nan"), 0))
            peer.say(peer.step(2, text(4), 4))
            other = Peer.connect(host, "you", b"t" * 16)
            await other.opened()
            other.say(other.step(1, text(4), 0))
            await asyncio.sleep(0.05)
            peer.say(Frame(Kind.CLOSE, peer.session))
            await until(lambda: host.sessions == 1)
            successor = Peer.connect(host)
            await successor.opened()
            gate.open()
            assert await other.hear()
        await generate(successor, text(8))
        assert host.sessions == 2

    converse(talk)


def test_leaving_says_goodbye_to_everyone() -> None:
    async def talk(host: Host) -> None:
        peers = [Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2, 3)]
        for peer in peers:
            await peer.opened()
        peers[1].wire.taken.clear()
        await host.leave()
        for peer in (peers[0], peers[2]):
            farewell = await peer.hear()
            assert farewell and farewell.kind is Kind.GOAWAY
            assert await peer.hear() is None
        assert host.sessions == 0
        late = Peer.connect(host)
        assert (await late.open()).kind is Kind.BUSY
        late.leave()

    converse(talk, send_s=0.2)


# -- crowds and vandals


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
