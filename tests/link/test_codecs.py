"""Codecs and the meter."""

from __future__ import annotations

import pytest
import torch

from raycloud.link.codecs.floats import CODECS
from raycloud.link.meter import Meter


@pytest.mark.parametrize(("name", "error"), [("float32", 0.0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_round_trip_within_the_types_precision_row_by_row(name: str, error: float) -> None:
    codec = CODECS[name]
    hidden = torch.randn(17, 24, generator=torch.Generator().manual_seed(0)) * 50
    payload = codec.encode(hidden)
    assert payload.dtype == torch.uint8
    assert payload.shape == (17, codec.bytes_per_row(24))
    back = codec.decode(payload)
    assert ((back - hidden).abs() <= hidden.abs() * error).all()
    assert torch.equal(codec.decode(payload[3:9]), back[3:9])


def test_float16_saturates_instead_of_overflowing() -> None:
    codec = CODECS["float16"]
    assert torch.equal(codec.decode(codec.encode(torch.tensor([[1e6, -1e6]]))), torch.tensor([[65504.0, -65504.0]]))


def test_a_payload_of_broken_length_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        CODECS["float32"].decode(torch.zeros(2, 7, dtype=torch.uint8))


def test_the_meter_adds_by_kind() -> None:
    meter = Meter()
    meter.add("signals", 10)
    meter.add("signals", 5, messages=2)
    meter.add("head", 100)
    assert meter.payload == {"signals": 15, "head": 100}
    assert meter.messages["signals"] == 3
    assert meter.total == 115
