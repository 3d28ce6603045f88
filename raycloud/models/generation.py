"""Text from a whole model held as one segment, token by token with our own cache."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Protocol

import torch

from raycloud.models.cache import KVCache
from raycloud.models.sampling import GREEDY, Sampling
from raycloud.models.segments import Segment


class TokenSource(Protocol):
    """Whatever continues a prompt token by token: a whole model, or one cut between edge and cloud."""

    @property
    def max_length(self) -> int:
        """Tokens that prompt and continuation may have together."""
        ...

    def stream(
        self, prompt: Sequence[int], limit: int, sampling: Sampling = GREEDY, eos: Collection[int] = ()
    ) -> Generator[int]:
        """Token ids one after the other, at most ``limit``, up to and without the first of ``eos``.

        Closing the iterator ends the generation and frees what it held. Safe to call from several threads.

        Raises:
            ValueError: the prompt is empty, or prompt and limit exceed ``max_length``.
            LinkError: the link to the cloud broke and could not be mended.
        """
        ...


@torch.no_grad()
def greedy(
    model: Segment, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos: Collection[int] = ()
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and without the first of ``eos``.

    Args:
        model: the whole model.
        prompts: token ids; those of a batch may differ in length.
        max_new_tokens: where to stop at the latest.
        eos: ids that end a text.

    Raises:
        ValueError: an empty prompt.
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
    cache, made = KVCache(), [list[int]() for _ in prompts]
    done = [False] * len(prompts)
    mask = None if bool(valid.all()) else valid
    for _ in range(max_new_tokens):
        rows = model.rows(ids, valid=mask, cache=cache)[:, -1:]
        ids, mask = model.logits(rows).argmax(dim=-1), None
        for row, token in enumerate(ids[:, 0].tolist()):
            done[row] = done[row] or token in eos
            if not done[row]:
                made[row].append(token)
        if all(done):
            break
    return made
