"""The largest logits and the mass of all others.

Logits are sent relative to the largest: a codec's precision then goes where the mass is. The tail is sent as its
log-odds against the kept, from which both masses follow exactly, be they near 0 or near 1, and the kept probabilities
are made to fill theirs: they add up to one whatever the codec has done to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raycloud.distill.signals.coding import decode_rows, encode_rows
from raycloud.distill.signals.recipe import SignalCodec
from raycloud.distill.signals.targets import TAIL_FLOOR


def keep(logits: Tensor, k: int, codec: SignalCodec, taus: Sequence[float]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The payload ``rows`` (c, bytes) and ``tail`` (c, temperatures), the ids (c, k) it is about, and what is not kept.

    The last is the logits (c, W) with -inf in the place of the kept ones.
    """
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    others = logits.scatter(-1, ids, -torch.inf)
    odds = [(others / tau).logsumexp(dim=-1) - (top / tau).logsumexp(dim=-1) for tau in taus]
    tail = torch.stack(odds, dim=-1).clamp_min(math.log(TAIL_FLOOR))
    return {"rows": encode_rows(top - top[:, :1], codec), "tail": tail}, ids, others


def kept(rows: Tensor, tail: Tensor, codec: SignalCodec, temperature: float) -> Tensor:
    """Log-probabilities (c, k + 1) at a temperature, the last being the tail's, from ``rows`` and its odds (c,)."""
    within = (decode_rows(rows, codec) / temperature).log_softmax(dim=-1)
    odds = tail[:, None]
    return torch.cat([within + logsigmoid(-odds), logsigmoid(odds)], dim=-1)
