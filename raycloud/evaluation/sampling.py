"""The next token of every text of a batch at once, with draws that nothing but the text's own number decides.

A token is drawn by adding Gumbel noise to its log-probability and taking the largest (Gumbel 1954; Maddison et al.
2014). The noise of a token is a hash of (seed, text, step, token): no state is carried, so batch size and order cannot
matter. Rounding, which does depend on the batch, changes a draw only where two tokens nearly tie; the inverse of the
cumulative distribution would shift with every rounding error before it, and so change most draws from the tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycloud.evaluation.recipe import GenerationRecipe

NOTHING = -1
"""Stands for padding where a text's tokens are wanted; no token is called so."""


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


# SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195); int64 wraps as uint64 does.
_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def splitmix(state: Tensor, count: Tensor) -> Tensor:
    """The ``count``-th number (from 1) that SplitMix64 gives from a state; int64 that stand for uint64."""
    bits = state + count * _STEP
    bits ^= _shifted(bits, 30)
    bits *= _FIRST
    bits ^= _shifted(bits, 27)
    bits *= _SECOND
    bits ^= _shifted(bits, 31)
    return bits


def noise(seed: int, numbers: Tensor, step: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise (B, V), float64: a pure function of (seed, text's number, step, token).

    Args:
        seed: of the run, below 2⁶³.
        numbers: (B,) int64, one per text.
        step: tokens drawn before.
        vocabulary: V.
    """
    device = numbers.device
    state = splitmix(torch.tensor(seed, device=device), torch.tensor(1, device=device))
    state = splitmix(splitmix(state, numbers + 1), torch.tensor(step + 1, device=device))
    bits = splitmix(state[:, None], torch.arange(1, vocabulary + 1, device=device))
    uniform = _shifted(bits, 11).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_()


def without_repeats(logits: Tensor, history: Tensor, size: int) -> Tensor:
    """Logits (B, V) with −inf for every token that would complete an n-gram its text already has.

    Args:
        logits: (B, V).
        history: (B, T) tokens so far, left-padded with ``NOTHING``.
        size: the n of the n-grams.
    """
    if history.shape[1] < size:
        return logits
    grams = history.unfold(1, size, 1)
    latest = history[:, history.shape[1] - size + 1 :]
    again = (grams[..., :-1] == latest[:, None]).all(dim=-1) & (grams[..., -1] != NOTHING)
    # Other n-grams point to a column behind the vocabulary.
    beyond = logits.shape[1]
    banned = torch.zeros(len(logits), beyond + 1, dtype=torch.bool, device=logits.device)
    banned.scatter_(1, torch.where(again, grams[..., -1], beyond), True)
    return logits.masked_fill(banned[:, :beyond], -torch.inf)


def narrowed(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with −inf for tokens outside the ``top_k`` most likely, then outside the nucleus of ``top_p``.

    The nucleus is the fewest tokens whose probability reaches ``top_p`` (Holtzman et al. 2020, arXiv 1904.09751).
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, where = logits.sort(dim=-1, descending=True)
        chances = ordered.softmax(dim=-1)
        beyond = chances.cumsum(dim=-1) - chances >= top_p
        logits = logits.masked_fill(beyond.gather(-1, where.argsort(dim=-1)), -torch.inf)
    return logits


def pick(logits: Tensor, history: Tensor, how: GenerationRecipe, *, seed: int, numbers: Tensor, step: int) -> Tensor:
    """The next tokens (B,) of texts (B, T), given logits (B, V); see :func:`noise` for what decides the draws."""
    logits = logits.float()
    if how.no_repeat_ngram:
        logits = without_repeats(logits, history, how.no_repeat_ngram)
    if how.temperature > 0:
        logits = narrowed(logits / how.temperature, how.top_k, how.top_p)
        logits = noise(seed, numbers, step, logits.shape[1]).add_(logits)
    return logits.argmax(dim=-1)
