"""Rotary angles by position, computed once and looked up."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

_FEWEST = 256
# Their frequencies depend on how long the text is, so a position has no angle of its own.
_BY_LENGTH = ("dynamic", "longrope")


class Angles:
    """What a model's rotary module says about each position.

    One module serves all blocks of a model, but a model in parts would ask it once per part and token: a look-up costs
    a fraction of that.

    Args:
        rotary: the model's own module.
        per_layer_type: whether it is to be told the kind of block.
    """

    def __init__(self, rotary: nn.Module, per_layer_type: bool) -> None:
        self._rotary, self._per_layer_type = rotary, per_layer_type
        self._tables: dict[tuple[str, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def at(self, positions: Tensor | range, tokens: int, kind: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, h) at positions (B, T), or (1, T, h) at those of a range.

        Args:
            positions: all below ``tokens``.
            tokens: how long the text is.
            kind: of the block, see :func:`raycloud.models.anatomy.layer_type`.
            like: rows, for type and device.
        """
        types = getattr(self._rotary, "rope_type", "")
        if (types.get(kind, "") if isinstance(types, dict) else types) in _BY_LENGTH:
            if isinstance(positions, range):
                positions = torch.arange(positions.start, positions.stop, device=like.device)[None]
            return self._asked(positions, kind, like)
        key = (kind, like.dtype, like.device)
        table = self._tables.get(key)
        if table is None or table[0].shape[0] < tokens:
            # Plain tensors even in inference mode: training may use the table later.
            with torch.inference_mode(False), torch.no_grad():
                every = torch.arange(max(_FEWEST, 2 * tokens), device=like.device)[None]
                cos, sin = self._asked(every, kind, torch.empty(0, dtype=like.dtype, device=like.device))
                table = self._tables[key] = (cos[0], sin[0])
        if isinstance(positions, range):
            start, count = positions.start, len(positions)
            return table[0].narrow(0, start, count)[None], table[1].narrow(0, start, count)[None]
        return F.embedding(positions, table[0]), F.embedding(positions, table[1])

    def _asked(self, positions: Tensor, kind: str, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(like, positions, *((kind,) if self._per_layer_type else ()))
        return cos, sin
