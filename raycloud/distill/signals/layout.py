"""Layout of a signal's payload: the tensors that a receiver must expect, and their maximum size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raycloud.distill.signal_recipe import SignalRecipe
from raycloud.distill.signals.encoding import SCALE_BYTES, id_bytes
from raycloud.distill.signals.sampled import RAGGED_FIELDS
from raycloud.link.codecs.floats import CODECS

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape by name; for draws, which do not have one entry per token, the largest possible number of them."""


def layout(recipe: SignalRecipe, temperatures: int, tokens: int, vocabulary_size: int, hidden_size: int) -> Layout:
    """Layout of a signal for ``tokens`` tokens, from a teacher with a head (vocabulary_size, hidden_size)."""
    kind, k = recipe.kind, min(recipe.k, vocabulary_size)
    numbers = {"hidden": hidden_size, "logits": vocabulary_size}.get(kind, k)
    row_bytes = numbers + SCALE_BYTES if recipe.codec == "int8" else CODECS[recipe.codec].bytes_per_row(numbers)
    each = (tokens, temperatures)
    found: Layout = {}
    if kind == "scalars":
        found["log_p"] = (torch.float32, each)
    elif kind != "sampled":
        found["rows"] = (torch.uint8, (tokens, row_bytes))
    if kind in ("topk", "hybrid", "sorted"):
        found["tail"] = (torch.float32, each)
    if kind in ("topk", "hybrid"):
        found["ids"] = (torch.uint8, (tokens, k, id_bytes(vocabulary_size)))
    if kind in ("sampled", "hybrid"):
        draws = tokens * temperatures * recipe.draws
        found["entropy"] = (torch.float32, each)
        found["drawn"] = (torch.uint8, each)
        found["drawn_ids"] = (torch.uint8, (draws, id_bytes(vocabulary_size)))
        found["drawn_counts"] = (torch.uint8, (draws,))
    return found


def max_payload_bytes(expected: Layout) -> int:
    """Bytes of the largest payload with a layout."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in expected.values())


def check_layout(payload: Mapping[str, Tensor], expected: Layout) -> None:
    """Check that tensors match a layout.

    Raises:
        ValueError: names, a dtype or a shape differ.
    """
    if payload.keys() != expected.keys():
        raise ValueError(f"it holds {', '.join(sorted(payload))}, not {', '.join(sorted(expected))}")
    for name, (dtype, shape) in expected.items():
        found = payload[name]
        if name in RAGGED_FIELDS:
            shape = (int(payload["drawn"].long().sum()), *shape[1:])
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ValueError(
                f"{name} is {_format_tensor(found.dtype, found.shape)}, not {_format_tensor(dtype, shape)}"
            )


def _format_tensor(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
