"""Steps of a session: outputs of the middle, refusals, waiting, and steps that are computed only once."""

from __future__ import annotations

import asyncio

import pytest

from raycloud.link.frames import ErrorReply, Frame, SessionKind, parse_body
from raycloud.split.inference.messages import InferenceKind
from raycloud.split.inference.server import InferenceServer
from tests.split.inference.peers import (
    FIRST,
    NARROW,
    SECOND,
    Peer,
    changed,
    converse,
    expected,
    gated,
    generate,
    text,
    turns,
)


def test_steps_give_what_the_middle_gives() -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        await peer.opened()
        await generate(peer, text(30))
        assert host.kv_bytes > 0

    converse(talk)


def test_several_steps_may_be_away_and_are_answered_in_order() -> None:
    async def talk(host: InferenceServer) -> None:
        peer, rows = Peer.connect(host), text(12)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            for seq in (1, 2, 3):
                at = 4 * seq - 4
                peer.say(peer.step(seq, rows[at : at + 4], at))
            await turns()
            gate.open()
            replies = [await peer.hear() for _ in range(3)]
        assert [reply.seq for reply in replies if reply] == [1, 2, 3]
        assert [reply.raw for reply in replies if reply] == expected(rows, [4, 4, 4])

    converse(talk, credit=4)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"start_block": 1}, "plan"),
        ({"end_block": 5}, "plan"),
        ({"start_block": SECOND, "end_block": FIRST}, "plan"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 5}, "payload"),
        ({"tokens": 2**16 - 1}, "tokens"),
        ({"start": 5}, "position"),
        ({"start": 2**32 - 5}, "tokens"),
        ({"keep": 5}, "position"),
        ({"wanted": 9}, "tokens"),
        ({"raw": bytes(511)}, "payload"),
        ({"raw": b""}, "payload"),
        ({"body": b"short"}, "request"),
        ({"seq": 3}, "gap"),
        ({"seq": 0}, "gap"),
        ({"kind": InferenceKind.REPLAY}, "tokens"),
        ({"kind": SessionKind.OPEN}, "kind"),
        ({"kind": InferenceKind.STEP_OK}, "kind"),
        ({"kind": SessionKind.RESUME}, "kind"),
    ],
)
def test_steps_that_do_not_fit_are_refused_and_change_nothing(changes: dict[str, object], code: str) -> None:
    async def talk(host: InferenceServer) -> None:
        peer, rows = Peer.connect(host), text(8)
        await peer.opened()
        right = expected(rows, [4, 4])
        assert (await peer.ask(peer.step(1, rows[:4], 0))).raw == right[0]
        step = peer.step(2, rows[4:], 4)
        await peer.refused(changed(step, **changes), code)
        assert (await peer.ask(step)).raw == right[1]

    converse(talk, step_tokens=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_no_numbers_end_their_session_alone(value: float) -> None:
    async def talk(host: InferenceServer) -> None:
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
    async def talk(host: InferenceServer) -> None:
        peer, rows = Peer.connect(host), text(4)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            for seq, part in enumerate((rows, rows * float("nan"), rows), start=1):
                peer.say(peer.step(seq, part, 4 * seq - 4))
            await turns()
            gate.open()
            kinds = [frame and frame.kind for frame in [await peer.hear() for _ in range(3)]]
        # Nothing holds a connection without a session.
        assert kinds == [InferenceKind.STEP_OK, SessionKind.ERROR, None]
        await peer.served
        assert host.sessions == 0

    converse(talk)


def test_a_step_that_breaks_the_engine_is_answered() -> None:
    async def talk(host: InferenceServer) -> None:
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
    async def talk(host: InferenceServer) -> None:
        peer, rows = Peer.connect(host), text(12)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            for seq in (1, 2, 3):
                peer.say(peer.step(seq, rows[4 * seq - 4 : 4 * seq], 4 * seq - 4))
            await turns()
            gate.open()
            first, second, third = [await peer.hear() for _ in range(3)]
        assert first and second and third
        assert (first.kind, second.kind) == (InferenceKind.STEP_OK, InferenceKind.STEP_OK)
        assert parse_body(third, ErrorReply).code == "credit"
        await turns()
        assert (await peer.ask(peer.step(3, rows[8:], 8))).raw == expected(rows, [4, 4, 4])[2]

    converse(talk, credit=2)


def test_a_full_memory_makes_steps_wait_until_others_left() -> None:
    async def talk(host: InferenceServer) -> None:
        peer, other = Peer.connect(host), Peer.connect(host, session=b"t" * 16)
        await peer.opened()
        await other.opened()
        rows = text(8)
        assert (await peer.ask(peer.step(1, rows, 0))).kind is InferenceKind.STEP_OK
        for _ in range(2):
            busy = await other.ask(other.step(1, rows, 0))
            assert busy.kind is SessionKind.BUSY
            assert busy.seq == 1
        await peer.ask(Frame(SessionKind.CLOSE, peer.session))
        await generate(other, rows)

    # Keys and values of 12 tokens in 6 blocks of 2 heads of 8 float32.
    converse(talk, kv_bytes=12 * 2 * 6 * 2 * 8 * 4)


def test_a_full_queue_makes_steps_wait() -> None:
    async def talk(host: InferenceServer) -> None:
        peers = [Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2, 3)]
        for peer in peers:
            await peer.opened()
        with gated() as gate:
            gate.shut()
            peers[0].say(peers[0].step(1, text(4), 0))
            await asyncio.to_thread(gate.reached.wait, 120)
            peers[1].say(peers[1].step(1, text(4), 0))
            await turns()
            assert (await peers[2].ask(peers[2].step(1, text(4), 0))).kind is SessionKind.BUSY
            gate.open()
            for peer in peers[:2]:
                reply = await peer.hear()
                assert reply and reply.kind is InferenceKind.STEP_OK
        await generate(peers[2], text(8))

    converse(talk, queue=1)


