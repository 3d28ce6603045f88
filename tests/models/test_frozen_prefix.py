"""A forward that begins behind a recorded prefix is the whole model's, and so are its gradients."""

from __future__ import annotations

import pytest
import torch

from raycloud.models.chain import block_list_of
from raycloud.models.frozen_prefix import Boundary, FrozenPrefix
from tests.models.blocks import KNOWN, inputs_of


@pytest.mark.parametrize("name", KNOWN)
def test_the_rest_of_a_model_equals_the_whole(name: str) -> None:
    model = KNOWN[name].model()
    inputs, blocks = inputs_of(model), list(block_list_of(model).blocks.values())
    wanted = model(**inputs).last_hidden_state
    weights = torch.rand(wanted.shape, generator=torch.Generator().manual_seed(2)).double()
    (wanted * weights).sum().backward()
    slopes = {name: one.grad for name, one in blocks[-1].named_parameters()}
    for start in range(len(blocks) + 1):
        prefix = FrozenPrefix(model, start)
        boundary = prefix.record(inputs)
        assert boundary.nbytes > 0 or not start
        model.zero_grad()
        found = prefix.run(boundary, inputs).last_hidden_state
        assert (found - wanted).abs().max() <= 1e-13
        if start < len(blocks):
            (found * weights).sum().backward()
            for name, one in blocks[-1].named_parameters():
                assert (one.grad is None) == (slopes[name] is None)
                assert one.grad is None or (one.grad - slopes[name]).norm() <= 1e-11 * slopes[name].norm() + 1e-13
        frozen = [one for block in blocks[:start] for one in block.parameters()]
        assert all(one.grad is None for one in frozen)


@pytest.mark.parametrize("name", ["llama", "vit", "swin", "t5-decoder"])
def test_samples_of_boundaries_are_selected_and_joined(name: str) -> None:
    model = KNOWN[name].model()
    inputs = {key: torch.cat([one, one.flip(0)]) for key, one in inputs_of(model).items()}
    count = len(next(iter(inputs.values())))
    prefix = FrozenPrefix(model, len(block_list_of(model).blocks) - 1)
    halves = [
        prefix.record({key: one[part] for key, one in inputs.items()})
        for part in (slice(0, count // 2), slice(count // 2, None))
    ]
    rows = torch.tensor([count - 1, 0, 1])
    chosen = {key: one[rows] for key, one in inputs.items()}
    found = prefix.run(Boundary.cat(halves).select(rows), chosen).last_hidden_state
    assert (found - model(**chosen).last_hidden_state).abs().max() <= 1e-13


def test_a_prefix_ends_at_a_block() -> None:
    with pytest.raises(ValueError, match="a prefix ends at block 0 to 3, not 4"):
        FrozenPrefix(KNOWN["llama"].model(), 4)
