"""Generations over a link: the tokens of the unsplit model whatever breaks, and one clear line where nothing helps."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch

from raycloud.data.batches import Sample
from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.codecs.boundary import plain_boundary
from raycloud.link.frames import Busy, Frame, Kind, Opened, Refusal, Resumed, unpack
from raycloud.models.segments import Segment
from raycloud.split.calibration import calibrate
from raycloud.split.middle import LocalMiddle, Trip, middle_state
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.remote import RemoteMiddle
from raycloud.split.terms import Codecs
from raycloud.split.triad import Triad
from tests.models.families import tiny
from tests.split.wiring import BLOCKS, WIDTH, Cloud, Script, cloud

PLANS = [
    PlanSet((2,), (4,)),
    PlanSet((0,), (6,)),
    PlanSet((1,), (6,)),
    PlanSet((0,), (3,)),
    PlanSet((0, 1, 3), (2, 4, 6)),
]
FIXED, DRAWN = PLANS[0], PLANS[-1]
NEW = 12
PROMPT = torch.randint(3, 97, (33,), generator=torch.Generator().manual_seed(3)).tolist()


def name(plans: PlanSet) -> str:
    return f"{plans.firsts}-{plans.seconds}".replace(" ", "")


@cache
def stock(family: str = "llama", length: int = 33, new: int = NEW) -> list[int]:
    """What the unsplit model says."""
    model = tiny(family, dtype=torch.float32, seed=4)
    ids = torch.tensor([PROMPT[:length]])
    made = model.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    return made[0, length:].tolist()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.split.remote._FIRST_WAIT_S", 0.005)


@pytest.fixture(scope="module")
def there() -> Iterator[Cloud]:
    with cloud() as made:
        yield made


# -- nothing breaks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_are_those_of_the_unsplit_model(family: str) -> None:
    with cloud(family) as there:
        for plans in PLANS:
            for chunk in (1, 7, 16):
                assert list(there.edge(plans, chunk=chunk).stream(PROMPT, NEW)) == stock(family), (plans, chunk)
        assert there.settled() == 0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rows", [5, 16])
def test_prompts_longer_than_a_step_go_in_several(rows: int, seed: int) -> None:
    with cloud(rows=rows) as there:
        for plans in PLANS:
            assert list(there.edge(plans, chunk=64, seed=seed).stream(PROMPT, NEW)) == stock(), plans


def test_rows_that_no_frame_can_hold_go_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cloud would take 64 rows, a frame holds 5."""
    monkeypatch.setattr("raycloud.split.remote.MAX_FRAME", 80 + 5 * WIDTH * 4 + 100)
    with cloud(rows=64) as there:
        for plans in (FIXED, DRAWN):
            assert list(there.edge(plans, chunk=20).stream(PROMPT, NEW)) == stock()


@pytest.mark.parametrize("plans", PLANS, ids=name)
@pytest.mark.parametrize("rows", [5, 16])
def test_logits_of_several_tokens_come_back(plans: PlanSet, rows: int) -> None:
    model, ids = tiny("llama", dtype=torch.float32, seed=4), torch.tensor([PROMPT])
    with torch.no_grad():
        right = model(input_ids=ids).logits
    with cloud(rows=rows) as there:
        triad = there.edge(plans).open()
        for start, stop in ((0, 1), (1, 14), (14, 33)):
            logits = triad.advance(ids[:, start:stop], logits=stop - start)
            torch.testing.assert_close(logits, right[:, start:stop], rtol=1e-4, atol=1e-4)
        triad.close()


def test_two_generations_at_once_do_not_mix(there: Cloud) -> None:
    made: dict[int, list[int]] = {}

    def run(number: int) -> None:
        plans, length = PLANS[number % len(PLANS)], 20 + number
        made[number] = list(there.edge(plans, seed=number).stream(PROMPT[:length], NEW))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == {number: stock(length=20 + number) for number in range(5)}


def test_closing_frees_the_session_even_in_the_middle(there: Cloud) -> None:
    stream = there.edge(FIXED).stream(PROMPT, NEW)
    assert [next(stream) for _ in range(3)] == stock()[:3]
    assert there.host.sessions == 1
    stream.close()  # type: ignore[attr-defined]
    assert there.settled() == 0


