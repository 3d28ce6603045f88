"""Memory layout of weights: the same numbers in another order make decoding a token faster."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def optimise_decode_layout(modules: Iterable[nn.Module]) -> None:
    """Store the wide linear maps of modules on a CPU column by column; shapes, values and sharing stay as they are.

    Each step of generation multiplies one vector by a matrix. In the usual layout each output is a dot product with a
    row of the weight; stored by columns, all outputs accumulate together while the weight is read once in order. With
    more outputs than inputs the latter was 1.1 to 1.8 times as fast in our measurements of torch's float32 kernels
    (SmolLM2's head 12 to 7 ms, its upper feed-forward maps 0.32 to 0.22 ms), with fewer outputs slower; for a dozen
    tokens and more it hardly matters.
    """
    for module in modules:
        for one in module.modules():
            if not isinstance(one, nn.Linear) or one.out_features <= one.in_features:
                continue
            weight = one.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                weight.data = weight.data.t().contiguous().t()
