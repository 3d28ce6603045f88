"""Text generation with a split model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from raycloud.models.checkpoint import Checkpoint
from raycloud.models.configuration import context_length
from raycloud.models.generation import Decoding, Token
from raycloud.models.loading import load_tokenizer
from raycloud.models.logprobs import scores_of
from raycloud.models.rotary import fixed_rope_length
from raycloud.models.sampling import GREEDY, Sampler, Sampling
from raycloud.models.segments import Segment
from raycloud.models.text_model import TextModel
from raycloud.models.texts import end_ids
from raycloud.split.inference.blocks import CloudBlocks, LocalBlocks, StepRequest, cloud_stage
from raycloud.split.inference.pipeline import SplitPipeline
from raycloud.split.parts import CloudPart, EdgePart
from raycloud.split.plan import PlanSet

PROMPT_CHUNK = 128
"""Tokens of a prompt processed at once."""
CHUNKS_IN_FLIGHT = 4
"""Chunks of a prompt in flight at once."""


class SplitTokenSource:
    """Model cut between edge and cloud that continues prompts.

    Args:
        first: the edge's blocks before the cuts, with the embedding.
        last: the edge's blocks after the cuts, with final norm and head.
        connect: opens the cloud blocks for one batch of texts; called once per generation.
        plans: plans of the cuts.
        chunk: tokens of a prompt processed at once; a prompt beyond
            :func:`~raycloud.models.rotary.fixed_rope_length` is processed whole.
        ahead: chunks of a prompt in flight at once, so that edge, link and cloud work in parallel.
        seed: seed for sampling plans, if there is more than one.
        max_length: most tokens of prompt and continuation together; None for the model's number of positions.
    """

    def __init__(
        self,
        first: Segment,
        last: Segment,
        connect: Callable[[], CloudBlocks],
        plans: PlanSet,
        *,
        chunk: int = PROMPT_CHUNK,
        ahead: int = CHUNKS_IN_FLIGHT,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        self._first, self._last, self._connect = first, last, connect
        self._plans = plans.check(last.hi)
        self.max_length = max_length or context_length(first.config)
        self._fixed_rope_length = fixed_rope_length(first.config)
        if self._fixed_rope_length is not None and not plans.fixed:
            self.max_length = min(
                self.max_length, self._fixed_rope_length
            )  # changing plans recompute tokens in chunks of other sizes
        self._chunk, self._ahead, self._seed = chunk, ahead if plans.fixed else 1, seed

    def open(self) -> SplitPipeline:
        """Open a pipeline for a new batch of texts; the caller closes it."""
        return SplitPipeline(self._first, self._last, self._connect(), self._plans, self._seed)

    def stream(
        self, prompt: Sequence[int], limit: int, sampling: Sampling = GREEDY, eos: Collection[int] = ()
    ) -> Generator[int, None, None]:
        """Generate token ids, at most ``limit``, up to and without the first of ``eos``; see :meth:`tokens`.

        Raises:
            ValueError: the prompt is empty, or prompt and limit exceed ``max_length``.
            LinkError: the link to the cloud broke and reconnecting failed.
        """
        tokens = self.tokens(prompt, limit, Decoding(sampling, frozenset(eos)))

        def ids() -> Generator[int, None, None]:
            with closing(tokens):
                for token in tokens:
                    yield token.id

        return ids()

    def tokens(self, prompt: Sequence[int], limit: int, decoding: Decoding) -> Generator[Token, None, None]:
        """Generate the tokens of the continuation, at most ``limit``, after those of the prompt if requested.

        For scores of the prompt the cloud returns the hidden states of all its tokens, otherwise only of the last one.
        Closing the iterator ends the generation and frees its state.

        Raises:
            ValueError: the prompt is empty, or prompt and limit exceed ``max_length``.
            LinkError: the link to the cloud broke and reconnecting failed.
        """
        if not prompt:
            raise ValueError("cannot continue an empty prompt")
        if len(prompt) + limit > self.max_length:
            raise ValueError(f"a prompt of {len(prompt)} and {limit} new tokens exceed {self.max_length} tokens")
        return self._tokens(list(prompt), limit, decoding)

    def _tokens(self, prompt: list[int], limit: int, how: Decoding) -> Generator[Token, None, None]:
        score_prompt = how.echo and how.top is not None
        if limit < 1 and not score_prompt:
            return
        pipeline = self.open()
        try:
            device = next(self._first.parameters()).device if self._first.is_first else torch.device("cpu")
            sampler = Sampler(how.sampling, device, prompt, how.ends, how.constraint)
            logits, place = torch.empty(0), 0
            if score_prompt:
                yield Token(prompt[0], "prompt")
            for logits in self._prefill(pipeline, torch.tensor([prompt], device=device), every=score_prompt):
                if how.top is not None and score_prompt:
                    follow = prompt[place + 1 : place + 1 + logits.shape[1]]
                    scores = scores_of(logits[0, : len(follow)], follow, how.top)
                    for token, score in zip(follow, scores, strict=True):
                        yield Token(token, "prompt", score)
                    place += logits.shape[1]
            for made in range(limit):
                token = sampler.pick(logits[0, -1])
                said = None if how.top is None else scores_of(logits[0, -1:], [token], how.top)[0]
                if token in how.ends:
                    if said is not None:
                        yield Token(token, "end", said)
                    return
                yield Token(token, "text", said)
                if made + 1 < limit:
                    logits = pipeline.advance(torch.tensor([[token]], device=device))
        finally:
            pipeline.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        limit: int,
        sampling: Sampling = GREEDY,
        eos: Collection[int] = (),
    ) -> list[list[int]]:
        """Continue prompts of any lengths as one batch; each result equals that of :meth:`stream`.

        The cloud blocks must accept batches, as those in the same process do.

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
        samplers = [Sampler(sampling, device, prompt, eos) for prompt in prompts]
        made: list[list[int]] = [[] for _ in prompts]
        done = [limit < 1] * len(prompts)
        pipeline = self.open()
        try:
            *_, logits = self._prefill(pipeline, ids, None if bool(valid.all()) else valid)
            while True:
                step = []
                for row, sampler in enumerate(samplers):
                    token = 0 if done[row] else sampler.pick(logits[row, -1])
                    done[row] = done[row] or token in eos
                    if not done[row]:
                        made[row].append(token)
                        done[row] = len(made[row]) == limit
                    step.append([token])
                if all(done):
                    return made
                logits = pipeline.advance(torch.tensor(step, device=device))
        finally:
            pipeline.close()

    def _prefill(
        self, pipeline: SplitPipeline, ids: Tensor, valid: Tensor | None = None, *, every: bool = False
    ) -> Generator[Tensor, None, None]:
        """Yield the logits (B, k, V) of each chunk in order: of ``every`` token, or only of the prompt's last one."""
        tokens = ids.shape[1]
        # Where rotary angles depend on the length of the text, they are right only for a prompt processed at once.
        chunk = self._chunk if self._fixed_rope_length is None or tokens <= self._fixed_rope_length else tokens
        in_flight = 0
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            if in_flight == self._ahead:
                yield pipeline.receive()
                in_flight -= 1
            count = ids[:, part].shape[1] if every else int(part.stop >= tokens)
            pipeline.send(ids[:, part], None if valid is None else valid[:, part], count)
            in_flight += 1
        for _ in range(in_flight):
            yield pipeline.receive()


def text_model(part: EdgePart, split: SplitTokenSource) -> TextModel:
    """Text model of a split model, with the tokenizer and the end-of-text tokens of its edge part."""
    tokenizer = load_tokenizer(part.source)
    ends = end_ids(tokenizer, part.config, Checkpoint(part.source).generation_config())
    return TextModel(split, tokenizer, ends, part.fingerprint)


def local_split_model(edge: EdgePart, cloud: CloudPart | None = None) -> SplitTokenSource:
    """Split model whose parts are all in this process; without a cloud part the plan must leave the cloud no blocks."""
    blocks = edge.last.hi

    def connect() -> CloudBlocks:
        if cloud is None:
            return _NoBlocks()
        return LocalBlocks(cloud_stage(cloud.middle, edge.plans, blocks))

    return SplitTokenSource(edge.first, edge.last, connect, edge.plans)


class _NoBlocks:
    """Cloud blocks of a model that is whole at the edge: none."""

    def held(self, index: int) -> int:
        raise ValueError("the plan needs a middle and there is none")

    def send(self, request: StepRequest) -> None:
        raise ValueError("the plan needs a middle and there is none")

    def receive(self) -> Tensor:
        raise ValueError("the plan needs a middle and there is none")

    def close(self) -> None:
        pass
