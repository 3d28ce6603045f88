"""What is asked ahead, kept for other students, and gathered in a file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, Sample, collate
from raycloud.distill.signal_file import FileSignals, Origin, gathering
from raycloud.distill.signal_link import LinkSignals, SignalHost, SignalLimits, TeacherLink
from raycloud.distill.signal_link import edge as edge_side
from raycloud.distill.signals import observe
from raycloud.link.channel import Loopback
from raycloud.link.network import Network, Shaped
from raycloud.models.segments import Segment
from tests.distill.signal_link.wiring import SAMPLES, TAUS, recipe


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
