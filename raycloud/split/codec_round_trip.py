"""Codec round trip: hidden states of a batch as the other side of a cut decodes them, and their payload bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.codecs.cut_codec import CutCodec


@dataclass(frozen=True)
class CodecRoundTrip:
    """Decoded hidden states (B, T, d), zeros for padding, and the payload bytes of all of them."""

    hidden: Tensor
    payload_bytes: int


def codec_round_trip(codec: CutCodec, hidden: Tensor, valid: Tensor) -> CodecRoundTrip:
    """Encode and decode right-padded hidden states, each text separately from position 0.

    Args:
        codec: codec of the cut.
        hidden: hidden states (B, T, d) of any dtype on any device; the decoded ones have the same.
        valid: (B, T), False for padding.
    """
    arrived, size = torch.zeros_like(hidden), 0
    for text, length in enumerate(valid.sum(dim=1).tolist()):
        payload = codec.encode(hidden[text, :length], pos=0)
        arrived[text, :length] = codec.decode(payload, pos=0, count=length).to(arrived)
        size += len(payload)
    return CodecRoundTrip(arrived, size)
