"""Meter of what an edge pays: operations by torch's own counter, and bytes that autograd keeps for a backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(
    slope: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(slope, query, key, value))


# Torch's counter knows the attention kernels of GPUs only.
_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass
class MeteredCost:
    """Cost of a part of a program, as metered."""

    flops: int = 0
    """Floating-point operations of matrix products, convolutions and attention."""
    kept: int = 0
    """Bytes of the tensors that autograd kept for the backward, parameters not counted."""
    _counter: FlopCounterMode | None = None

    def now(self) -> MeteredCost:
        """Cost so far, within the context."""
        return MeteredCost(self._counter.get_total_flops() if self._counter is not None else self.flops, self.kept)


@contextmanager
def measured(module: nn.Module, apart: tuple[Tensor, ...] = ()) -> Iterator[MeteredCost]:
    """Measure the operations in a context, and the bytes that its forward keeps for a backward.

    Args:
        module: module whose parameters and buffers are held anyway.
        apart: further tensors that are held anyway.
    """
    result, known = MeteredCost(), {_storage(one) for one in (*module.parameters(), *module.buffers(), *apart)}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = _storage(tensor)
        if place not in known and place not in seen:
            seen[place] = tensor.detach()  # held, so that its place is not used again
            result.kept += tensor.untyped_storage().nbytes()
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    result._counter = counter
    with saved_tensors_hooks(pack, lambda tensor: tensor), counter:
        yield result
    result.flops = counter.get_total_flops()


def training_state_bytes(parameters: int) -> int:
    """Bytes of gradients and of AdamW's two moments, in float32."""
    return 12 * parameters


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.device.type != "meta" else id(tensor.untyped_storage())