@pytest.mark.waits
def test_a_step_whose_deadline_passed_is_not_computed() -> None:
    async def talk(host: InferenceServer) -> None:
        peer, other = Peer.connect(host), Peer.connect(host, session=b"t" * 16)
        await peer.opened()
        await other.opened()
        with gated() as gate:
            gate.shut()
            peer.say(peer.step(1, text(4), 0))
            await asyncio.to_thread(gate.reached.wait, 120)
            other.say(other.step(1, text(4), 0, deadline=1))
            await asyncio.sleep(0.3)
            gate.open()
            reply = await peer.hear()
            assert reply and reply.kind is InferenceKind.STEP_OK
            late = await other.hear()
            assert late and parse_body(late, ErrorReply).code == "expired"
            assert gate.steps == 1
        assert host.sessions == 1

    converse(talk)


def test_repeated_steps_are_answered_from_the_store() -> None:
    async def talk(host: InferenceServer) -> None:
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
    async def talk(host: InferenceServer) -> None:
        peer, rows = Peer.connect(host), text(4)
        await peer.opened()
        with gated() as gate:
            gate.shut()
            for _ in range(3):
                peer.say(peer.step(1, rows, 0))
            await turns()
            gate.open()
            replies = [await peer.hear() for _ in range(3)]
            assert gate.steps == 1
        assert [reply.raw for reply in replies if reply] == expected(rows, [4]) * 3

    converse(talk)


def test_forgotten_replies_are_gone() -> None:
    async def talk(host: InferenceServer) -> None:
        peer, rows = Peer.connect(host), text(6)
        await peer.opened()
        for at in range(5):
            await peer.ask(peer.step(at + 1, rows[at : at + 1], at))
        for seq in (1, 3):
            await peer.refused(peer.step(seq, rows[seq - 1 : seq], seq - 1), "gone")
        for seq in (4, 5, 6):
            reply = await peer.ask(peer.step(seq, rows[seq - 1 : seq], seq - 1))
            assert reply.raw == expected(rows, [1] * 6)[seq - 1]

    converse(talk, credit=2)
