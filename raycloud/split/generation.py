"""Text from a model in three parts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from raycloud.models.checkpoint import Checkpoint
from raycloud.models.loading import load_tokenizer
from raycloud.models.sampling import GREEDY, Sampler, Sampling
from raycloud.models.segments import Segment
from raycloud.models.text import TextModel, end_ids
from raycloud.split.middle import LocalMiddle, Middle, Trip, middle_state
from raycloud.split.parts import CloudPart, EdgePart
from raycloud.split.plan import PlanSet
from raycloud.split.triad import Triad


class SplitModel:
    """A model cut between edge and cloud that continues prompts.

    Args:
        first: the edge's blocks before the cuts, with the embedding.
        last: the edge's blocks behind the cuts, with final norm and head.
        connect: opens the middle for one batch of texts; called once per generation.
        plans: where it is cut.
        chunk: tokens of a prompt that go through at once.
        ahead: chunks of a prompt on their way at the same time, so that edge, link and cloud work together.
        seed: of drawn plans, where there is more than one.
        max_length: tokens that prompt and continuation may have together; None for as many as the model has positions.
    """

    def __init__(
        self,
        first: Segment,
        last: Segment,
        connect: Callable[[], Middle],
        plans: PlanSet,
        *,
        chunk: int = 128,
        ahead: int = 4,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        self._first, self._last, self._connect = first, last, connect
        self._plans = plans.check(last.hi)
        self.max_length = max_length or int(first.config.max_position_embeddings)
        self._chunk, self._ahead, self._seed = chunk, ahead if plans.fixed else 1, seed

    def open(self) -> Triad:
        """A fresh batch of texts; close it in the end."""
        return Triad(self._first, self._last, self._connect(), self._plans, self._seed)

    def stream(
        self, prompt: Sequence[int], limit: int, sampling: Sampling = GREEDY, eos: Collection[int] = ()
    ) -> Generator[int]:
        """Token ids one after the other, at most ``limit``, up to and without the first of ``eos``.

        Closing the iterator ends the generation and frees what it held.

        Raises:
            ValueError: the prompt is empty, or prompt and limit exceed ``max_length``.
            LinkError: the link to the cloud broke and could not be mended.
        """
        if not prompt:
            raise ValueError("cannot continue an empty prompt")
        if len(prompt) + limit > self.max_length:
            raise ValueError(f"a prompt of {len(prompt)} and {limit} new tokens exceed {self.max_length} tokens")
        return self._stream(list(prompt), limit, sampling, frozenset(eos))

    def _stream(self, prompt: list[int], limit: int, sampling: Sampling, eos: frozenset[int]) -> Generator[int]:
        if limit < 1:
            return
        triad = self.open()
        try:
            device = next(self._first.parameters()).device if self._first.is_first else torch.device("cpu")
            sampler, seen = Sampler(sampling, device), set(prompt)
            logits = self._prefill(triad, torch.tensor([prompt], device=device))
            for made in range(limit):
                token = sampler.pick(logits[0, -1], seen)
                if token in eos:
                    return
                yield token
                seen.add(token)
                if made + 1 < limit:
                    logits = triad.advance(torch.tensor([[token]], device=device))
        finally:
            triad.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        sampling: Sampling = GREEDY,
        eos: Collection[int] = (),
    ) -> list[list[int]]:
        """The continuations of prompts of any lengths as one batch, each as :meth:`stream` gives it alone.

        The middle must take whole batches, as one in the same process does.

        Raises:
            ValueError: a prompt is empty, or prompt and limit exceed ``max_length``.
        """
        longest = max(map(len, prompts), default=0)
        if not all(prompts) or longest + limit > self.max_length:
            raise ValueError(f"prompts must have 1 to {self.max_length - limit} tokens")
        device = next(self._first.parameters()).device
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        valid = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            valid[row, longest - len(prompt) :] = True
        samplers = [Sampler(sampling, device) for _ in prompts]
        made: list[list[int]] = [[] for _ in prompts]
        done = [limit < 1] * len(prompts)
        triad = self.open()
        try:
            logits = self._prefill(triad, ids, None if bool(valid.all()) else valid)
            while True:
                step = []
                for row, sampler in enumerate(samplers):
                    token = 0 if done[row] else sampler.pick(logits[row, -1], {*prompts[row], *made[row]})
                    done[row] = done[row] or token in eos
                    if not done[row]:
                        made[row].append(token)
                        done[row] = len(made[row]) == limit
                    step.append([token])
                if all(done):
                    return made
                logits = triad.advance(torch.tensor(step, device=device))
        finally:
            triad.close()

    def _prefill(self, triad: Triad, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        starts = range(0, ids.shape[1], self._chunk)
        logits = ids.new_empty(0)
        away = 0
        for start in starts:
            part = slice(start, start + self._chunk)
            if away == self._ahead:
                triad.receive()
                away -= 1
            triad.send(ids[:, part], None if valid is None else valid[:, part], int(part.stop >= ids.shape[1]))
            away += 1
        for _ in range(away):
            logits = triad.receive()
        return logits


def text_model(part: EdgePart, split: SplitModel) -> TextModel:
    """The model with the tokenizer and the end-of-text tokens that come with its edge part."""
    tokenizer = load_tokenizer(part.source)
    generation: GenerationConfig | None = None
    if (path := Checkpoint(part.source).path("generation_config.json")) is not None:
        generation = GenerationConfig.from_pretrained(path.parent)
    return TextModel(split, tokenizer, end_ids(tokenizer, part.config, generation))


def in_process(edge: EdgePart, cloud: CloudPart | None = None) -> SplitModel:
    """A model whose parts are all in this process; without a cloud the plan must leave the middle nothing."""
    blocks = edge.last.hi

    def connect() -> Middle:
        if cloud is None:
            return _Nothing()
        return LocalMiddle(middle_state(cloud.middle, edge.plans, blocks))

    return SplitModel(edge.first, edge.last, connect, edge.plans)


class _Nothing:
    """The middle of a model that is whole at the edge."""

    def held(self, index: int) -> int:
        raise ValueError("the plan needs a middle and there is none")

    def send(self, trip: Trip) -> None:
        raise ValueError("the plan needs a middle and there is none")

    def receive(self) -> Tensor:
        raise ValueError("the plan needs a middle and there is none")

    def close(self) -> None:
        pass
