"""Signals over a link equal those computed locally, bit by bit, and their bytes are counted."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from transformers import PreTrainedModel

from raycloud.data.batches import Batch, Sample, collate
from raycloud.distill.signals import SignalKind, compute_signal, frozen_head
from raycloud.distill.signals.layout import layout, max_payload_bytes
from raycloud.distill.signals.remote import RemoteSignals, SignalClient
from raycloud.distill.signals.remote.messages import pack_batch
from raycloud.errors import LinkError
from raycloud.link.channel import Loopback, MeteredChannel
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from tests.distill.signals.remote.wiring import SAMPLES, TAUS, client, recipe, same


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", get_args(SignalKind))
def test_every_kind_arrives_as_observed(
    kind: SignalKind, codec: str, link: SignalClient, model: PreTrainedModel, batch: Batch
) -> None:
    if codec == "int8" and kind != "hidden":
        return
    wanted = recipe(kind, codec)
    expected = compute_signal(Segment(model), "teacher@1", batch, wanted, TAUS)
    found = RemoteSignals(link, link.source(wanted, TAUS)).signal(batch)
    assert same(found, expected)
    words, width = model.get_output_embeddings().weight.shape
    most = max_payload_bytes(layout(wanted, len(TAUS), batch.targets, words, width))
    assert expected.nbytes <= most
    if "drawn" not in expected.payload:
        assert expected.nbytes == most


def test_tables_arrive_bit_by_bit(link: SignalClient, model: PreTrainedModel, batch: Batch) -> None:
    for codec in ("float32", "bfloat16", "int8"):
        expected = frozen_head(Segment(model), codec)
        head = link.head(codec)
        assert torch.equal(head.weight, expected.weight) and head.weight.dtype == expected.weight.dtype
        assert head.bias is None and head.softcap == expected.softcap
    assert torch.equal(link.embedding(), model.get_input_embeddings().weight.bfloat16())
    exact = compute_signal(Segment(model), "teacher@1", batch, recipe("logits"), [1.0]).targets(slice(None), 1.0, None)
    signal = RemoteSignals(link, link.source(recipe("hidden"), [1.0])).signal(batch)
    assert torch.allclose(signal.targets(slice(None), 1.0, link.head("float32")).log_p, exact.log_p, atol=1e-5)


UP, DOWN = ("OPEN", "SIGNAL", "HEAD"), ("OPEN_OK", "SIGNAL_OK", "HEAD_OK", "REFUSED")


def test_counted_bytes_are_those_that_crossed(loopback: Loopback, batch: Batch) -> None:
    crossed, counted = Meter(), Meter()
    link = client(loopback, lambda channel: MeteredChannel(channel, crossed), meter=counted)
    signals = RemoteSignals(link, link.source(recipe("hybrid"), TAUS))
    signal = signals.signal(batch)
    link.head("bfloat16")
    with pytest.raises(LinkError, match="refused"):
        signals.signal(collate([Sample(tuple(range(41)), 1)], pad=0))
    up, down = ({kind: counted.payload[kind] for kind in kinds} for kinds in (UP, DOWN))
    assert crossed.payload == {"up": sum(up.values()), "down": sum(down.values())}
    assert sum(counted.messages.values()) == sum(crossed.messages.values()) and counted.messages["SIGNAL"] == 2
    assert signal.nbytes < counted.payload["SIGNAL_OK"] < signal.nbytes + 1500
    link.close()
    # An id below 97 is one byte, and whether the next is to be learned one bit.
    tokens = sum(len(sample.ids) for sample in SAMPLES)
    lengths, raw = pack_batch(batch, 97)
    assert lengths == [len(sample.ids) for sample in SAMPLES] and len(raw) == tokens + -(-tokens // 8)
