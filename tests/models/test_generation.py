"""Greedy generation equals the stock model's, also for prompts of different lengths together."""

from __future__ import annotations

import pytest
import torch

from raycloud.models.generation import greedy
from raycloud.models.segments import Segment
from tests.models.families import FAMILIES, tiny


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_greedy_equals_stock_generate(family: str) -> None:
    model = tiny(family)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (1, 4, 19)]
    ours = greedy(Segment(model), prompts, 12)
    for prompt, made in zip(prompts, ours, strict=True):
        stock = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert made == stock[0, len(prompt) :].tolist()


def test_a_text_ends_before_eos() -> None:
    model = tiny("llama")
    (free,) = greedy(Segment(model), [[5, 6]], 8)
    (cut,) = greedy(Segment(model), [[5, 6]], 8, eos={free[3]})
    assert cut == free[: free.index(free[3])]
    with pytest.raises(ValueError, match="empty prompt"):
        greedy(Segment(model), [[]], 8)
