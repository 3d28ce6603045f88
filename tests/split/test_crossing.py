"""Batches of rows through a codec."""

from __future__ import annotations

import torch

from raycloud.link.codecs.boundary import Boundary
from raycloud.link.codecs.quantised import Int8
from raycloud.split.crossing import crossed


def test_each_text_is_coded_from_its_own_beginning_and_padding_costs_nothing() -> None:
    code = Boundary(Int8(8, 8), 8, first=1)
    rows = torch.randn(2, 5, 8)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    sent = crossed(code, rows, valid)
    assert sent.payload_bytes == code.payload_bytes(0, 5) + code.payload_bytes(0, 3) == 2 * 16 + 6 * 10
    assert torch.equal(sent.rows[:, 0], rows[:, 0].bfloat16().float())
    assert torch.equal(sent.rows[1, 3:], torch.zeros(2, 8))


def test_rows_keep_their_type() -> None:
    code = Boundary(Int8(8, 8), 8, first=1)
    assert crossed(code, torch.randn(1, 3, 8).bfloat16(), torch.ones(1, 3).bool()).rows.dtype == torch.bfloat16
