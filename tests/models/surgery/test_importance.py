"""Importance of heads and units is that of their outputs and gradients in a real backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raycloud.models.block_trace import block_calls, trace_block
from raycloud.models.roles import roles_of
from raycloud.models.surgery.axes import attention_axes, feed_forward_axes
from raycloud.models.surgery.importance import member_importance
from tests.models.blocks import KNOWN, inputs_of


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "swin"])
def test_the_importance_of_members_is_output_times_gradient(name: str) -> None:
    known = KNOWN[name]
    model, inputs = known.model(), inputs_of(known.model())
    block, held = model.get_submodule(known.block), dict[str, Tensor]()
    roles = roles_of(model, {"b": block})["b"]
    traced = trace_block(block, block_calls(model, {"b": block})["b"])

    def keep(path: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            held[path] = args[0]

        return hook

    for path in (known.output, known.down):
        block.get_submodule(path).register_forward_pre_hook(keep(path))
    hidden = model(**inputs).last_hidden_state
    (hidden * torch.rand(hidden.shape, generator=torch.Generator().manual_seed(6)).double()).sum().backward()
    (attention,), (network,) = roles.attentions, roles.feed_forwards
    for axes, path in (
        (attention_axes(traced, attention), known.output),
        (feed_forward_axes(traced, network), known.down),
    ):
        product = (held[path] * held[path].grad).flatten(0, -2).sum(0)
        wanted = product.view(axes.members, -1).sum(1).abs()
        assert torch.allclose(member_importance(block, axes), wanted, rtol=1e-9, atol=1e-12)


def test_a_block_without_gradients_has_no_importance() -> None:
    model = KNOWN["llama"].model()
    block = model.get_submodule(KNOWN["llama"].block)
    roles = roles_of(model, {"b": block})["b"]
    traced = trace_block(block, block_calls(model, {"b": block})["b"])
    with pytest.raises(ValueError, match=r"'mlp.down_proj.weight' has no gradient"):
        member_importance(block, feed_forward_axes(traced, roles.feed_forwards[0]))
