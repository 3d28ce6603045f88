"""Copy of the teacher's head at the edge, which maps hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raycloud.distill.head_product import head_product
from raycloud.distill.signal_recipe import SignalCodec
from raycloud.models.segments import Segment


@dataclass(frozen=True)
class FrozenHead:
    """Copy of the teacher's head that stays at the edge, for ``hidden`` signals."""

    weight: Tensor
    """(W, D)"""
    bias: Tensor | None = None
    softcap: float | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenHead:
        """The same head on another device and in another dtype."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (c, W) of final hidden states (c, D)."""
        logits = head_product(hidden, self.weight, self.bias)
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    @property
    def nbytes(self) -> int:
        """Number of bytes sent."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


def frozen_head(teacher: Segment, codec: SignalCodec) -> FrozenHead:
    """Copy a teacher's head as it arrives at the edge, in the dtype of ``codec``; a factor of its logits is in it.

    It crosses the link once; with ``int8`` hidden states it is bfloat16.

    Raises:
        ValueError: the head is not one linear layer.
    """
    if not isinstance(teacher.head, nn.Linear):
        raise ValueError("hidden signals need a teacher whose head is one linear map; use kind: topk")
    dtype = torch.bfloat16 if codec == "int8" else getattr(torch, codec)
    rule = teacher.structure.logits
    scale = rule.scale(teacher.config)

    def sent(tensor: Tensor) -> Tensor:
        plain = tensor.detach()
        return (plain if scale == 1.0 else plain * scale).to(dtype).cpu()

    bias = None if teacher.head.bias is None else sent(teacher.head.bias)
    return FrozenHead(sent(teacher.head.weight), bias, rule.cap(teacher.config))
