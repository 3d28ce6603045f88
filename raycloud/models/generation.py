"""Generation: the interface of token sources, and greedy decoding of a whole model in one segment with a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from raycloud.models.logprobs import TokenLogprobs
from raycloud.models.sampling import GREEDY, Constraint, Sampling, checked
from raycloud.models.segments import Segment


@dataclass(frozen=True)
class Decoding:
    """Settings of one continuation: sampling, ends, constraint, and the scores to return with tokens."""

    sampling: Sampling = GREEDY
    ends: frozenset[int] = frozenset()
    """Token ids that end the text."""
    top: int | None = None
    """Number of most likely tokens to return with the scores of each token; None for no scores."""
    echo: bool = False
    """Return the tokens of the prompt first, if scores are returned."""
    constraint: Constraint | None = None
    """Constraint of the text; one object serves one continuation."""


@dataclass(frozen=True)
class Token:
    """One token of a prompt or of its continuation."""

    id: int
    part: Literal["prompt", "text", "end"] = "text"
    """Part of the text; ``end`` is one of :attr:`Decoding.ends`, and is returned only with scores."""
    scores: TokenLogprobs | None = None
    """Scores of the token; None if not requested, and for the first token of a prompt, which has no context."""


class TokenSource(Protocol):
    """Source of the continuation of a prompt, token by token: a whole model, or one split between edge and cloud."""

    @property
    def max_length(self) -> int:
        """Largest number of tokens of prompt and continuation together."""
        ...

    def tokens(self, prompt: Sequence[int], limit: int, decoding: Decoding) -> Generator[Token, None, None]:
        """Yield the tokens of the continuation, at most ``limit``; with ``decoding.echo`` those of the prompt first.

        Closing the iterator ends the generation and frees what it held. Safe to call from several threads.

        Raises:
            ValueError: the prompt is empty, or prompt and limit exceed ``max_length``.
            LinkError: the link to the cloud broke and could not be restored.
            ModelError: the model's logits are not finite.
        """
        ...

    def stream(
        self, prompt: Sequence[int], limit: int, sampling: Sampling = GREEDY, eos: Collection[int] = ()
    ) -> Generator[int, None, None]:
        """Yield only the token ids of :meth:`tokens`, up to and without the first of ``eos``."""
        ...


@torch.no_grad()
def greedy(
    model: Segment, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: Collection[int] = ()
) -> list[list[int]]:
    """Greedy continuation of each prompt, up to and without the first of ``eos``.

    Args:
        model: the whole model.
        prompts: token ids; prompts may differ in length.
        max_new_tokens: largest number of tokens per continuation.
        eos: token ids that end a text.

    Raises:
        ValueError: a prompt is empty.
        ModelError: the model's logits are not finite.
    """
    if not all(prompts):
        raise ValueError("cannot continue an empty prompt")
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        valid[row, longest - len(prompt) :] = True
    cache, made = model.new_cache(), [list[int]() for _ in prompts]
    done = [False] * len(prompts)
    mask = None if bool(valid.all()) else valid
    for _ in range(max_new_tokens):
        hidden = model.hidden(ids, valid=mask, cache=cache)[:, -1:]
        ids, mask = checked(model.logits(hidden)).argmax(dim=-1), None
        for row, token in enumerate(ids[:, 0].tolist()):
            done[row] = done[row] or token in eos
            if not done[row]:
                made[row].append(token)
        if all(done):
            break
    return made