# -- channels break


def cut_at(event: int, lose: Callable[[], None] = lambda: None) -> Callable[[str, int, bytes], bytes]:
    def hook(what: str, number: int, data: bytes) -> bytes:
        if number == event:
            lose()
            raise LinkDown(f"cut at {what}")
        return data

    return hook


def events(there: Cloud, plans: PlanSet, limit: int) -> int:
    """Points at which the channel of a generation may break: before and after each frame of either direction."""
    script = Script(there.connect, lambda what, number, data: data)
    list(there.edge(plans, script, chunk=10).stream(PROMPT[:20], limit))
    return script.events


@pytest.mark.parametrize("loses", [False, True], ids=["cut", "cut-and-lost"])
@pytest.mark.parametrize("plans", [FIXED, PLANS[1], DRAWN], ids=name)
def test_a_cut_at_any_moment_changes_nothing(there: Cloud, plans: PlanSet, loses: bool) -> None:
    right = stock(length=20)[:4]
    total = events(there, plans, 4)
    assert total >= 4 * (1 + 2 + 3)
    for event in range(total - 2):  # the last two are of CLOSE
        script = Script(there.connect, cut_at(event, there.forget if loses else lambda: None))
        made = list(there.edge(plans, script, chunk=10).stream(PROMPT[:20], 4))
        assert made == right, event
        # After a frame was sent, the answer may have been faster than the cut.
        assert script.channels >= 2 or event % 2, event
    there.forget()


@pytest.mark.parametrize("plans", [FIXED, DRAWN], ids=name)
@pytest.mark.parametrize("gap", [1, 2, 3])
def test_two_cuts_close_to_each_other_change_nothing(there: Cloud, plans: PlanSet, gap: int) -> None:
    """The second hits while the first is mended: OPEN_OK, RESUMED or a replay is lost as well."""
    right, total = stock(length=20)[:3], events(there, plans, 3)
    for event in range(0, total - 2, 3):

        def hook(what: str, number: int, data: bytes, event: int = event) -> bytes:
            if number == event:
                there.forget()
            if number in (event, event + gap):
                raise LinkDown("cut")
            return data

        made = list(there.edge(plans, Script(there.connect, hook), chunk=10).stream(PROMPT[:20], 3))
        assert made == right, event
    there.forget()


def test_the_answer_to_a_new_beginning_may_be_lost(there: Cloud) -> None:
    """A session begun anew whose OPEN_OK never arrived must not be taken for the one that was lost."""
    lost = Counter[str]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        if number == 20:
            there.forget()
            raise LinkDown("cut")
        if what == "received" and number > 20 and unpack(data).kind is Kind.OPEN_OK and lost["times"] < 2:
            lost["times"] += 1
            raise LinkDown("cut")
        return data

    edge = there.edge(FIXED, Script(there.connect, hook), patience_s=10.0)
    assert list(edge.stream(PROMPT, NEW)) == stock()
    assert lost["times"] == 2
    there.forget()


@pytest.mark.parametrize("plans", [FIXED, PLANS[1], DRAWN], ids=name)
@pytest.mark.parametrize("after", [1, 6, 11])
def test_a_cloud_that_lost_everything_is_brought_up_to_date(there: Cloud, plans: PlanSet, after: int) -> None:
    made, kinds = [], Counter[Kind]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        if what == "send":
            kinds[unpack(data).kind] += 1
        return data

    for token in there.edge(plans, Script(there.connect, hook)).stream(PROMPT, NEW):
        made.append(token)
        if len(made) == after:
            there.forget()
    assert made == stock()
    # Whatever a drawn plan asks for next; from token 0 on there may be nothing to repeat.
    assert kinds[Kind.OPEN] == 2
    assert kinds[Kind.REPLAY] >= (1 if plans.fixed else 0)


@pytest.mark.parametrize("direction", ["send", "received"])
def test_a_flipped_byte_in_transit_changes_nothing(there: Cloud, direction: str) -> None:
    rng = random.Random(5)
    damaged = Counter[str]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        if what == direction and rng.random() < 0.15:
            damaged[what] += 1
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]
        return data

    for plans in (FIXED, DRAWN):
        assert list(there.edge(plans, Script(there.connect, hook)).stream(PROMPT, NEW)) == stock()
    assert damaged[direction] >= 4
    there.forget()


