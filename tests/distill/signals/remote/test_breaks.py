"""Broken links, and teachers that are silent, fail or leave: reconnected, or one clear error."""

from __future__ import annotations

import asyncio

import pytest
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, collate
from raycloud.distill.signals import compute_signal
from raycloud.distill.signals.remote import ModelTeacher, RemoteSignals, SignalClient, SignalServer
from raycloud.distill.signals.remote.messages import SignalMessageKind
from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown, Loopback
from raycloud.link.frames import SessionKind, unpack
from raycloud.models.segments import Segment
from tests.clock import Clock
from tests.distill.signals.remote.wiring import SAMPLES, TAUS, Brittle, client, loopback_to, recipe, same


@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("cuts", [[1], [2], [3], [0, 0, 2, 1, 2]])
def test_a_cut_link_is_mended_and_nothing_computed_twice(
    cuts: list[int], damage: bool, model: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycloud.link.frames.PIECE_BYTES", 2000)
    host = SignalServer(ModelTeacher(model, "t", "w"))
    service = loopback_to(host)
    observed: list[str] = []
    inside = host._signal
    host._signal = lambda ask, batch: (observed.append(ask.key), inside(ask, batch))[1]  # type: ignore[func-returns-value,method-assign]
    left = iter(cuts)

    def wrap(channel: Channel) -> Channel:
        after = next(left, None)
        return channel if after is None else Brittle(channel, after, damage)

    link = client(service, wrap)
    signals = RemoteSignals(link, link.source(recipe("logits"), [1.0]))
    batches = [batch, collate(SAMPLES[:2], pad=0), collate(SAMPLES[2:], pad=0)]
    for one, found in zip(batches, signals.signals(batches), strict=True):
        assert same(found, compute_signal(Segment(model), "t", one, recipe("logits"), [1.0]))
    assert next(left, None) is None
    assert len(observed) == len(set(observed)) == 3
    link.close()
    service.close()


@pytest.mark.waits
def test_a_teacher_that_is_gone_or_silent_is_one_line(loopback: Loopback, batch: Batch) -> None:
    def nobody(session: str) -> Channel:
        raise LinkDown("nobody is there")

    with pytest.raises(LinkError, match=r"^no answer from the teacher within 0.2 s: nobody is there$"):
        SignalClient(nobody, timeout_s=0.2)

    class Deaf(Brittle):
        def send(self, data: bytes) -> None:
            if unpack(data, SignalMessageKind).kind is SessionKind.OPEN:
                super().send(data)

    link = client(loopback, lambda channel: Deaf(channel, 1), timeout_s=2)
    with pytest.raises(LinkError, match=r"^no answer from the teacher within 2 s: no reply in time$"):
        RemoteSignals(link, link.source(recipe("topk"), TAUS)).signal(batch)
    link.close()
    with pytest.raises(LinkDown, match="closed"):
        link.head("float32")


@pytest.mark.waits
def test_a_link_that_always_breaks_is_given_up(
    loopback: Loopback, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycloud.link.client.time", Clock())
    link = client(loopback, lambda channel: Brittle(channel, 1))
    with pytest.raises(LinkError, match=r"^no answer from the teacher within 120 s: cut$"):
        RemoteSignals(link, link.source(recipe("topk"), TAUS)).signal(batch)
    link.close()


def test_a_refused_token_is_not_tried_again(loopback: Loopback, batch: Batch) -> None:
    channels: list[Channel] = []

    def wrap(channel: Channel) -> Channel:
        if channels:
            raise LinkError("refused the token")
        channels.append(Brittle(channel, 1))
        return channels[0]

    link = client(loopback, wrap)
    with pytest.raises(LinkError, match=r"^refused the token$"):
        RemoteSignals(link, link.source(recipe("topk"), TAUS)).signal(batch)
    link.close()


def test_a_teacher_that_fails_says_so_and_answers_the_next(model: PreTrainedModel, batch: Batch) -> None:
    host = SignalServer(ModelTeacher(model, "t", "w"))
    inside, failures = host._signal, iter([RuntimeError("out of memory")])

    def observed(ask, batch):  # type: ignore[no-untyped-def]
        for error in failures:
            raise error
        return inside(ask, batch)

    host._signal = observed  # type: ignore[method-assign]
    service = loopback_to(host)
    link = client(service)
    signals = RemoteSignals(link, link.source(recipe("topk"), TAUS))
    with pytest.raises(LinkError, match=r"^the teacher refused: the teacher failed: RuntimeError$"):
        signals.signal(batch)
    assert signals.signal(batch).count == batch.targets
    link.close()
    service.close()


def test_a_teacher_that_leaves_is_found_again(model: PreTrainedModel, batch: Batch) -> None:
    hosts = [SignalServer(ModelTeacher(model, "t", "w")) for _ in range(2)]
    services = [loopback_to(host) for host in hosts]
    reached = services[:1]
    link = SignalClient(lambda _: reached[-1].connect(), timeout_s=120)
    signals = RemoteSignals(link, link.source(recipe("topk"), TAUS))
    signals.signal(batch)
    reached.append(services[1])
    asyncio.run_coroutine_threadsafe(hosts[0].leave(), services[0].loop).result(120)
    assert signals.signal(collate(SAMPLES[:3], pad=0)).count > 0
    link.close()
    for service in services:
        service.close()
