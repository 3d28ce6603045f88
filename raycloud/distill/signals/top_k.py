"""The k largest logits and the mass of all others.

Logits are sent relative to the largest, so that a codec is most precise where the mass is. The tail is sent as its
log-odds against the kept mass, from which both masses follow exactly, near 0 as near 1. The kept probabilities are
normalised to the kept mass, so that all add up to one whatever the codec did to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raycloud.distill.signal_recipe import SignalCodec
from raycloud.distill.signals.encoding import decode_values, encode_values
from raycloud.distill.signals.targets import TAIL_FLOOR


def keep_top_k(
    logits: Tensor, k: int, codec: SignalCodec, taus: Sequence[float]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Payload ``rows`` (c, bytes) and ``tail`` (c, temperatures), the kept ids (c, k), and the remaining logits.

    The last is the logits (c, W) with -inf at the kept ids.
    """
    top, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    others = logits.scatter(-1, ids, -torch.inf)
    odds = [(others / tau).logsumexp(dim=-1) - (top / tau).logsumexp(dim=-1) for tau in taus]
    tail = torch.stack(odds, dim=-1).clamp_min(math.log(TAIL_FLOOR))
    return {"rows": encode_values(top - top[:, :1], codec), "tail": tail}, ids, others


def top_k_log_p(values: Tensor, tail: Tensor, codec: SignalCodec, temperature: float) -> Tensor:
    """Log-probabilities (c, k + 1) at a temperature, the last for the tail, from coded ``values`` and log-odds (c,)."""
    within = (decode_values(values, codec) / temperature).log_softmax(dim=-1)
    odds = tail[:, None]
    return torch.cat([within + logsigmoid(-odds), logsigmoid(odds)], dim=-1)
