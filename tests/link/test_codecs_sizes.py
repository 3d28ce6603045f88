"""Sizes of codecs before a calibration: those of the widest that a calibration can choose."""

from __future__ import annotations

import pytest
import torch

from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.link.codecs.fitting import (
    FITTED,
    GROUPS,
    LEVELS,
    OUTLIERS,
    CutFit,
    FitChoices,
    FittedName,
    random_rotation,
)
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.sizes import MOST_FIRST, widest_codec


def fitted(name: FittedName, width: int, outliers: int, group: int, first: int) -> CutCodec:
    chosen = FitChoices(
        unit=1.0, first=first, int8_outliers=outliers, int4_outliers=outliers, int4_group=group, errors={}
    )
    fit = CutFit(chosen, torch.zeros(width), torch.arange(outliers), torch.linspace(-1, 1, LEVELS))
    return CutCodec(fit.codec(name, random_rotation(width)), width, first)


@pytest.mark.parametrize("width", [96, 97, 576])
@pytest.mark.parametrize("name", FITTED)
def test_the_widest_calibrated_codec_is_as_wide_as_its_payload(name: FittedName, width: int) -> None:
    hidden = torch.randn(7, width, generator=torch.Generator().manual_seed(1))
    widest = widest_codec(name, width)
    payload = fitted(name, width, max(OUTLIERS), min(GROUPS), MOST_FIRST).encode(hidden, pos=0)
    assert widest.payload_bytes(0, 7) == len(payload)
    for outliers in OUTLIERS:
        for group in GROUPS:
            narrower = fitted(name, width, outliers, group, 1)
            assert narrower.payload_bytes(0, 7) <= widest.payload_bytes(0, 7)


@pytest.mark.parametrize("name", CODECS)
def test_a_cast_has_one_size(name: str) -> None:
    hidden = torch.randn(7, 96)
    assert widest_codec(name, 96).payload_bytes(5, 7) == len(widest_codec(name, 96).encode(hidden, pos=5))


def test_another_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="no codec 'int3'; allowed: float32"):
        widest_codec("int3", 96)
