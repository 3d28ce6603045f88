"""Most likely tokens against dense logits."""

from __future__ import annotations

import pytest
import torch

from raycloud.distill.head_loss import LogitsView
from raycloud.distill.head_top_k import head_top_k


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [4, 100])
def test_values_and_gradients_are_those_of_dense_logits(softcap: float | None, chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, 5), (30, 5), (30,)))
    mix = torch.randn(9, 6, dtype=torch.float64)
    inputs = [one.requires_grad_() for one in (hidden, weight, bias)]
    ours, ids = head_top_k(LogitsView(hidden, weight, bias, softcap), 6, 2.0, chunk=chunk)
    logits = hidden @ weight.T + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    dense = (logits / 2.0).log_softmax(-1).topk(6)
    torch.testing.assert_close(ours, dense.values)
    assert torch.equal(ids, dense.indices)
    got = torch.autograd.grad((ours * mix).sin().sum(), inputs)
    wanted = torch.autograd.grad((dense.values * mix).sin().sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_head_gets_no_gradient_and_a_small_vocabulary_is_taken_whole() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    log_p, _ = head_top_k(LogitsView(hidden, torch.randn(7, 4)), 50)
    assert log_p.shape == (3, 7)
    log_p[:, 1].sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
