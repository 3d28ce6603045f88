"""Sampling of the next tokens of a batch, with random draws that do not depend on the other texts of the batch.

A token is sampled by adding Gumbel noise to the log-probabilities and taking the largest (Gumbel 1954; Maddison et al.
2014). The noise of a token is a hash of (seed, text, step, token): there is no state, so batch size and order do not
matter. Rounding, which depends on the batch, changes a draw only if two tokens nearly tie. Inverting the cumulative
distribution instead would add up the rounding errors of all tokens before, and so change most draws from the tail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.models.sampling import checked

PADDING_ID = -1
"""Id of padding in token histories; no token has it."""


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


# SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195); int64 wraps as uint64 does.
_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right (filled with zeros) of int64 bits."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def splitmix(state: Tensor, count: Tensor) -> Tensor:
    """The ``count``-th number (from 1) of SplitMix64 from a state; int64 with the bits of uint64."""
    bits = state + count * _STEP
    bits ^= _shifted(bits, 30)
    bits *= _FIRST
    bits ^= _shifted(bits, 27)
    bits *= _SECOND
    bits ^= _shifted(bits, 31)
    return bits


def gumbel_noise(seed: int, numbers: Tensor, step: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise (B, V), float64: a pure function of (seed, text's number, step, token).

    Args:
        seed: seed of the run, below 2⁶³.
        numbers: (B,) int64, one per text.
        step: number of tokens drawn before.
        vocabulary: size V of the vocabulary.
    """
    device = numbers.device
    state = splitmix(torch.tensor(seed, device=device), torch.tensor(1, device=device))
    state = splitmix(splitmix(state, numbers + 1), torch.tensor(step + 1, device=device))
    bits = splitmix(state[:, None], torch.arange(1, vocabulary + 1, device=device))
    uniform = _shifted(bits, 11).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_()


def mask_repeated_ngrams(logits: Tensor, history: Tensor, size: int) -> Tensor:
    """Set to −inf the logits (B, V) of every token that would complete an n-gram that its text already has.

    Args:
        logits: (B, V).
        history: (B, T) tokens so far, left-padded with ``PADDING_ID``.
        size: n of the n-grams.
    """
    if history.shape[1] < size:
        return logits
    grams = history.unfold(1, size, 1)
    latest = history[:, history.shape[1] - size + 1 :]
    again = (grams[..., :-1] == latest[:, None]).all(dim=-1) & (grams[..., -1] != PADDING_ID)
    # Other n-grams point to an extra column after the vocabulary.
    beyond = logits.shape[1]
    banned = torch.zeros(len(logits), beyond + 1, dtype=torch.bool, device=logits.device)
    banned.scatter_(1, torch.where(again, grams[..., -1], beyond), True)
    return logits.masked_fill(banned[:, :beyond], -torch.inf)


def top_k_top_p(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to −inf the logits (B, V) of tokens outside the ``top_k`` most likely, then outside the nucleus of ``top_p``.

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


def sample_tokens(
    logits: Tensor, history: Tensor, how: GenerationRecipe, *, seed: int, numbers: Tensor, step: int
) -> Tensor:
    """Sample the next tokens (B,) of texts (B, T) from logits (B, V), with the noise of :func:`gumbel_noise`.

    Raises:
        ModelError: the logits are not finite.
    """
    logits = checked(logits).float()
    if how.no_repeat_ngram_size:
        logits = mask_repeated_ngrams(logits, history, how.no_repeat_ngram_size)
    if how.temperature > 0:
        logits = top_k_top_p(logits / how.temperature, how.top_k, how.top_p)
        logits = gumbel_noise(seed, numbers, step, logits.shape[1]).add_(logits)
    return logits.argmax(dim=-1)
