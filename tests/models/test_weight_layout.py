"""A model with its weights in another memory order gives the same results."""

from __future__ import annotations

from pathlib import Path

import torch

from raycloud.models.loading import load
from raycloud.models.weight_layout import optimise_decode_layout


def test_only_the_order_in_memory_changes(tiny_llama: Path) -> None:
    model = load(str(tiny_llama), device="cpu", dtype="float32").model
    ids = torch.arange(1, 9)[None]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(ids).logits
    optimise_decode_layout([model])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert (model(ids).logits - logits).norm() <= 1e-5 * logits.norm()


def test_wide_maps_lie_by_columns_and_tall_ones_by_rows() -> None:
    wide, tall = torch.nn.Linear(4, 9), torch.nn.Linear(9, 4)
    optimise_decode_layout([torch.nn.Sequential(wide, tall)])
    assert wide.weight.stride() == (1, 9)
    assert tall.weight.stride() == (9, 1)


def test_a_tied_head_stays_tied() -> None:
    embedding, head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    optimise_decode_layout([head])
    assert head.weight is embedding.weight
    assert embedding.weight.stride() == (1, 50)
