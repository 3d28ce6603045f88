"""Codec of a cut: uncompressed first positions, exact payload lengths, wrong lengths refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.errors import LinkError
from raycloud.link.codecs.cut_codec import CutCodec, float_cut_codec
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.quantised import Int8

WIDTH = 24
CODEC = CutCodec(Int8(WIDTH, WIDTH), WIDTH, first=3)


@settings(max_examples=80, deadline=None)
@given(pos=st.integers(0, 6), count=st.integers(0, 9), first=st.integers(0, 4))
def test_payloads_have_the_length_of_the_formula(pos: int, count: int, first: int) -> None:
    codec = CutCodec(Int8(WIDTH, WIDTH), WIDTH, first)
    payload = codec.encode(torch.randn(count, WIDTH), pos)
    num_first = len([at for at in range(pos, pos + count) if at < first])
    assert len(payload) == codec.payload_bytes(pos, count) == num_first * 2 * WIDTH + (count - num_first) * (WIDTH + 2)
    assert payload.ndim == 1
    assert payload.dtype == torch.uint8
    assert codec.decode(payload, pos, count).shape == (count, WIDTH)


def test_first_positions_arrive_as_bfloat16() -> None:
    hidden = torch.randn(6, WIDTH) * 1e5
    back = CODEC.decode(CODEC.encode(hidden, 0), 0, 6)
    assert torch.equal(back[:3], hidden[:3].bfloat16().float())
    assert not torch.equal(back[3:], hidden[3:].bfloat16().float())


def test_pieces_of_a_text_are_coded_as_the_whole() -> None:
    hidden = torch.randn(8, WIDTH)
    whole = CODEC.decode(CODEC.encode(hidden, 0), 0, 8)
    for cut in range(9):
        pieces = [
            CODEC.decode(CODEC.encode(part, at), at, len(part)) for at, part in ((0, hidden[:cut]), (cut, hidden[cut:]))
        ]
        assert torch.equal(torch.cat(pieces), whole)


def test_hidden_states_of_many_texts_arrive_as_each_text_would_alone() -> None:
    texts = torch.randn(3, 5, WIDTH)
    starts = (0, 2, 4)
    positions = torch.tensor([[start + at for at in range(5)] for start in starts])
    alone = [CODEC.decode(CODEC.encode(hidden, pos), pos, 5) for hidden, pos in zip(texts, starts, strict=True)]
    assert torch.equal(CODEC.arrived(texts.flatten(0, 1), positions.flatten()), torch.cat(alone))


@pytest.mark.parametrize("holder", [bytes, bytearray, lambda raw: memoryview(bytes(raw))])
def test_whatever_holds_bytes_is_decoded(holder: type) -> None:
    hidden = torch.randn(5, WIDTH)
    payload = CODEC.encode(hidden, 1)
    assert torch.equal(CODEC.decode(holder(payload.numpy().tobytes()), 1, 5), CODEC.decode(payload, 1, 5))


@pytest.mark.parametrize("wrong", [-1, 1])
def test_other_lengths_are_refused(wrong: int) -> None:
    length = CODEC.payload_bytes(0, 5)
    with pytest.raises(
        ValueError, match=f"5 hidden states from position 0 must be {length} bytes, got {length + wrong}"
    ):
        CODEC.decode(bytes(length + wrong), 0, 5)
    with pytest.raises(ValueError, match="codes hidden states of 24 numbers"):
        CODEC.encode(torch.zeros(2, WIDTH + 1), 0)


@pytest.mark.parametrize("name", CODECS)
def test_casts_need_no_calibration(name: str) -> None:
    codec = float_cut_codec(name, WIDTH)
    hidden = torch.randn(4, WIDTH)
    assert codec.name == name
    assert torch.allclose(codec.decode(codec.encode(hidden.double(), 0), 0, 4), hidden, rtol=2**-8)


def test_codecs_that_need_one_say_so() -> None:
    with pytest.raises(LinkError, match="codec 'int8' needs a calibration or is unknown; allowed without: float32"):
        float_cut_codec("int8", WIDTH)


def test_gradients_and_half_precision_are_taken_as_they_come() -> None:
    hidden = torch.randn(2, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    codec = float_cut_codec("float32", WIDTH)
    assert torch.equal(codec.decode(codec.encode(hidden, 0), 0, 2), hidden.detach().float())
