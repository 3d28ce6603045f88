"""Signals requested ahead, kept for other students, and collected in a file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, Sample, collate
from raycloud.distill.signals import compute_signal
from raycloud.distill.signals.file import FileSignals, SignalSource, collect_signals
from raycloud.distill.signals.remote import ModelTeacher, RemoteSignals, SignalClient, SignalLimits, SignalServer
from raycloud.distill.signals.remote import client as edge_side
from raycloud.distill.signals.remote.messages import SignalRequest
from raycloud.link.channel import Loopback, MeteredChannel
from raycloud.link.frames import Frame
from raycloud.link.meter import Meter
from raycloud.link.network import EmulatedChannel, Network
from raycloud.link.server import RequestRefused, ServerBusy
from raycloud.models.segments import Segment
from tests.distill.signals.remote.wiring import SAMPLES, TAUS, client, loopback_to, recipe


@pytest.mark.waits
def test_what_is_asked_ahead_crosses_while_the_edge_computes(loopback: Loopback, batch: Batch) -> None:
    network = Network(mbit_s=1.0, rtt_ms=200)
    crossed = Meter()
    link = client(loopback, lambda channel: EmulatedChannel(MeteredChannel(channel, crossed), network))
    signals = RemoteSignals(link, link.source(recipe("logits"), TAUS))
    batches = [batch, collate(SAMPLES[1:], pad=0), collate(SAMPLES[:-1], pad=0)]
    start = time.monotonic()
    first = signals.signal(batches[0])
    alone = time.monotonic() - start
    assert alone > 0.2 + network.seconds(first.nbytes)
    for one in batches[1:]:
        signals.prefetch(one)
    assert link.meter.messages["SIGNAL"] == 3
    until = time.monotonic() + 120
    while crossed.messages["down"] < 4 and time.monotonic() < until:
        time.sleep(0.01)  # the edge's own step
    # Both have crossed, though nobody has waited for them.
    assert crossed.messages["down"] == 4 and link.meter.messages["SIGNAL_OK"] == 1
    assert [signals.signal(one).count for one in batches[1:]] == [one.targets for one in batches[1:]]
    assert link.meter.messages["SIGNAL"] == 3
    link.close()


def test_no_more_is_asked_ahead_than_a_few_batches(link: SignalClient) -> None:
    signals = RemoteSignals(link, link.source(recipe("topk"), TAUS))
    batches = [collate([Sample((n, n + 1, n + 2), 1)], pad=0) for n in range(12)]
    for one in batches[:4]:
        signals.prefetch(one)
        signals.prefetch(one)
    assert len(signals._asked) == edge_side._PREFETCH and link.meter.messages["SIGNAL"] == 4
    signals.prefetch(batches[6])  # none of the four has been received
    assert link.meter.messages["SIGNAL"] == 4
    assert signals.signal(batches[3]).count == batches[3].targets
    # The first three arrived before it, and are used though they are asked for in another order.
    assert [signals.signal(batches[n]).count for n in (2, 1)] == [batches[n].targets for n in (2, 1)]
    assert link.meter.messages["SIGNAL"] == link.meter.messages["SIGNAL_OK"] == 4
    for one in batches[4:7]:
        signals.prefetch(one)
    assert len(signals._asked) == edge_side._PREFETCH and link.meter.messages["SIGNAL"] == 7
    signals.prefetch(batches[7])  # nobody came for the first
    assert len(signals._asked) == edge_side._PREFETCH and link.meter.messages["SIGNAL"] == 8
    assert signals.signal(batches[0]).count == batches[0].targets  # and now it is requested again
    assert link.meter.messages["SIGNAL"] == 9


@pytest.mark.waits
def test_answers_serve_many_students_and_old_ones_make_room(
    model: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[int] = []

    def watched(teacher, name, *args):  # type: ignore[no-untyped-def]
        if name == "shared":  # a host of another test may still be busy with what nobody waits for
            observed.append(1)
            time.sleep(0.05)
        return compute_signal(teacher, name, *args)

    monkeypatch.setattr("raycloud.distill.signals.remote.teacher.compute_signal", watched)
    host = SignalServer(ModelTeacher(model, "shared", "w"), SignalLimits(kept_bytes=20_000))
    service = loopback_to(host)

    def student(then: Callable[[RemoteSignals], object]) -> None:
        link = client(service)
        then(RemoteSignals(link, link.source(recipe("topk"), [1.0])))
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
    assert host._kept_bytes == sum(len(reply.raw) for reply in host._kept.values()) <= 20_000
    assert 0 < len(host._kept) < 31
    service.close()


@pytest.mark.waits
def test_what_a_full_queue_does_not_take_is_repeated(
    model: PreTrainedModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycloud.distill.signals.remote.server._RETRY_S", 0.02)
    host = SignalServer(ModelTeacher(model, "t", "w"), SignalLimits(queue=1))
    service = loopback_to(host)
    link = client(service)
    signals = RemoteSignals(link, link.source(recipe("topk"), TAUS))
    batches = [batch, collate(SAMPLES[1:], pad=0), collate(SAMPLES[:-1], pad=0)]
    refused, inside, refusal = threading.Event(), host._signal, host._refusal

    def once_others_are_refused(ask: SignalRequest, batch: Batch) -> Frame:
        refused.wait(120)
        return inside(ask, batch)

    def refusing(frame: Frame, error: RequestRefused | ServerBusy) -> Frame:
        refused.set()
        return refusal(frame, error)

    host._signal, host._refusal = once_others_are_refused, refusing  # type: ignore[method-assign]
    assert [found.count for found in signals.signals(batches)] == [one.targets for one in batches]
    assert link.meter.messages["BUSY"] > 0
    link.close()
    service.close()


@pytest.mark.waits
def test_an_edge_that_waits_hears_that_others_are_answered(model: PreTrainedModel, batch: Batch) -> None:
    host = SignalServer(ModelTeacher(model, "t", "w"), SignalLimits(heartbeat_s=0.02))
    inside, go_on = host._signal, threading.Event()

    def slow(ask: SignalRequest, batch: Batch) -> Frame:
        if len(batch.ids) == 1:
            go_on.wait(120)
        return inside(ask, batch)

    host._signal = slow  # type: ignore[method-assign]
    service, counts = loopback_to(host), list[int]()
    waiting, other = client(service), client(service)
    others = RemoteSignals(other, other.source(recipe("topk"), [1.0]))
    others.signal(batch)

    def wait() -> None:
        one = collate(SAMPLES[4:], pad=0)
        counts.append(RemoteSignals(waiting, waiting.source(recipe("topk"), [1.0])).signal(one).count)

    thread, until = threading.Thread(target=wait), time.monotonic() + 120
    thread.start()
    try:
        while waiting.meter.messages["PING"] < 3 and time.monotonic() < until:
            others.signal(batch)
        assert waiting.meter.messages["PING"] >= 3 and not counts
    finally:
        go_on.set()
        thread.join()
    assert counts == [len(SAMPLES[4].ids) - SAMPLES[4].prompt]
    for link in (waiting, other):
        link.close()
    service.close()


def test_a_file_of_signals_is_filled_over_the_link(
    link: SignalClient,
    model: PreTrainedModel,
    tmp_path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    source = link.source(recipe("hybrid"), TAUS)
    signals = RemoteSignals(link, source)
    assert list(collect_signals(tmp_path, source, signals.signals, SAMPLES[:2], samples_per_file=1)) == [
        (0, 2),
        (1, 2),
        (2, 2),
    ]
    asks = link.meter.messages["SIGNAL"]
    assert list(collect_signals(tmp_path, source, signals.signals, SAMPLES, samples_per_file=2)) == [
        (2, 5),
        (4, 5),
        (5, 5),
    ]
    far = FileSignals(tmp_path, source)
    assert link.meter.messages["SIGNAL"] - asks == 2
    near = FileSignals.build(
        tmp_path / "near", SignalSource("teacher@1", "words", source.recipe, TAUS), Segment(model), SAMPLES
    )
    batch = collate(SAMPLES[1:4], pad=0)
    found, expected = far.signal(batch), near.signal(batch)
    assert found.key == expected.key and found.count == batch.targets
    assert torch.equal(found.payload["ids"], expected.payload["ids"])
    assert torch.allclose(found.payload["tail"], expected.payload["tail"], atol=1e-5)