def test_replies_that_come_twice_or_are_dropped_change_nothing(there: Cloud) -> None:
    """A dropped message is noticed by its silence."""
    dropped = Counter[str]()

    class Odd:
        def __init__(self, inner: Channel) -> None:
            self._inner, self._again = inner, b""

        def send(self, data: bytes) -> None:
            for _ in range(2 if unpack(data).kind is Kind.STEP else 1):
                self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            data = self._inner.receive(timeout_s)
            if unpack(data).kind is Kind.STEP_OK and dropped["seen"] == 7:
                dropped["times"] += 1
                data = self._inner.receive(timeout_s)
            dropped["seen"] += 1
            return data

        def close(self) -> None:
            self._inner.close()

    edge = there.edge(FIXED, lambda session: Odd(there.connect()), patience_s=3.0)
    assert list(edge.stream(PROMPT, NEW)) == stock()
    assert dropped["times"] == 1


# -- clouds that are busy, silent or unwilling


class Actor:
    """A cloud of a few lines: answers each frame by a function, or not at all."""

    def __init__(self, answer: Callable[[Frame], list[Frame]]) -> None:
        self._answer, self._back = answer, list[bytes]()
        self.heard: list[Kind] = []
        self.connections = 0

    def __call__(self, session: str) -> Actor:
        self.connections += 1
        self._back.clear()
        return self

    def send(self, data: bytes) -> None:
        frame = unpack(data)
        self.heard.append(frame.kind)
        self._back += [reply.pack() for reply in self._answer(frame)]

    def receive(self, timeout_s: float) -> bytes:
        if not self._back:
            time.sleep(max(0.0, timeout_s))
            raise TimeoutError
        return self._back.pop(0)

    def close(self) -> None:
        pass


GRANT = Frame(Kind.OPEN_OK, payload=Opened(lease_s=60, max_tokens=128, max_rows=16, credit=4).pack())


def refusal(code: str, seq: int = 0) -> Frame:
    return Frame(Kind.ERROR, seq=seq, payload=Refusal(code=code, message=f"because of {code}").pack())


def one_line(caught: pytest.ExceptionInfo[LinkError]) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    assert not isinstance(caught.value, LinkDown)
    return message


def test_a_cloud_that_cannot_be_reached_is_given_up_within_patience(there: Cloud) -> None:
    def refuse(session: str) -> Channel:
        raise LinkDown("connection refused")

    started = time.monotonic()
    with pytest.raises(LinkError, match=r"no answer from the cloud within 0\.5 s: connection refused") as caught:
        RemoteMiddle(refuse, there.terms(FIXED, patience_s=0.5))
    one_line(caught)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("opens", [False, True])
def test_a_cloud_that_never_answers_is_given_up_within_patience(there: Cloud, opens: bool) -> None:
    def answer(frame: Frame) -> list[Frame]:
        if opens and frame.kind is Kind.OPEN:
            return [GRANT]
        if opens and frame.kind is Kind.RESUME:
            return [Frame(Kind.RESUMED, payload=Resumed(tokens=0, next_seq=1).pack())]
        return []

    started = time.monotonic()
    with pytest.raises(LinkError, match=r"no answer from the cloud within 0\.6 s: no reply in time") as caught:
        list(there.edge(FIXED, Actor(answer), patience_s=0.6).stream(PROMPT[:4], 2))
    one_line(caught)
    assert time.monotonic() - started < 4


def test_patience_is_per_answer_not_per_generation(there: Cloud) -> None:
    def hook(what: str, number: int, data: bytes) -> bytes:
        if what == "send" and unpack(data).kind is Kind.STEP:
            time.sleep(0.06)
        return data

    edge = there.edge(FIXED, Script(there.connect, hook), patience_s=0.9)
    stream = edge.stream(PROMPT[:4], NEW)
    made = []
    for token in stream:
        made.append(token)
        if len(made) == 2:
            time.sleep(1.2)  # whoever reads may take their time
    assert made == stock(length=4)


