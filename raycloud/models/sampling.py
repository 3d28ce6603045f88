"""From logits to the next token: greedy, or drawn under temperature, top-k, top-p and a repetition penalty."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy.

    The order is that of ``transformers``: repetition penalty, temperature, top-k, top-p.
    """

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int = 0
    """Draw among this many most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probability reaches this."""
    repetition_penalty: float = 1.0
    """Divides the positive and multiplies the negative logits of tokens seen before (CTRL, arXiv 1909.05858)."""
    seed: int | None = None
    """Makes draws repeatable."""

    def __post_init__(self) -> None:
        for name, value, fits, allowed in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {allowed}, got {value}")


GREEDY = Sampling()


class Sampler:
    """Chooses tokens one after the other with a random state of its own.

    Args:
        sampling: how.
        device: where the logits are.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self._random = torch.Generator(device)
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def pick(self, logits: Tensor, seen: Collection[int] = ()) -> int:
        """The next token after ``seen``, given logits (V,)."""
        how = self.sampling
        if how.repetition_penalty != 1.0 and seen:
            logits = penalised(logits, seen, how.repetition_penalty)
        if how.temperature == 0:
            return int(logits.argmax())
        chances = distribution(logits, how)
        return int(torch.multinomial(chances, 1, generator=self._random))


def penalised(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Logits (V,) with those of ``seen`` tokens made less likely."""
    where = torch.tensor(sorted(set(seen)), device=logits.device)
    old = logits[where]
    return logits.index_copy(0, where, torch.where(old > 0, old / penalty, old * penalty))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (V,) that a token is drawn from; temperature must be above 0."""
    scaled = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, where = scaled.sort(descending=True)
        chances = ordered.softmax(-1)
        # A token stays if those before it have not yet reached top_p: the first one always does.
        beyond = chances.cumsum(-1) - chances >= sampling.top_p
        scaled = scaled.index_fill(0, where[beyond], -torch.inf)
    return scaled.softmax(-1)
