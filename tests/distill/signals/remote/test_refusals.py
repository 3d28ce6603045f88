"""Refusals by either end: other keys, teachers and signals, requests beyond the limits, and random bytes."""

from __future__ import annotations

import os
from dataclasses import replace
from enum import IntEnum

import pytest
import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, Sample, collate
from raycloud.distill.signals.remote import ModelTeacher, RemoteSignals, SignalClient, SignalLimits, SignalServer
from raycloud.distill.signals.remote.messages import (
    OpenSignals,
    SignalMessageKind,
    SignalReply,
    SignalRequest,
    TeacherServerInfo,
)
from raycloud.errors import LinkError
from raycloud.link.channel import LinkDown, Loopback
from raycloud.link.frames import ErrorReply, Frame, SessionKind, parse_body, unpack
from tests.clock import Clock
from tests.distill.signals.remote.wiring import SAMPLES, TAUS, asked, client, loopback_to, recipe


def test_another_teacher_or_tokenizer_is_refused(link: SignalClient, batch: Batch) -> None:
    source = link.source(recipe("topk"), TAUS)
    for field, other in (("teacher", "teacher@2"), ("tokenizer", "letters")):
        stale = replace(source, **{field: other})  # type: ignore[arg-type]
        with pytest.raises(LinkError, match=f"of {field} '{other}', the link leads to {field}"):
            RemoteSignals(link, stale)
        signals = RemoteSignals(link, source)
        signals._source = stale  # the cloud changed since
        with pytest.raises(LinkError, match=f"^the teacher refused: asked .*{other}.* here is"):
            signals.signal(batch)