@pytest.mark.parametrize("code", ["fingerprint", "calibration", "codec", "plan", "epoch"])
def test_a_refused_session_is_an_error_at_once(there: Cloud, code: str) -> None:
    actor = Actor(lambda frame: [refusal(code)])
    with pytest.raises(LinkError, match=f"the cloud refused the session: because of {code}") as caught:
        RemoteMiddle(actor, there.terms(FIXED))
    one_line(caught)
    assert actor.connections == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fingerprint": "another"}, "model another is not model"), ({"plans": PlanSet((0,), (7,))}, "asked for")],
)
def test_terms_that_the_cloud_does_not_share_are_refused(
    there: Cloud, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(LinkError, match=message) as caught:
        RemoteMiddle(there.connect, replace(there.terms(FIXED), **changes))  # type: ignore[arg-type]
    one_line(caught)


def test_a_constructor_that_fails_leaves_no_channel_open(there: Cloud) -> None:
    closed = []

    class Watched(Actor):
        def close(self) -> None:
            closed.append(True)

    with pytest.raises(LinkError):
        RemoteMiddle(Watched(lambda frame: [refusal("fingerprint")]), there.terms(FIXED))
    assert closed


@pytest.mark.parametrize("code", ["credit", "non-finite", "internal", "position", "payload"])
def test_a_refused_step_is_an_error_at_once(there: Cloud, code: str) -> None:
    actor = Actor(lambda frame: [GRANT if frame.kind is Kind.OPEN else refusal(code, frame.seq)])
    with pytest.raises(LinkError, match=f"the cloud refused a step: because of {code}") as caught:
        list(there.edge(FIXED, actor).stream(PROMPT[:4], 2))
    one_line(caught)
    assert actor.connections == 1


@pytest.mark.parametrize("rows", [3, 5])
def test_other_rows_than_those_asked_for_are_an_error(there: Cloud, rows: int) -> None:
    def answer(frame: Frame) -> list[Frame]:
        return [GRANT if frame.kind is Kind.OPEN else Frame(Kind.STEP_OK, seq=frame.seq, rows=rows)]

    with pytest.raises(LinkError, match=f"sent {rows} rows from token 0, asked were 4 from 0") as caught:
        list(there.edge(FIXED, Actor(answer)).stream(PROMPT[:4], 2))
    one_line(caught)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "infinities or NaN"), (None, "cannot be decoded")])
def test_rows_that_are_no_numbers_are_an_error(there: Cloud, value: float | None, message: str) -> None:
    rows = torch.full((4, WIDTH), value or 0.0)
    payload = plain_boundary("float32", WIDTH).encode(rows, 0).numpy().tobytes()[: None if value else -1]

    def answer(frame: Frame) -> list[Frame]:
        return [GRANT if frame.kind is Kind.OPEN else Frame(Kind.STEP_OK, seq=frame.seq, rows=4, payload=payload)]

    with pytest.raises(LinkError, match=message) as caught:
        list(there.edge(FIXED, Actor(answer)).stream(PROMPT[:4], 2))
    one_line(caught)


@pytest.mark.parametrize("kind", [Kind.BUSY, Kind.GOAWAY])
def test_a_session_that_is_put_off_is_opened_later(there: Cloud, kind: Kind) -> None:
    put_off = Counter[str]()

    class Reluctant:
        def __init__(self, inner: Channel) -> None:
            self._inner, self._busy = inner, put_off["times"] < 3

        def send(self, data: bytes) -> None:
            if not self._busy:
                self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            if self._busy:
                put_off["times"] += 1
                return Frame(kind, payload=Busy(retry_after_s=0.01).pack()).pack()
            return self._inner.receive(timeout_s)

        def close(self) -> None:
            self._inner.close()

    assert list(there.edge(FIXED, lambda session: Reluctant(there.connect())).stream(PROMPT, NEW)) == stock()
    assert put_off["times"] == 3


