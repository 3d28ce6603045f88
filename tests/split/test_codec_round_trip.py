"""Batches of hidden states through a codec."""

from __future__ import annotations

import torch

from raycloud.link.codecs.cut_codec import CutCodec
from raycloud.link.codecs.quantised import Int8
from raycloud.split.codec_round_trip import codec_round_trip


def test_each_text_is_coded_from_its_own_beginning_and_padding_costs_nothing() -> None:
    codec = CutCodec(Int8(8, 8), 8, first=1)
    hidden = torch.randn(2, 5, 8)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    sent = codec_round_trip(codec, hidden, valid)
    assert sent.payload_bytes == codec.payload_bytes(0, 5) + codec.payload_bytes(0, 3) == 2 * 16 + 6 * 10
    assert torch.equal(sent.hidden[:, 0], hidden[:, 0].bfloat16().float())
    assert torch.equal(sent.hidden[1, 3:], torch.zeros(2, 8))


def test_hidden_states_keep_their_type() -> None:
    codec = CutCodec(Int8(8, 8), 8, first=1)
    sent = codec_round_trip(codec, torch.randn(1, 3, 8).bfloat16(), torch.ones(1, 3).bool())
    assert sent.hidden.dtype == torch.bfloat16
