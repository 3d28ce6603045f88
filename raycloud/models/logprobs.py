"""Log-probabilities of tokens under a model, with those of the most likely tokens at each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.models.sampling import checked


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of one token under the model, before any penalty, temperature or constraint."""

    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, float], ...]
    """Ids and log-probabilities of the most likely tokens at the same position, most likely first."""


@torch.inference_mode()
def scores_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log-probabilities of tokens.

    Args:
        logits: (T, V), the logits at the position of each token.
        tokens: T token ids.
        top: number of most likely tokens to return per position; more than V count as V.

    Raises:
        ModelError: the logits are not finite.
    """
    logs = checked(logits).float().log_softmax(-1)
    chosen = logs.gather(1, torch.tensor([tokens], device=logs.device).T)[:, 0].tolist()
    best = logs.topk(min(top, logs.shape[-1]), dim=-1)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprobs(own, tuple(zip(*pair, strict=True))) for own, pair in zip(chosen, tops, strict=True)]
