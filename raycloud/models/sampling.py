"""Choice of the next token from logits: greedy, or sampled with penalties, temperature, top-k, top-p and min-p."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raycloud.errors import ModelError

_INFINITE = float("inf")


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice of the next token; the defaults are greedy.

    The order is that of ``transformers``: biases, repetition penalty, presence and frequency penalties, repeated
    n-grams, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose total probability reaches this value."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the highest probability (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divisor of the positive and factor of the negative logits of earlier tokens, those of the prompt included
    (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Value subtracted from the logits of tokens generated before (OpenAI's formula)."""
    frequency_penalty: float = 0.0
    """Value subtracted from the logits of tokens once per earlier generation (OpenAI's formula)."""
    no_repeat_ngram_size: int = 0
    """Length of the token sequences that must not occur twice, prompt included; 0 for no such rule."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and the value added to its logit."""
    min_tokens: int = 0
    """Number of tokens to generate before the text may end."""
    seed: int | None = None
    """Seed of the random draws, which makes them repeatable; None for a random one."""

    def __post_init__(self) -> None:
        for name, value, fits, allowed in (
            ("temperature", self.temperature, 0 <= self.temperature < _INFINITE, "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < _INFINITE, "above 0"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) < _INFINITE, "finite"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) < _INFINITE, "finite"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size, self.no_repeat_ngram_size >= 0, "0 or more"),
            ("min_tokens", self.min_tokens, self.min_tokens >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {allowed}, got {value}")


GREEDY = Sampling()


class Constraint(Protocol):
    """Constraint of a generated text; one object serves one text."""

    def masked(self, logits: Tensor) -> Tensor:
        """Logits (V,) with minus infinity at the tokens that are not allowed next."""
        ...

    def accept(self, token: int) -> None:
        """Advance by a token that was allowed."""
        ...


class Sampler:
    """Sampler of the tokens of one text, with its own random generator.

    Args:
        sampling: settings of the choice.
        device: device of the logits.
        prompt: token ids before the text.
        ends: token ids that end a text; ``min_tokens`` blocks them at first.
        constraint: constraint of the text.
    """

    def __init__(
        self,
        sampling: Sampling,
        device: torch.device,
        prompt: Sequence[int] = (),
        ends: Collection[int] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.sampling = sampling
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)
        self._tokens, self._prompt, self._ends, self._constraint = list(prompt), len(prompt), sorted(ends), constraint

    def pick(self, logits: Tensor) -> int:
        """Choose the next token from the logits (V,) after all tokens so far.

        Raises:
            ModelError: the logits are not finite.
        """
        logits = self._allowed(checked(logits))
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            chances = distribution(logits, self.sampling)
            token = int(torch.multinomial(chances, 1, generator=self._random))
        self._tokens.append(token)
        if self._constraint is not None and token not in self._ends:
            self._constraint.accept(token)
        return token

    def _allowed(self, logits: Tensor) -> Tensor:
        """Logits (V,) under all rules. Where these leave no token, only the constraint applies: a text with a grammar
        may have to end early, or repeat a sequence."""
        ruled = apply_penalties(logits, self.sampling, self._tokens, self._prompt)
        if self._ends and len(self._tokens) - self._prompt < self.sampling.min_tokens:
            ends = [end for end in self._ends if end < len(logits)]
            ruled = ruled.index_fill(0, _ids(ends, logits), -torch.inf)
        if self._constraint is None:
            return ruled
        ruled = self._constraint.masked(ruled)
        return self._constraint.masked(logits) if bool(ruled.isneginf().all()) else ruled


def checked(logits: Tensor) -> Tensor:
    """Check that a token can be chosen at every position of the logits (..., V); return them unchanged.

    The argmax of NaN is a token like any other: a model that is damaged or has diverged would continue to generate.

    Raises:
        ModelError: at some position the largest logit is not finite.
    """
    largest = logits.amax(dim=-1)
    if not bool(largest.isfinite().all()):
        odd = float(largest[~largest.isfinite()].flatten()[0])
        raise ModelError(
            f"the model's logits are not finite ({odd}), so no token can be chosen: its weights are damaged or have "
            "diverged, or its dtype is too narrow; allowed: a model whose logits are finite"
        )
    return logits


def apply_penalties(logits: Tensor, sampling: Sampling, tokens: Sequence[int], prompt: int) -> Tensor:
    """Apply all rules that depend on earlier tokens to logits (V,); the first ``prompt`` tokens are the prompt's."""
    if sampling.logit_bias:
        where, bias = zip(*sampling.logit_bias, strict=True)
        logits = logits.index_add(0, _ids(where, logits), torch.tensor(bias, device=logits.device).to(logits))
    if sampling.repetition_penalty != 1.0 and tokens:
        logits = apply_repetition_penalty(logits, tokens, sampling.repetition_penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and (made := Counter(tokens[prompt:])):
        less = [sampling.presence_penalty + count * sampling.frequency_penalty for count in made.values()]
        logits = logits.index_add(0, _ids(made, logits), torch.tensor(less, device=logits.device).to(logits), alpha=-1)
    if sampling.no_repeat_ngram_size and (again := repeated_ngram_tokens(tokens, sampling.no_repeat_ngram_size)):
        logits = logits.index_fill(0, _ids(sorted(again), logits), -torch.inf)
    return logits


def apply_repetition_penalty(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Logits (V,) with lower logits for the ``seen`` tokens."""
    where = _ids(sorted(set(seen)), logits)
    old = logits[where]
    return logits.index_copy(0, where, torch.where(old > 0, old / penalty, old * penalty))


def repeated_ngram_tokens(tokens: Sequence[int], size: int) -> set[int]:
    """Tokens that would make the last ``size`` tokens equal to an earlier sequence."""
    behind = size - 1
    if len(tokens) < size:
        return set()
    last = list(tokens[len(tokens) - behind :])
    return {tokens[at + behind] for at in range(len(tokens) - behind) if list(tokens[at : at + behind]) == last}


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (V,) that a token is sampled from; temperature must be above 0."""
    # Penalties near zero make infinities, and the difference of two infinities is NaN.
    logits = logits.float().clamp(max=torch.finfo(torch.float32).max)
    # With the largest logit at 0 no temperature, however small, makes it infinite.
    scaled = (logits - logits.max()) / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, where = scaled.sort(descending=True)
        chances = ordered.softmax(-1)
        # A token stays if those before it have not yet reached top_p: the first one always does.
        beyond = chances.cumsum(-1) - chances >= sampling.top_p
        scaled = scaled.index_fill(0, where[beyond], -torch.inf)
    if sampling.min_p > 0:
        chances = scaled.softmax(-1)
        scaled = scaled.masked_fill(chances < sampling.min_p * chances.max(), -torch.inf)
    return scaled.softmax(-1)


def _ids(tokens: Collection[int], logits: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=logits.device)
