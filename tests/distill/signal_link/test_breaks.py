"""Links that break, and teachers that are silent, fail or leave: mended, or given up in one line."""

from __future__ import annotations

import asyncio

import pytest
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, collate
from raycloud.distill.signal_link import LinkSignals, SignalHost, TeacherLink
from raycloud.distill.signals import observe
from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown, Loopback
from raycloud.link.frames import Kind, unpack
from raycloud.models.segments import Segment
from tests.distill.signal_link.wiring import SAMPLES, TAUS, Brittle, recipe, same


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


def test_a_teacher_that_leaves_is_found_again(model: PreTrainedModel, batch: Batch) -> None:
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
