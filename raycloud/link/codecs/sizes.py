"""Payload bytes of a codec before a calibration exists, to plan a split."""

from __future__ import annotations

import torch

from raycloud.link.codecs.centred import CentredCodec, CutStatistics
from raycloud.link.codecs.codec import Codec
from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.link.codecs.fitting import GROUPS, OUTLIERS
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.quantised import Int4, Int8
from raycloud.link.codecs.registry import check_codec
from raycloud.link.codecs.transforms import SelectCoordinates

MOST_FIRST = 4
"""Most positions at the beginning of a text that a calibration sends as bfloat16."""


def widest_codec(name: str, width: int) -> CutCodec:
    """Codec of the most bytes that a calibration can choose under a name; only its sizes may be used.

    Args:
        name: name of a codec.
        width: numbers of a hidden state.

    Raises:
        ValueError: there is no such codec.
    """
    check_codec(name)
    if name in CODECS:
        return CutCodec(CODECS[name], width)
    outliers = torch.arange(max(count for count in OUTLIERS if count <= width // 2))
    statistics = CutStatistics(torch.zeros(width), 1.0, outliers)
    kept = SelectCoordinates(width, torch.arange(width - len(outliers)))
    everything = SelectCoordinates(width, torch.arange(width))
    inner: Codec
    match name:
        case "int8":
            inner = Int8(kept.size, kept.size)
        case "int4":
            inner = Int4(width, min(GROUPS), torch.zeros(16))
        case _:
            raise ValueError(f"the size of the codec '{name}' is not known here")
    return CutCodec(CentredCodec(name, statistics, kept if name == "int8" else everything, inner), width, MOST_FIRST)
