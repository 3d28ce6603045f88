"""The teacher's head at the edge, where hidden rows become logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raycloud.distill.head_product import head_product
from raycloud.distill.signals.recipe import SignalCodec
from raycloud.models.segments import Segment


@dataclass(frozen=True)
class FrozenHead:
    """A copy of the teacher's head that stays at the edge, for ``hidden`` signals."""

    weight: Tensor
    """(W, D)"""
    bias: Tensor | None = None
    softcap: float | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> FrozenHead:
        """The same head where and in the type it is computed with."""
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits (c, W) of final rows (c, D)."""
        logits = head_product(rows, self.weight, self.bias)
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

    @property
    def nbytes(self) -> int:
        """Bytes it takes to send."""
        return self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0)


def frozen_head(teacher: Segment, codec: SignalCodec) -> FrozenHead:
    """A copy of a teacher's head as it arrives at the edge after crossing the link in ``codec``'s type.

    It crosses once: where rows are ``int8`` it is bfloat16.

    Raises:
        ValueError: the head is more than one linear map.
    """
    if not isinstance(teacher.head, nn.Linear):
        raise ValueError("hidden signals need a teacher whose head is one linear map; use kind: topk")
    dtype = torch.bfloat16 if codec == "int8" else getattr(torch, codec)
    bias = teacher.head.bias
    return FrozenHead(
        teacher.head.weight.detach().to(dtype).cpu(),
        None if bias is None else bias.detach().to(dtype).cpu(),
        getattr(teacher.config, "final_logit_softcapping", None),
    )
