"""Table of rotary embeddings by position, computed once and looked up."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PretrainedConfig

_FEWEST = 256
# Frequencies of these types depend on the length of the text, so a position alone does not determine its angles.
_BY_LENGTH = ("dynamic", "longrope")
# The library's modules keep the frequencies of the last text that they computed.
_asking = threading.Lock()


def fixed_rope_length(config: PretrainedConfig) -> int | None:
    """Length in tokens up to which rotary angles depend on the position alone; None if there is no such limit.

    Above it, the angles depend on the number of tokens known at the time of the call: a prompt must be given in one
    call, as in ``transformers``, and a result cannot be reproduced from other pieces of the text.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in rope.values() if isinstance(one, dict)] or [
        rope
    ]  # some families have one per kind of block
    lengths = {
        # Dynamic scaling begins at max_position_embeddings, whatever the other settings are.
        "longrope": lambda one: int(one["original_max_position_embeddings"]),
        "dynamic": lambda one: int(config.max_position_embeddings),
    }
    found = [lengths[one["rope_type"]](one) for one in kinds if one.get("rope_type") in lengths]
    return min(found, default=None)


class RotaryTable:
    """Table of the outputs of a model's rotary module, by position.

    One module serves all blocks of a model, but a model in parts would call it once per part and token: a look-up costs
    a fraction of a call.

    Args:
        rotary: the model's own module.
        per_layer_type: whether the module takes the layer type of the block as an argument.
    """

    def __init__(self, rotary: nn.Module, per_layer_type: bool) -> None:
        self._rotary, self._per_layer_type = rotary, per_layer_type
        self._tables: dict[tuple[str, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def at(self, positions: Tensor | range, tokens: int, kind: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (B, T, h) at positions (B, T), or (1, T, h) at the positions of a range.

        Args:
            positions: all below ``tokens``.
            tokens: length of the text.
            kind: layer type of the block, see :func:`raycloud.models.structure.layer_type`.
            like: hidden states, for type and device.
        """
        types = getattr(self._rotary, "rope_type", "")
        if (types.get(kind, "") if isinstance(types, dict) else types) in _BY_LENGTH:
            if isinstance(positions, range):
                positions = torch.arange(positions.start, positions.stop, device=like.device)[None]
            # One text at a time: the angles of a text must not depend on the other texts of the batch.
            rows = [self._fresh(row[None], kind, like) for row in positions]
            return torch.cat([cos for cos, _ in rows]), torch.cat([sin for _, sin in rows])
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

    def _fresh(self, positions: Tensor, kind: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the rotary module with its frequencies reset: the library's module keeps the longest scale."""
        prefix = f"{kind}_" if self._per_layer_type else ""
        with _asking, torch.inference_mode(False), torch.no_grad():
            first = getattr(self._rotary, f"{prefix}original_inv_freq")
            setattr(self._rotary, f"{prefix}inv_freq", first.clone())
            setattr(self._rotary, f"{prefix}max_seq_len_cached", self._rotary.original_max_seq_len)
            return self._asked(positions.clone(), kind, torch.empty(0, dtype=like.dtype, device=like.device))

    def _asked(self, positions: Tensor, kind: str, like: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(like, positions, *((kind,) if self._per_layer_type else ()))
        return cos, sin
