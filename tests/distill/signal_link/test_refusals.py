"""What either end does not take: other keys, teachers and signals, requests beyond the limits, and noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, collate
from raycloud.distill.signal_link import LinkSignals, SignalHost, SignalLimits, TeacherLink
from raycloud.distill.signal_link.messages import Ask, Offer, Told, told
from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown, Loopback
from raycloud.link.frames import Frame, Kind, Refusal, body, split_off, unpack, with_bytes
from tests.distill.signal_link.wiring import SAMPLES, TAUS, asked, recipe


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
        message = refusal(channel, with_bytes(Kind.ASK, ask, content, seq=7))
        assert said in message and "\n" not in message, message
    for frame, said in [
        (Frame(Kind.STEP, seq=3), "STEP has no place here"),
        (Frame(Kind.ASK, seq=4), "no MessagePack map"),
        (Frame(Kind.ASK, seq=5, pos=99, payload=b"x"), "a map of 99 bytes in a payload of 1"),
        (Frame(Kind.ASK, seq=6, pos=70_000, payload=b"\x80" * 70_000), "at most 65536 bytes"),
        (Frame(Kind.TABLE, seq=6, pos=1, payload=b"\x80"), "TABLE: teacher: Field required"),
    ]:
        assert said in refusal(channel, frame)
    channel.send(with_bytes(Kind.ASK, good, raw, seq=9).pack())
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
    frame = with_bytes(Kind.ASK, *asked(link, batch), seq=1).pack()
    sent = {"cut": frame[:-3], "flipped": frame[:-3] + b"\0" + frame[-2:], "early": frame}.get(garbage, garbage)  # type: ignore[arg-type]
    channel.send(sent)  # type: ignore[arg-type]
    reply = unpack(channel.receive(20))
    assert reply.kind is Kind.ERROR and body(reply, Refusal).code == "frame"
    with pytest.raises(LinkDown):
        channel.receive(20)
    assert LinkSignals(link, link.origin(recipe("topk"), TAUS)).signal(batch).count == batch.targets


def test_who_asks_and_does_not_wait_is_cut_off(loopback: Loopback, link: TeacherLink, batch: Batch) -> None:
    channel = opened(loopback)
    frame = with_bytes(Kind.ASK, *asked(link, batch), seq=1).pack()
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
