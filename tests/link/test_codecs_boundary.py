"""The code of a cut: first positions apart, exact payload lengths, wrong lengths refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.errors import LinkError
from raycloud.link.codecs import CODECS
from raycloud.link.codecs.boundary import Boundary, plain_boundary
from raycloud.link.codecs.quantised import Int8

WIDTH = 24
CODE = Boundary(Int8(WIDTH, WIDTH), WIDTH, first=3)


@settings(max_examples=80, deadline=None)
@given(pos=st.integers(0, 6), rows=st.integers(0, 9), first=st.integers(0, 4))
def test_payloads_have_the_length_of_the_formula(pos: int, rows: int, first: int) -> None:
    code = Boundary(Int8(WIDTH, WIDTH), WIDTH, first)
    payload = code.encode(torch.randn(rows, WIDTH), pos)
    apart = len([at for at in range(pos, pos + rows) if at < first])
    assert len(payload) == code.payload_bytes(pos, rows) == apart * 2 * WIDTH + (rows - apart) * (WIDTH + 2)
    assert payload.ndim == 1
    assert payload.dtype == torch.uint8
    assert code.decode(payload, pos, rows).shape == (rows, WIDTH)


def test_first_positions_arrive_as_bfloat16() -> None:
    rows = torch.randn(6, WIDTH) * 1e5
    back = CODE.decode(CODE.encode(rows, 0), 0, 6)
    assert torch.equal(back[:3], rows[:3].bfloat16().float())
    assert not torch.equal(back[3:], rows[3:].bfloat16().float())


def test_pieces_of_a_text_are_coded_as_the_whole() -> None:
    rows = torch.randn(8, WIDTH)
    whole = CODE.decode(CODE.encode(rows, 0), 0, 8)
    for cut in range(9):
        pieces = [
            CODE.decode(CODE.encode(part, at), at, len(part)) for at, part in ((0, rows[:cut]), (cut, rows[cut:]))
        ]
        assert torch.equal(torch.cat(pieces), whole)


def test_rows_of_many_texts_arrive_as_each_text_would_alone() -> None:
    texts = torch.randn(3, 5, WIDTH)
    starts = (0, 2, 4)
    positions = torch.tensor([[start + at for at in range(5)] for start in starts])
    alone = [CODE.decode(CODE.encode(rows, pos), pos, 5) for rows, pos in zip(texts, starts, strict=True)]
    assert torch.equal(CODE.arrived(texts.flatten(0, 1), positions.flatten()), torch.cat(alone))


@pytest.mark.parametrize("holder", [bytes, bytearray, lambda raw: memoryview(bytes(raw))])
def test_whatever_holds_bytes_is_decoded(holder: type) -> None:
    rows = torch.randn(5, WIDTH)
    payload = CODE.encode(rows, 1)
    assert torch.equal(CODE.decode(holder(payload.numpy().tobytes()), 1, 5), CODE.decode(payload, 1, 5))


@pytest.mark.parametrize("wrong", [-1, 1])
def test_other_lengths_are_refused(wrong: int) -> None:
    length = CODE.payload_bytes(0, 5)
    with pytest.raises(ValueError, match=f"5 rows from position 0 must be {length} bytes, got {length + wrong}"):
        CODE.decode(bytes(length + wrong), 0, 5)
    with pytest.raises(ValueError, match="codes rows of 24 numbers"):
        CODE.encode(torch.zeros(2, WIDTH + 1), 0)


@pytest.mark.parametrize("name", CODECS)
def test_casts_need_no_calibration(name: str) -> None:
    code = plain_boundary(name, WIDTH)
    rows = torch.randn(4, WIDTH)
    assert code.name == name
    assert torch.allclose(code.decode(code.encode(rows.double(), 0), 0, 4), rows, rtol=2**-8)


def test_codecs_that_need_one_say_so() -> None:
    with pytest.raises(LinkError, match="codec 'int8' needs a calibration or is unknown; allowed without: float32"):
        plain_boundary("int8", WIDTH)


def test_gradients_and_half_precision_are_taken_as_they_come() -> None:
    rows = torch.randn(2, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    code = plain_boundary("float32", WIDTH)
    assert torch.equal(code.decode(code.encode(rows, 0), 0, 2), rows.detach().float())
