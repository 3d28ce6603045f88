"""Which tensors a signal is made of: what a receiver must expect, and how large it can get, before it is there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raycloud.distill.signals.coding import SCALE_BYTES, id_bytes
from raycloud.distill.signals.draws import RAGGED
from raycloud.distill.signals.recipe import SignalRecipe
from raycloud.link.codecs import CODECS

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape by name; of what is not one row a token, the most rows there can be."""


def layout(recipe: SignalRecipe, temperatures: int, tokens: int, words: int, width: int) -> Layout:
    """The payload of a signal about so many tokens, of a teacher with a head (words, width)."""
    kind, k = recipe.kind, min(recipe.k, words)
    numbers = {"hidden": width, "logits": words}.get(kind, k)
    row = numbers + SCALE_BYTES if recipe.codec == "int8" else CODECS[recipe.codec].bytes_per_row(numbers)
    each = (tokens, temperatures)
    found: Layout = {}
    if kind == "scalars":
        found["log_p"] = (torch.float32, each)
    elif kind != "sampled":
        found["rows"] = (torch.uint8, (tokens, row))
    if kind in ("topk", "hybrid", "sorted"):
        found["tail"] = (torch.float32, each)
    if kind in ("topk", "hybrid"):
        found["ids"] = (torch.uint8, (tokens, k, id_bytes(words)))
    if kind in ("sampled", "hybrid"):
        draws = tokens * temperatures * recipe.draws
        found["entropy"] = (torch.float32, each)
        found["drawn"] = (torch.uint8, each)
        found["drawn_ids"] = (torch.uint8, (draws, id_bytes(words)))
        found["drawn_counts"] = (torch.uint8, (draws,))
    return found


def most_bytes(expected: Layout) -> int:
    """Bytes of the largest payload of a layout."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in expected.values())


def check(payload: Mapping[str, Tensor], expected: Layout) -> None:
    """Whether tensors are a payload of a layout.

    Raises:
        ValueError: names, a type or a shape differ.
    """
    if payload.keys() != expected.keys():
        raise ValueError(f"it holds {', '.join(sorted(payload))}, not {', '.join(sorted(expected))}")
    for name, (dtype, shape) in expected.items():
        found = payload[name]
        if name in RAGGED:
            shape = (int(payload["drawn"].long().sum()), *shape[1:])
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ValueError(f"{name} is {_said(found.dtype, found.shape)}, not {_said(dtype, shape)}")


def _said(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
