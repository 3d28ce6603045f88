"""Costs of slices, against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raycloud.models.block_trace import block_calls, trace_block
from raycloud.models.roles import roles_in
from raycloud.models.surgery.axes import attention_axes, feed_forward_axes
from raycloud.models.surgery.cost import block_cost, forward_flops, sliced_parameters
from raycloud.models.surgery.slicing import SliceIndex, slice_block
from tests.models.blocks import KNOWN


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "vit"])
@pytest.mark.parametrize("groups", [1, 2])
def test_costs_are_those_of_the_slice(name: str, groups: int) -> None:
    known = KNOWN[name]
    model = known.model()
    block = model.get_submodule(known.block)
    call = block_calls(model, {known.block: block})[known.block]
    traced = trace_block(block, call)
    roles = roles_in(traced)
    cost = block_cost(
        block, [attention_axes(traced, roles.attentions[0]), feed_forward_axes(traced, roles.feed_forwards[0])]
    )
    part = slice_block(block, call, roles, SliceIndex([list(range(groups))], [list(range(7))]))
    assert sliced_parameters(cost, (groups, 7)) == sum(one.numel() for one in part.module.parameters())
    model.set_submodule(known.block, part.module)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        part.module(**call.to(torch.float64))
    texts, tokens = call.arguments[call.hidden].shape[:2]
    assert forward_flops(cost, (groups, 7), seen=tokens) * texts * tokens == counter.get_total_flops()


def test_more_than_there_is_cannot_be_kept() -> None:
    known = KNOWN["vit"]
    model = known.model()
    block = model.get_submodule(known.block)
    traced = trace_block(block, block_calls(model, {known.block: block})[known.block])
    cost = block_cost(block, [attention_axes(traced, roles_in(traced).attentions[0])])
    with pytest.raises(ValueError, match="a slice keeps from 1 to 4 members, not 5"):
        forward_flops(cost, (5,), 10)
