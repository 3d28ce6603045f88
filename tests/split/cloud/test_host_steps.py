"""Steps of a session: what the middle gives, what is refused, what waits, and what is computed only once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from raycloud.link.frames import Frame, Kind, Refusal, body
from raycloud.split.cloud.host import Host
from tests.split.cloud.peers import (
    FIRST,
    NARROW,
    SECOND,
    Peer,
    converse,
    expected,
    gated,
    generate,
    text,
)


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

    converse(talk, credit=2)
