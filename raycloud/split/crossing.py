"""Rows of a batch as they are on the other side of a cut, and what it took to bring them there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.codecs.boundary import Boundary


@dataclass(frozen=True)
class Crossed:
    """Rows (B, T, d) as decoded, zeros where there is no token, and the coded bytes of all of them."""

    rows: Tensor
    payload_bytes: int


def crossed(code: Boundary, rows: Tensor, valid: Tensor) -> Crossed:
    """Send right-padded rows through a codec, each text coded on its own from position 0.

    Args:
        code: of the cut.
        rows: (B, T, d), in any type and on any device; so are the decoded ones.
        valid: (B, T), False for padding.
    """
    arrived, size = torch.zeros_like(rows), 0
    for text, length in enumerate(valid.sum(dim=1).tolist()):
        payload = code.encode(rows[text, :length], pos=0)
        arrived[text, :length] = code.decode(payload, pos=0, rows=length).to(arrived)
        size += len(payload)
    return Crossed(arrived, size)