@pytest.mark.parametrize("refused", [1, 2, 4])
def test_steps_that_are_put_off_are_sent_again_and_no_more_often_than_needed(there: Cloud, refused: int) -> None:
    """Four steps are away when one of them is put off, several times: those behind it are gaps."""
    sent, busy = Counter[int](), Counter[int]()

    class Reluctant:
        def __init__(self, inner: Channel) -> None:
            self._inner, self._back = inner, list[bytes]()

        def send(self, data: bytes) -> None:
            frame = unpack(data)
            if frame.kind is Kind.STEP:
                sent[frame.seq] += 1
                if frame.seq == refused and busy[refused] < 5:
                    # In the order of the stream: what is ahead is answered first.
                    busy[refused] += 1
                    self._inner.send(Frame(Kind.PING, frame.session, frame.epoch, frame.seq).pack())
                    return
            self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            data = self._inner.receive(timeout_s)
            frame = unpack(data)
            if frame.kind is Kind.PING:
                body = Busy(retry_after_s=0.01)
                return Frame(Kind.BUSY, frame.session, frame.epoch, frame.seq, payload=body.pack()).pack()
            return data

        def close(self) -> None:
            self._inner.close()

    edge = there.edge(FIXED, lambda session: Reluctant(there.connect()), chunk=6)
    assert list(edge.stream(PROMPT, NEW)) == stock()
    assert sent[refused] == 6
    assert all(times <= 3 for seq, times in sent.items() if seq != refused), sent


def test_a_cloud_that_stays_busy_is_given_up_within_patience(there: Cloud) -> None:
    def answer(frame: Frame) -> list[Frame]:
        busy = Frame(Kind.BUSY, seq=frame.seq, payload=Busy(retry_after_s=0.05).pack())
        return [GRANT if frame.kind is Kind.OPEN else busy]

    started = time.monotonic()
    with pytest.raises(LinkError, match=r"no answer from the cloud within 0\.5 s: it is busy") as caught:
        list(there.edge(FIXED, Actor(answer), patience_s=0.5).stream(PROMPT[:4], 2))
    one_line(caught)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("code", ["gone", "unknown-session", "expired"])
@pytest.mark.parametrize("plans", [FIXED, DRAWN], ids=name)
def test_steps_that_are_lost_for_good_begin_a_new_session(there: Cloud, code: str, plans: PlanSet) -> None:
    told = Counter[str]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        frame = unpack(data) if data else None
        if what == "received" and frame and frame.kind is Kind.STEP_OK and frame.seq in (3, 9) and told["times"] < 2:
            told["times"] += 1
            return refusal(code, frame.seq).pack()
        return data

    assert list(there.edge(plans, Script(there.connect, hook)).stream(PROMPT, NEW)) == stock()
    assert told["times"] == 2
    assert there.settled() == 0


def test_more_tokens_than_granted_are_an_error() -> None:
    with cloud(tokens=40) as there:
        edge = there.edge(FIXED)
        assert list(edge.stream(PROMPT, 8)) == stock()[:8]
        with pytest.raises(LinkError, match="the cloud grants 40 tokens, 41 are needed") as caught:
            list(edge.stream(PROMPT, NEW))
        one_line(caught)
        assert there.settled() == 0


# -- what the edge may ask for


def test_a_batch_is_refused(there: Cloud) -> None:
    middle = RemoteMiddle(there.connect, there.terms(FIXED))
    rows = torch.zeros(2, 3, WIDTH)
    with pytest.raises(ValueError, match="one text per session, got a batch of 2"):
        middle.send(Trip(SplitPlan(2, 4), rows, 0, 3, 0))
    with pytest.raises(ValueError, match="one text per session"):
        middle.send(Trip(SplitPlan(2, 4), rows[:1], 0, 3, 0, valid=torch.ones(1, 3, dtype=torch.bool)))
    middle.close()
    with pytest.raises(ValueError, match="batch of 2"):
        there.edge(FIXED).generate([PROMPT[:4], PROMPT[:4]], 2)
    assert there.settled() == 0


def test_rows_have_to_follow(there: Cloud) -> None:
    middle = RemoteMiddle(there.connect, there.terms(FIXED))
    rows = torch.randn(1, 4, WIDTH)
    middle.send(Trip(SplitPlan(2, 4), rows, 0, 4, 0))
    assert middle.receive().shape == (1, 4, WIDTH)
    assert middle.held(2) == 4
    for start in (3, 5):
        with pytest.raises(ValueError, match=f"rows begin at token {start} where 4 should follow"):
            middle.send(Trip(SplitPlan(2, 4), rows, start, 4, 4))
    middle.close()