def test_a_wrong_key_is_refused_by_either_end(
    link: SignalClient, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({"key": "0" * 64}, {"temperatures": [1.0]}, {"signal": recipe("sorted")}):
        ask, raw = asked(link, batch, **changes)
        with pytest.raises(LinkError, match="the key is not that of the batch, the signal and the temperatures"):
            link.answer(link.ask(ask, raw, 10**6))
    signals = RemoteSignals(link, link.source(recipe("topk"), TAUS))
    other = collate(SAMPLES[:2], pad=0)
    monkeypatch.setattr(signals, "_ask", lambda key, batch: link.ask(*asked(link, other), 10**6))
    with pytest.raises(LinkError, match=r"^the teacher's signal is for other token ids than were asked for$"):
        signals.signal(batch)


@pytest.mark.parametrize("damage", ["garbage", "name", "type", "rows", "size"])
def test_an_answer_that_is_no_such_signal_is_refused(damage: str, batch: Batch) -> None:
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

    info = TeacherServerInfo(
        lease_s=60, credit=4, teacher="t", tokenizer="w", vocabulary_size=97, hidden_size=8, request_bytes=10**6
    )

    async def serve(connection) -> None:  # type: ignore[no-untyped-def]
        await connection.receive()
        await connection.send(Frame.of(SessionKind.OPEN_OK, info).pack())
        frame = unpack(await connection.receive(), SignalMessageKind)
        key = parse_body(frame, SignalRequest).key
        reply = Frame.of(SignalMessageKind.SIGNAL_OK, SignalReply(key=key), content(key))
        for piece in replace(reply, seq=frame.seq).pieces():
            await connection.send(piece)

    service = Loopback(serve)
    link = client(service)
    signals = RemoteSignals(link, link.source(recipe("scalars"), [1.0]))
    said = {"size": "is too large", "garbage": "cannot be read"}.get(damage, "is no scalars signal of the batch: ")
    with pytest.raises(LinkError, match=said) as caught:
        signals.signal(batch)
    assert "\n" not in str(caught.value)
    link.close()
    service.close()


class Opened:
    """Channel with a session of its own, on which a test sends any frames."""

    def __init__(self, loopback: Loopback) -> None:
        self.channel, self.session, self.seq = loopback.connect(), os.urandom(16), 1
        assert self.ask(Frame.of(SessionKind.OPEN, OpenSignals())).kind is SessionKind.OPEN_OK

    def pack(self, frame: Frame) -> bytes:
        seq = 0 if isinstance(frame.kind, SessionKind) else self.seq
        return replace(frame, session=self.session, seq=seq).pack()

    def ask(self, frame: Frame) -> Frame:
        self.channel.send(self.pack(frame))
        return self.answer()

    def answer(self) -> Frame:
        return unpack(self.channel.receive(20), SignalMessageKind)

    def refusal(self, frame: Frame, kind: IntEnum = SignalMessageKind.REFUSED) -> str:
        reply = self.ask(frame)
        assert (reply.kind, reply.seq) == (kind, self.seq)
        self.seq += kind is SignalMessageKind.REFUSED
        return parse_body(reply, ErrorReply).message


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_requests_beyond_the_limits_are_refused_and_the_host_serves_on(
    loopback: Loopback, link: SignalClient, batch: Batch
) -> None:
    opened = Opened(loopback)
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
        message = opened.refusal(Frame.of(SignalMessageKind.SIGNAL, ask, content))
        assert said in message and "\n" not in message, message
    for frame, said in [
        (Frame(SignalMessageKind.SIGNAL), "no MessagePack map"),
        (Frame(SignalMessageKind.HEAD, body=b"\x80"), "HEAD: teacher: Field required"),
        (Frame(SignalMessageKind.EMBEDDING, body=b"\x80"), "EMBEDDING: teacher: Field required"),
    ]:
        assert said in opened.refusal(frame)
    # These two are refused by the session, before anything of theirs is kept.
    for frame, said in [
        (Frame(SignalMessageKind.HEAD_OK), "HEAD_OK has no place within a session"),
        (Frame.of(SignalMessageKind.SIGNAL, good, bytes(961)), "SIGNAL: 961 raw bytes; allowed: 960"),
    ]:
        assert opened.refusal(frame, SessionKind.ERROR) == said
    assert opened.ask(Frame.of(SignalMessageKind.SIGNAL, good, raw)).kind is SignalMessageKind.SIGNAL_OK
    opened.channel.close()


def test_a_refused_request_does_not_hold_up_those_after_it(link: SignalClient, batch: Batch) -> None:
    signals = RemoteSignals(link, link.source(recipe("topk"), TAUS))
    long, other = collate([Sample(tuple(range(41)), 1)], pad=0), collate(SAMPLES[:2], pad=0)
    for one in (long, batch, other):
        signals.prefetch(one)
    assert [signals.signal(one).count for one in (other, batch)] == [other.targets, batch.targets]
    with pytest.raises(LinkError, match=r"^the teacher refused: batch: length 41; allowed: at most 40$"):
        signals.signal(long)
    assert signals.signal(batch).count == batch.targets
    assert link.meter.messages["OPEN"] == 1


def test_a_reply_beyond_the_limit_is_refused_before_it_is_computed(model: PreTrainedModel, batch: Batch) -> None:
    host = SignalServer(ModelTeacher(model, "t", "w"), SignalLimits(reply_bytes=1000))
    host._signal = None  # type: ignore[assignment,method-assign]
    service = loopback_to(host)
    link = client(service)
    with pytest.raises(LinkError, match=r"a logits signal of this batch has up to \d+ bytes, 1000 are allowed"):
        RemoteSignals(link, link.source(recipe("logits"), [1.0])).signal(batch)
    link.close()
    service.close()


@pytest.mark.parametrize("garbage", [b"", b"x" * 40, b"\0" * 200, "cut", "flipped", "kind"])
def test_bytes_that_are_no_frames_end_the_connection_and_nothing_else(
    garbage: bytes | str, loopback: Loopback, link: SignalClient, batch: Batch
) -> None:
    opened, ask = Opened(loopback), Frame.of(SignalMessageKind.SIGNAL, *asked(link, batch))
    frame, unknown = opened.pack(ask), opened.pack(replace(ask, kind=IntEnum("Other", {"ASK": 99}).ASK))  # type: ignore[attr-defined]
    sent = {"cut": frame[:-3], "flipped": frame[:-3] + b"\0" + frame[-2:], "kind": unknown}.get(garbage, garbage)  # type: ignore[arg-type]
    opened.channel.send(sent)  # type: ignore[arg-type]
    reply = opened.answer()
    assert reply.kind is SessionKind.ERROR and parse_body(reply, ErrorReply).code == "frame"
    with pytest.raises(LinkDown):
        opened.channel.receive(20)
    assert RemoteSignals(link, link.source(recipe("topk"), TAUS)).signal(batch).count == batch.targets


def test_a_request_without_a_session_is_refused(loopback: Loopback, link: SignalClient, batch: Batch) -> None:
    channel = loopback.connect()
    channel.send(Frame.of(SignalMessageKind.SIGNAL, *asked(link, batch)).pack())
    reply = parse_body(unpack(channel.receive(20)), ErrorReply)
    assert (reply.code, reply.message) == ("handshake", "SIGNAL came where OPEN or RESUME should have")
    channel.close()


def test_who_asks_and_does_not_wait_is_cut_off(loopback: Loopback, link: SignalClient, batch: Batch) -> None:
    opened = Opened(loopback)
    frame = opened.pack(Frame.of(SignalMessageKind.SIGNAL, *asked(link, batch)))
    with pytest.raises(LinkDown):  # noqa: PT012
        for _ in range(2000):
            opened.channel.send(frame)
        while True:
            opened.channel.receive(20)
    assert RemoteSignals(link, link.source(recipe("topk"), TAUS)).signal(batch).count == batch.targets


@pytest.mark.waits
def test_a_full_house_says_so(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.link.client.time", Clock())
    host = SignalServer(ModelTeacher(model, "t", "w"), SignalLimits(sessions=1))
    service = loopback_to(host)
    link = client(service)
    with pytest.raises(LinkError, match=r"within 30 s: the teacher has as many edges as it takes"):
        client(service, timeout_s=30)
    link.close()
    assert client(service).info == host.info
    service.close()
