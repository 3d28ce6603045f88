"""The head's product in blocks equals the whole product, on any device and with any content of its buffer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raycloud.distill.head_product import head_product


def made(count: int, vocab_size: int = 1_100) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, 24, generator=made),
        torch.randn(vocab_size, 24, generator=made),
        torch.randn(vocab_size, generator=made),
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 300])
@pytest.mark.parametrize("vocab_size", [7, 512, 1_100])
def test_blocks_are_the_whole(count: int, vocab_size: int, biased: bool) -> None:
    hidden, weight, bias = made(count, vocab_size)
    given = bias if biased else None
    assert torch.allclose(head_product(hidden, weight, given), nn.functional.linear(hidden, weight, given), atol=1e-5)


def test_space_is_written_over_and_a_last_chunk_takes_its_beginning() -> None:
    hidden, weight, bias = made(5)
    space = torch.full((8, 1_100), torch.nan)
    found = head_product(hidden, weight, bias, space)
    assert found.data_ptr() == space.data_ptr() and found.shape == (5, 1_100)
    assert torch.allclose(found, nn.functional.linear(hidden, weight, bias), atol=1e-5)
    assert space[5:].isnan().all()


@pytest.mark.parametrize("wanting", [0, 1, 2])
def test_a_gradient_is_not_lost(wanting: int) -> None:
    inputs = made(5)
    inputs[wanting].requires_grad_()
    head_product(*inputs).sum().backward()
    assert inputs[wanting].grad is not None and float(inputs[wanting].grad.abs().sum()) > 0


def test_other_types_and_autocast_take_the_librarys_way() -> None:
    hidden, weight, bias = made(5)
    for kind in (torch.float64, torch.bfloat16):
        assert head_product(hidden.to(kind), weight.to(kind), bias.to(kind)).dtype == kind
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head_product(hidden, weight, bias).dtype == torch.bfloat16