def test_tokens_to_keep_that_the_cloud_never_had_are_an_error(there: Cloud) -> None:
    middle = RemoteMiddle(there.connect, there.terms(FIXED))
    middle.send(Trip(SplitPlan(2, 4), torch.randn(1, 4, WIDTH), 0, 4, 9))
    with pytest.raises(LinkError, match="do not follow 9 of 0 tokens"):
        middle.receive()
    middle.close()
    assert there.settled() == 0


@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("plans", PLANS, ids=name)
def test_forgotten_tokens_are_forgotten_on_both_sides(there: Cloud, plans: PlanSet, loses: bool) -> None:
    ids = torch.tensor([PROMPT])
    other = (ids + 5) % 90 + 3
    with torch.no_grad():
        right = there.model(input_ids=ids).logits
    for seed in range(1 if plans.fixed else 3):
        triad = there.edge(plans, seed=seed).open()
        triad.advance(ids[:, :10])
        for keep, stop in ((10, 15), (12, 20), (4, 30), (30, 33), (0, 33)):
            triad.advance(other[:, :3])
            triad.rollback(min(keep, triad.tokens - 3) if triad.tokens > keep else triad.tokens)
            if loses:
                there.forget()
            logits = triad.advance(ids[:, triad.tokens : stop])
            torch.testing.assert_close(logits[:, -1], right[:, stop - 1], rtol=1e-4, atol=1e-4)
        triad.close()
    there.forget()


# -- codecs


def test_int8_over_a_link_is_int8_in_the_same_process_and_survives_replays() -> None:
    model = tiny("llama", dtype=torch.float32, seed=4)
    texts = torch.randint(3, 97, (8, 48), generator=torch.Generator().manual_seed(9))
    calibration = calibrate(model, [Sample(tuple(row.tolist()), len(row)) for row in texts], [2, 4])
    codecs = Codecs(WIDTH, calibration)

    class Lossy(LocalMiddle):
        """The codec's loss without a link."""

        def send(self, trip: Trip) -> None:
            up = codecs.boundary("int8", trip.plan.first)
            rows = up.decode(up.encode(trip.rows[0], trip.start), trip.start, trip.rows.shape[1])
            super().send(Trip(trip.plan, rows[None], trip.start, trip.wanted, trip.keep))
            down, back = codecs.boundary("int8", trip.plan.second), self._back.pop()[0]
            at = trip.stop - trip.wanted
            self._back.append(down.decode(down.encode(back, at), at, trip.wanted)[None])

    def logits(triad: Triad, lose: Callable[[int], None]) -> list[torch.Tensor]:
        ids, made = torch.tensor([PROMPT]), []
        for at in range(0, 33, 3):
            lose(at)
            made.append(triad.advance(ids[:, at : at + 3], logits=3))
        triad.close()
        return made

    middle = Lossy(middle_state(Segment(model, 2, 4, embed=False, head=False), FIXED, BLOCKS))
    first, last = Segment(model, 0, 2, head=False), Segment(model, 4, BLOCKS, embed=False)
    right = logits(Triad(first, last, middle, FIXED), lambda at: None)
    rows, replayed = {2: b""}, list[bytes]()

    def watch(what: str, number: int, data: bytes) -> bytes:
        if what == "send" and (frame := unpack(data)).kind is Kind.STEP:
            rows[2] += frame.payload if len(rows[2]) == codecs.boundary("int8", 2).payload_bytes(0, frame.pos) else b""
        elif what == "send" and frame.kind is Kind.REPLAY:
            begin = codecs.boundary("int8", 2).payload_bytes(0, frame.pos)
            replayed.append(frame.payload)
            assert rows[2][begin : begin + len(frame.payload)] == frame.payload
        return data

    with cloud(codecs=codecs) as there:
        clean = logits(there.edge(FIXED, codec="int8").open(), lambda at: None)
        edge = there.edge(FIXED, Script(there.connect, watch), codec="int8")
        mended = logits(edge.open(), lambda at: there.forget() if at in (3, 15, 30) else None)
    assert len(replayed) == 1 + 1 + 2
    for ours, local in zip(clean, right, strict=True):
        assert torch.equal(ours, local)
    # The same bytes in pieces of other sizes: sums differ in their last bits, and so may a code by one level.
    for ours, local in zip(mended, right, strict=True):
        torch.testing.assert_close(ours, local, rtol=0, atol=0.1)
