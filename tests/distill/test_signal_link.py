"""Signals over a link: what arrives is what is observed, and nothing that goes wrong on the way gets through."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from raycloud.data.batches import IGNORE, Batch, Sample, collate
from raycloud.distill.signal_file import FileSignals, Origin, gathering
from raycloud.distill.signal_link import LinkSignals, SignalHost, SignalLimits, TeacherLink
from raycloud.distill.signal_link import edge as edge_side
from raycloud.distill.signal_link.messages import (
    PART_BYTES,
    Ask,
    Offer,
    Told,
    pack_batch,
    split_off,
    told,
    unpack_batch,
    with_bytes,
)
from raycloud.distill.signals import Signal, SignalKind, SignalRecipe, frozen_head, observe
from raycloud.distill.signals.keys import joined
from raycloud.distill.signals.layout import layout, most_bytes
from raycloud.errors import DataError, LinkError
from raycloud.link.channel import Channel, LinkDown, Loopback, Metered
from raycloud.link.frames import Frame, FrameError, Kind, Refusal, body, unpack
from raycloud.link.meter import Meter
from raycloud.link.network import Network, Shaped
from raycloud.models.segments import Segment
from tests.models.families import tiny

SAMPLES = [Sample(tuple((11 * n + 3 * i) % 97 for i in range(3 + 5 * n)), n) for n in range(5)]
TAUS = (1.0, 2.0)
LIMITS = SignalLimits(samples=8, length=40, tokens=240, handshake_s=2, send_s=5)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("gemma3-untied", dtype=torch.float32)


@pytest.fixture(scope="module")
def host(model: PreTrainedModel) -> SignalHost:
    return SignalHost(model, "teacher@1", "words", LIMITS)


@pytest.fixture(scope="module")
def loopback(host: SignalHost) -> Iterator[Loopback]:
    service = Loopback(host.serve)
    yield service
    service.close()


@pytest.fixture
def link(loopback: Loopback) -> Iterator[TeacherLink]:
    opened = TeacherLink(loopback.connect, timeout_s=20)
    yield opened
    opened.close()


@pytest.fixture
def batch() -> Batch:
    return collate(SAMPLES, pad=3)


def recipe(kind: SignalKind, codec: str = "float32") -> SignalRecipe:
    return SignalRecipe(kind=kind, codec=codec, k=5, draws=9)  # type: ignore[arg-type]


def same(found: Signal, expected: Signal) -> bool:
    assert found.payload.keys() == expected.payload.keys()
    assert replace(found, payload={}) == replace(expected, payload={})
    return all(torch.equal(found.payload[name], expected.payload[name]) for name in expected.payload)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", get_args(SignalKind))
def test_every_kind_arrives_as_observed(
    kind: SignalKind, codec: str, link: TeacherLink, model: PreTrainedModel, batch: Batch
) -> None:
    if codec == "int8" and kind != "hidden":
        return
    wanted = recipe(kind, codec)
    expected = observe(Segment(model), "teacher@1", batch, wanted, TAUS)
    found = LinkSignals(link, link.origin(wanted, TAUS)).signal(batch)
    assert same(found, expected)
    words, width = model.get_output_embeddings().weight.shape
    most = most_bytes(layout(wanted, len(TAUS), batch.targets, words, width))
    assert expected.nbytes <= most
    if "drawn" not in expected.payload:
        assert expected.nbytes == most


def test_tables_arrive_bit_by_bit(link: TeacherLink, model: PreTrainedModel, batch: Batch) -> None:
    for codec in ("float32", "bfloat16", "int8"):
        expected = frozen_head(Segment(model), codec)
        head = link.head(codec)
        assert torch.equal(head.weight, expected.weight) and head.weight.dtype == expected.weight.dtype
        assert head.bias is None and head.softcap == expected.softcap
    assert torch.equal(link.words(), model.get_input_embeddings().weight.bfloat16())
    exact = observe(Segment(model), "teacher@1", batch, recipe("logits"), [1.0]).targets(slice(None), 1.0, None)
    signal = LinkSignals(link, link.origin(recipe("hidden"), [1.0])).signal(batch)
    assert torch.allclose(signal.targets(slice(None), 1.0, link.head("float32")).log_p, exact.log_p, atol=1e-5)


def test_counted_bytes_are_those_that_crossed(loopback: Loopback, batch: Batch) -> None:
    crossed, counted = Meter(), Meter()
    link = TeacherLink(lambda: Metered(loopback.connect(), crossed), meter=counted, timeout_s=20)
    signals = LinkSignals(link, link.origin(recipe("hybrid"), TAUS))
    signal = signals.signal(batch)
    link.head("bfloat16")
    with pytest.raises(LinkError, match="refused"):
        signals.signal(collate([Sample(tuple(range(41)), 1)], pad=0))
    link.close()
    up, down = ({kind: counted.payload[kind] for kind in kinds} for kinds in (UP, DOWN))
    assert crossed.payload == {"up": sum(up.values()), "down": sum(down.values())}
    assert sum(counted.messages.values()) == sum(crossed.messages.values()) and counted.messages["ids"] == 2
    assert signal.nbytes < counted.payload["signals"] < signal.nbytes + 1500
    # An id below 97 is one byte, and whether the next is to be learned one bit.
    tokens = sum(len(sample.ids) for sample in SAMPLES)
    lengths, raw = pack_batch(batch, 97)
    assert lengths == [len(sample.ids) for sample in SAMPLES] and len(raw) == tokens + -(-tokens // 8)


UP, DOWN = ("asks", "ids"), ("signals", "head", "replies")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(2, 70_000))
def test_a_batch_survives_packing(shapes: list[tuple[int, int]], words: int) -> None:
    random = np.random.default_rng(words)
    samples = [
        Sample(tuple(random.integers(0, words, size).tolist()), min(prompt, size - 1)) for size, prompt in shapes
    ]
    packed = unpack_batch(*pack_batch(collate(samples, pad=1), words), words)
    expected = collate(samples, pad=0)
    assert torch.equal(packed.ids, expected.ids) and torch.equal(packed.labels, expected.labels)
    assert torch.equal(packed.valid, expected.valid)


def test_only_batches_a_teacher_can_answer_are_sent(batch: Batch) -> None:
    with pytest.raises(DataError, match=r"^a batch holds ids 0 to \d+; the teacher's are 0 to 49$"):
        pack_batch(batch, 50)
    with pytest.raises(DataError, match="padded on the right"):
        pack_batch(Batch(batch.ids, batch.valid.flip(1), batch.labels), 97)
    with pytest.raises(DataError, match="next tokens as labels"):
        pack_batch(Batch(batch.ids, batch.valid, torch.where(batch.labels == IGNORE, IGNORE, 0)), 97)


# -- keys


def test_another_teacher_or_tokenizer_is_refused(link: TeacherLink, batch: Batch) -> None:
    origin = link.origin(recipe("topk"), TAUS)
    for field, other in (("teacher", "teacher@2"), ("tokenizer", "letters")):
        stale = replace(origin, **{field: other})  # type: ignore[arg-type]
        with pytest.raises(LinkError, match=f"of {field} '{other}', the link leads to {field}"):
            LinkSignals(link, stale)
        signals = LinkSignals(link, origin)
        signals._origin = stale  # the cloud changed since
        with pytest.raises(LinkError, match=f"^the teacher refused: asked .*{other}.* here is"):
            signals.signal(batch)


def asked(link: TeacherLink, batch: Batch, **changes: object) -> tuple[Ask, bytes]:
    origin = link.origin(recipe("topk"), TAUS)
    lengths, raw = pack_batch(batch, link.offer.words)
    ask = Ask(
        teacher=origin.teacher,
        tokenizer=origin.tokenizer,
        key=joined(origin.keys(batch)),
        signal=origin.recipe,
        temperatures=list(origin.temperatures),
        lengths=lengths,
    )
    return ask.model_copy(update=changes), raw


def test_a_wrong_key_is_refused_by_either_end(link: TeacherLink, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({"key": "0" * 64}, {"temperatures": [1.0]}, {"signal": recipe("sorted")}):
        ask, raw = asked(link, batch, **changes)
        with pytest.raises(LinkError, match="the key is not that of the batch, the signal and the temperatures"):
            link.ask(ask, raw, 10**6).result(20)
    signals = LinkSignals(link, link.origin(recipe("topk"), TAUS))
    other = collate(SAMPLES[:2], pad=0)
    monkeypatch.setattr(signals, "_ask", lambda key, batch: link.ask(*asked(link, other), 10**6))
    with pytest.raises(LinkError, match=r"^the teacher's signal is for other token ids than were asked for$"):
        signals.signal(batch)


@pytest.mark.parametrize("damage", ["garbage", "name", "type", "rows", "size"])
def test_an_answer_that_is_no_such_signal_is_refused(damage: str, batch: Batch) -> None:
    from safetensors.torch import save

    def content(key: str) -> bytes:
        n = batch.targets
        good = {"log_p": torch.zeros(n, 1)}
        made = {
            "garbage": b"\xff" * 40,
            "name": save({"log_q": good["log_p"]}),
            "type": save({"log_p": good["log_p"].half()}),
            "rows": save({"log_p": torch.zeros(n + 1, 1)}),
            "size": save({"log_p": torch.zeros(100_000)}),
        }
        return made[damage]

    offer = Offer(teacher="t", tokenizer="w", words=97, width=8)

    async def serve(connection) -> None:  # type: ignore[no-untyped-def]
        await connection.receive()
        await connection.send(Frame(Kind.OPEN_OK, payload=offer.pack()).pack())
        frame = unpack(await connection.receive())
        ask, _ = split_off(frame, Ask)
        said = content(ask.key)
        for part in told(frame.seq, Told(key=ask.key, nbytes=len(said)), said):
            await connection.send(part.pack())

    service = Loopback(serve)
    link = TeacherLink(service.connect, timeout_s=20)
    signals = LinkSignals(link, link.origin(recipe("scalars"), [1.0]))
    said = {"size": "larger than the", "garbage": "cannot be read"}.get(damage, "is no scalars signal of the batch: ")
    with pytest.raises(LinkError, match=said) as caught:
        signals.signal(batch)
    assert "\n" not in str(caught.value)
    link.close()
    service.close()


# -- what a teacher is sent


def opened(loopback: Loopback) -> Channel:
    channel = loopback.connect()
    channel.send(Frame(Kind.OPEN).pack())
    assert unpack(channel.receive(20)).kind is Kind.OPEN_OK
    return channel


def refusal(channel: Channel, frame: Frame) -> str:
    channel.send(frame.pack())
    reply = unpack(channel.receive(20))
    assert (reply.kind, reply.seq) == (Kind.ERROR, frame.seq)
    return body(reply, Refusal).message


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_requests_beyond_the_limits_are_refused_and_the_host_serves_on(
    loopback: Loopback, link: TeacherLink, batch: Batch
) -> None:
    channel = opened(loopback)
    good, raw = asked(link, batch)
    for said, changes, content in [
        ("samples 9; allowed: at most 8", {"lengths": [2] * 9}, raw),
        ("length 41; allowed: at most 40", {"lengths": [41]}, raw),
        ("tokens with padding 280; allowed: at most 240", {"lengths": [40] + [2] * 6}, raw),
        ("expected", {}, raw[:-1]),
        ("expected", {}, raw + b"0"),
        ("expected", {}, b""),
        ("id 255; allowed: 0 to 96", {}, b"\xff" + raw[1:]),
        ("a label where no token follows", {"lengths": [2]}, b"\1\1\xff"),
        ("no labels at all", {"lengths": [2]}, b"\1\1\0"),
        ("lengths", {"lengths": []}, b""),
        ("lengths", {"lengths": [2**30]}, b""),
        ("temperatures", {"temperatures": [0.0]}, raw),
        ("temperatures", {"temperatures": [float("nan")]}, raw),
        ("signal.k", {"signal": {"kind": "topk", "k": 0}}, raw),
        ("signal.extra", {"signal": {"kind": "topk", "extra": 1}}, raw),
    ]:
        ask = good.model_copy(update=changes)  # not validated
        message = refusal(channel, with_bytes(Kind.ASK, 7, ask, content))
        assert said in message and "\n" not in message, message
    for frame, said in [
        (Frame(Kind.STEP, seq=3), "STEP has no place here"),
        (Frame(Kind.ASK, seq=4), "no MessagePack map"),
        (Frame(Kind.ASK, seq=5, pos=99, payload=b"x"), "a map of 99 bytes in a payload of 1"),
        (Frame(Kind.ASK, seq=6, pos=70_000, payload=b"\x80" * 70_000), "at most 65536 bytes"),
        (Frame(Kind.TABLE, seq=6, pos=1, payload=b"\x80"), "TABLE: teacher: Field required"),
    ]:
        assert said in refusal(channel, frame)
    channel.send(with_bytes(Kind.ASK, 9, good, raw).pack())
    assert unpack(channel.receive(20)).kind is Kind.TOLD
    channel.close()


def test_a_reply_beyond_the_limit_is_refused_before_it_is_computed(model: PreTrainedModel, batch: Batch) -> None:
    host = SignalHost(model, "t", "w", SignalLimits(reply_bytes=1000))
    host._observed = None  # type: ignore[assignment,method-assign]
    service = Loopback(host.serve)
    link = TeacherLink(service.connect, timeout_s=20)
    with pytest.raises(LinkError, match=r"a logits signal of this batch has up to \d+ bytes, 1000 are allowed"):
        LinkSignals(link, link.origin(recipe("logits"), [1.0])).signal(batch)
    link.close()
    service.close()


@pytest.mark.parametrize("garbage", [b"", b"x" * 40, b"\0" * 200, "cut", "flipped", "early"])
def test_bytes_that_are_no_frames_end_the_connection_and_nothing_else(
    garbage: bytes | str, loopback: Loopback, link: TeacherLink, batch: Batch
) -> None:
    channel = loopback.connect() if garbage == "early" else opened(loopback)
    frame = with_bytes(Kind.ASK, 1, *asked(link, batch)).pack()
    sent = {"cut": frame[:-3], "flipped": frame[:-3] + b"\0" + frame[-2:], "early": frame}.get(garbage, garbage)  # type: ignore[arg-type]
    channel.send(sent)  # type: ignore[arg-type]
    reply = unpack(channel.receive(20))
    assert reply.kind is Kind.ERROR and body(reply, Refusal).code == "frame"
    with pytest.raises(LinkDown):
        channel.receive(20)
    assert LinkSignals(link, link.origin(recipe("topk"), TAUS)).signal(batch).count == batch.targets


def test_who_asks_and_does_not_wait_is_cut_off(loopback: Loopback, link: TeacherLink, batch: Batch) -> None:
    channel = opened(loopback)
    frame = with_bytes(Kind.ASK, 1, *asked(link, batch)).pack()
    with pytest.raises(LinkDown):  # noqa: PT012
        for _ in range(2000):
            channel.send(frame)
        while True:
            channel.receive(20)
    assert LinkSignals(link, link.origin(recipe("topk"), TAUS)).signal(batch).count == batch.targets


def test_a_full_house_says_so(model: PreTrainedModel) -> None:
    host = SignalHost(model, "t", "w", SignalLimits(connections=1))
    service = Loopback(host.serve)
    link = TeacherLink(service.connect, timeout_s=20)
    with pytest.raises(LinkError, match=r"within 0\.3 s: the teacher has as many edges as it takes"):
        TeacherLink(service.connect, timeout_s=0.3)
    link.close()
    assert TeacherLink(service.connect, timeout_s=20).offer == host.offer
    service.close()


# -- links that break


class Brittle:
    """A channel that breaks after a number of messages received."""

    def __init__(self, inner: Channel, left: int, damage: bool = False) -> None:
        self._inner, self._left, self._damage = inner, left, damage

    def send(self, data: bytes) -> None:
        self._inner.send(data)

    def receive(self, timeout_s: float) -> bytes:
        data = self._inner.receive(timeout_s)
        self._left -= 1
        if self._left < 0 and self._damage:
            return data[:-1]
        if self._left < 0:
            self._inner.close()
            raise LinkDown("cut")
        return data

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("cuts", [[1], [2], [3], [0, 0, 2, 1, 2]])
def test_a_cut_link_is_mended_and_nothing_computed_twice(
    cuts: list[int], damage: bool, model: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycloud.distill.signal_link.messages.PART_BYTES", 2000)
    host = SignalHost(model, "t", "w")
    service = Loopback(host.serve)
    observed: list[str] = []
    inside = host._observed
    host._observed = lambda ask, batch: (observed.append(ask.key), inside(ask, batch))[1]  # type: ignore[func-returns-value,method-assign]
    left = iter(cuts)

    def connect() -> Channel:
        channel = service.connect()
        after = next(left, None)
        return channel if after is None else Brittle(channel, after, damage)

    link = TeacherLink(connect, timeout_s=20)
    signals = LinkSignals(link, link.origin(recipe("logits"), [1.0]))
    batches = [batch, collate(SAMPLES[:2], pad=0), collate(SAMPLES[2:], pad=0)]
    for one, found in zip(batches, signals.signals(batches), strict=True):
        assert same(found, observe(Segment(model), "t", one, recipe("logits"), [1.0]))
    assert next(left, None) is None
    assert len(observed) == len(set(observed)) == 3
    link.close()
    service.close()


def test_large_answers_come_in_parts_a_socket_takes(link: TeacherLink) -> None:
    content = bytes(range(256)) * (PART_BYTES // 64) + b"end"
    frames = list(told(5, Told(key="k", nbytes=len(content)), content))
    assert max(len(frame.pack()) for frame in frames) < 2 * PART_BYTES
    head, first = split_off(unpack(frames[0].pack()), Told)
    assert first + b"".join(frame.payload for frame in frames[1:]) == content and head.nbytes == len(content)
    assert {frame.seq for frame in frames} == {5}


def test_a_teacher_that_is_gone_or_silent_is_one_line(loopback: Loopback, batch: Batch) -> None:
    def nobody() -> Channel:
        raise LinkDown("nobody is there")

    with pytest.raises(LinkError, match=r"^no answer from the teacher within 0.2 s: nobody is there$"):
        TeacherLink(nobody, timeout_s=0.2)

    class Deaf(Brittle):
        def send(self, data: bytes) -> None:
            if unpack(data).kind is Kind.OPEN:
                super().send(data)

    link = TeacherLink(lambda: Deaf(loopback.connect(), 1), timeout_s=0.5)
    with pytest.raises(LinkError, match=r"^no answer from the teacher within 0.5 s$"):
        LinkSignals(link, link.origin(recipe("topk"), TAUS)).signal(batch)
    link.close()
    with pytest.raises(LinkDown, match="closed"):
        link.head("float32")


def test_a_link_that_always_breaks_is_given_up(loopback: Loopback, batch: Batch) -> None:
    link = TeacherLink(lambda: Brittle(loopback.connect(), 1), timeout_s=20)
    with pytest.raises(LinkError, match="broke 8 times over one request: cut"):
        LinkSignals(link, link.origin(recipe("topk"), TAUS)).signal(batch)
    link.close()


def test_a_refused_token_is_not_tried_again(loopback: Loopback, batch: Batch) -> None:
    channels: list[Channel] = []

    def connect() -> Channel:
        if channels:
            raise LinkError("refused the token")
        channels.append(Brittle(loopback.connect(), 1))
        return channels[0]

    link = TeacherLink(connect, timeout_s=20)
    with pytest.raises(LinkError, match=r"^refused the token$"):
        LinkSignals(link, link.origin(recipe("topk"), TAUS)).signal(batch)
    link.close()


def test_a_teacher_that_fails_says_so_and_answers_the_next(model: PreTrainedModel, batch: Batch) -> None:
    host = SignalHost(model, "t", "w")
    inside, failures = host._observed, iter([RuntimeError("out of memory")])

    def observed(ask, batch):  # type: ignore[no-untyped-def]
        for error in failures:
            raise error
        return inside(ask, batch)

    host._observed = observed  # type: ignore[method-assign]
    service = Loopback(host.serve)
    link = TeacherLink(service.connect, timeout_s=20)
    signals = LinkSignals(link, link.origin(recipe("topk"), TAUS))
    with pytest.raises(LinkError, match=r"^the teacher refused: the teacher failed: RuntimeError$"):
        signals.signal(batch)
    assert signals.signal(batch).count == batch.targets
    link.close()
    service.close()


# -- what is asked ahead, kept and shared


def test_what_is_asked_ahead_crosses_while_the_edge_computes(loopback: Loopback, batch: Batch) -> None:
    network = Network(mbit_s=1.0, rtt_ms=200)
    link = TeacherLink(lambda: Shaped(loopback.connect(), network), timeout_s=20)
    signals = LinkSignals(link, link.origin(recipe("logits"), TAUS))
    batches = [batch, collate(SAMPLES[1:], pad=0), collate(SAMPLES[:-1], pad=0)]
    start = time.monotonic()
    first = signals.signal(batches[0])
    alone = time.monotonic() - start
    assert alone > 0.2 + network.seconds(first.nbytes)
    for one in batches[1:]:
        signals.prefetch(one)
    assert not any(future.done() for future in signals._asked.values())
    for future in signals._asked.values():
        future.result(20)  # the edge's own step
    start = time.monotonic()
    assert [signals.signal(one).count for one in batches[1:]] == [one.targets for one in batches[1:]]
    assert time.monotonic() - start < 0.2
    assert link.meter.messages["ids"] == 3
    link.close()


def test_no_more_is_asked_ahead_than_a_few_batches(link: TeacherLink) -> None:
    signals = LinkSignals(link, link.origin(recipe("topk"), TAUS))
    batches = [collate([Sample((n, n + 1, n + 2), 1)], pad=0) for n in range(12)]
    for one in batches[:4]:
        signals.prefetch(one)
        signals.prefetch(one)
    assert len(signals._asked) == edge_side._AHEAD and link.meter.messages["ids"] == 4
    for future in signals._asked.values():
        future.result(20)
    signals.prefetch(batches[7])  # nobody came for the first
    assert len(signals._asked) == edge_side._AHEAD and link.meter.messages["ids"] == 5


def test_answers_serve_many_students_and_old_ones_make_room(
    model: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[int] = []

    def watched(teacher, name, *args):  # type: ignore[no-untyped-def]
        if name == "shared":  # a host of another test may still be busy with what nobody waits for
            observed.append(1)
            time.sleep(0.05)
        return observe(teacher, name, *args)

    monkeypatch.setattr("raycloud.distill.signal_link.host.observe", watched)
    host = SignalHost(model, "shared", "w", SignalLimits(kept_bytes=20_000))
    service = Loopback(host.serve)

    def student(then: Callable[[LinkSignals], object]) -> None:
        link = TeacherLink(service.connect, timeout_s=20)
        then(LinkSignals(link, link.origin(recipe("topk"), [1.0])))
        link.close()

    students = [threading.Thread(target=student, args=(lambda one: one.signal(batch),)) for _ in range(4)]
    for one in students:
        one.start()
    for one in students:
        one.join()
    assert len(observed) == 1
    rest = [collate([Sample((n, *SAMPLES[4].ids), 1)], pad=0) for n in range(30)]
    student(lambda one: list(one.signals(rest)))
    assert len(observed) == 31
    assert host._kept_bytes == sum(len(answer.content) for answer in host._kept.values()) <= 20_000
    assert 0 < len(host._kept) < 31
    service.close()


def test_a_file_of_signals_is_filled_over_the_link(
    link: TeacherLink,
    model: PreTrainedModel,
    tmp_path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    origin = link.origin(recipe("hybrid"), TAUS)
    signals = LinkSignals(link, origin)
    assert list(gathering(tmp_path, origin, signals.signals, SAMPLES[:2], part=1)) == [(0, 2), (1, 2), (2, 2)]
    asks = link.meter.messages["ids"]
    assert list(gathering(tmp_path, origin, signals.signals, SAMPLES, part=2)) == [(2, 5), (4, 5), (5, 5)]
    far = FileSignals(tmp_path, origin)
    assert link.meter.messages["ids"] - asks == 2
    near = FileSignals.build(
        tmp_path / "near", Origin("teacher@1", "words", origin.recipe, TAUS), Segment(model), SAMPLES
    )
    batch = collate(SAMPLES[1:4], pad=0)
    found, expected = far.signal(batch), near.signal(batch)
    assert found.key == expected.key and found.count == batch.targets
    assert torch.equal(found.payload["ids"], expected.payload["ids"])
    assert torch.allclose(found.payload["tail"], expected.payload["tail"], atol=1e-5)


def test_a_teacher_that_leaves_is_found_again(model: PreTrainedModel, batch: Batch) -> None:
    import asyncio

    hosts = [SignalHost(model, "t", "w") for _ in range(2)]
    services = [Loopback(host.serve) for host in hosts]
    order = iter(services)
    link = TeacherLink(lambda: next(order).connect(), timeout_s=20)
    signals = LinkSignals(link, link.origin(recipe("topk"), TAUS))
    signals.signal(batch)
    asyncio.run_coroutine_threadsafe(hosts[0].leave(), services[0].loop).result(20)
    assert signals.signal(collate(SAMPLES[:3], pad=0)).count > 0
    link.close()
    for service in services:
        service.close()


def test_a_frame_too_large_is_refused_before_it_is_sent(link: TeacherLink, batch: Batch) -> None:
    ask, _ = asked(link, batch)
    with pytest.raises(FrameError, match="exceeds"):
        link.ask(ask, bytes(9 * 2**20), 100)
