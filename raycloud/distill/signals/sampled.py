"""Token ids drawn from the teacher's distribution, as ids and counts.

The R draws are evenly spaced points through the cumulative distribution, starting at one random offset (systematic
sampling): as with R independent draws, an id is drawn R · p times on average, but never off by one or more. Estimates
from the counts are unbiased for the same reason as with independent draws (Anshumann et al. 2025, arXiv 2503.16870),
and have less variance: on SmolLM2 with R = 50 the relative error of a forward KL's gradient in the student's hidden
states was 0.09 instead of 0.16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from raycloud.distill.ragged import padded
from raycloud.distill.signals.encoding import decode_ids, encode_ids

RAGGED_FIELDS = ("drawn_ids", "drawn_counts")
"""Fields without one entry per token: the distinct ids of every token and temperature, concatenated."""


def draw_offsets(keys: Sequence[str], tokens: Sequence[int], temperatures: int) -> Tensor:
    """Random numbers in [0, 1) for each token of several samples, (Σ tokens, temperatures), seeded by the samples'
    keys.

    The generator's bits are the same on every machine and in every version of numpy.
    """
    bits = [
        np.random.Philox(key=int(key[:32], 16)).random_raw(count * temperatures)
        for key, count in zip(keys, tokens, strict=True)
    ]
    return torch.from_numpy((np.concatenate(bits) >> 11) * 2.0**-53).view(-1, temperatures)


def draw(mass: Tensor, count: int, offset: Tensor) -> Tensor:
    """Draw ascending ids (c, count) from unnormalised masses (c, W) with offsets (c,) in [0, 1)."""
    cumulated = mass.cumsum(dim=-1)
    total = cumulated[:, -1:]
    spaced = (torch.arange(count, device=mass.device) + offset[:, None]) / count
    # Rounding must not lead beyond the last id with mass.
    points = (spaced.to(mass.dtype) * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, points, right=True).clamp_max(mass.shape[-1] - 1)


def encode_draws(draws: Tensor, vocabulary_size: int) -> dict[str, Tensor]:
    """Payload of ascending draws (c, temperatures, R) of ids below ``vocabulary_size``.

    ``drawn`` (c, temperatures) is the number of distinct ids, ``drawn_ids`` (t, bytes) are the ids, and
    ``drawn_counts`` (t,) is how often each was drawn.
    """
    first = torch.ones_like(draws, dtype=torch.bool)
    first[..., 1:] = draws[..., 1:] != draws[..., :-1]
    begins = first.flatten().nonzero()[:, 0]
    counts = torch.cat([begins, begins.new_tensor([draws.numel()])]).diff()
    return {
        "drawn": first.sum(dim=-1).to(torch.uint8),
        "drawn_ids": encode_ids(draws[first], vocabulary_size),
        "drawn_counts": counts.to(torch.uint8),
    }


def decode_draws(payload: Mapping[str, Tensor], at: int) -> tuple[Tensor, Tensor]:
    """Ids (c, S) and their shares of the draws (c, S) at temperature index ``at``; zeros after a token's last id."""
    drawn = payload["drawn"].long()
    ends = drawn.flatten().cumsum(dim=0)
    begins = torch.cat([ends.new_zeros(1), ends])
    ids = padded(decode_ids(payload["drawn_ids"]), begins).unflatten(0, drawn.shape)[:, at]
    counts = padded(payload["drawn_counts"].float(), begins).unflatten(0, drawn.shape)[:, at]
    return ids, counts / counts.sum(dim=-1, keepdim=True)


def tokens_at(payload: Mapping[str, Tensor], which: slice | Tensor) -> dict[str, Tensor]:
    """Payload of some tokens, in the given order."""
    taken = {name: tensor[which] for name, tensor in payload.items() if name not in RAGGED_FIELDS}
    if "drawn" in payload:
        lengths = payload["drawn"].long().sum(dim=-1)
        begins = (lengths.cumsum(dim=0) - lengths)[which]
        lengths = lengths[which]
        shift = torch.repeat_interleave(begins - (lengths.cumsum(dim=0) - lengths), lengths)
        positions = torch.arange(len(shift), device=shift.device) + shift
        taken |= {name: payload[name][positions] for name in RAGGED_FIELDS}
    return taken
