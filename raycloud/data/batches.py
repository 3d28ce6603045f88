"""Tokens, labels and the order of samples.

Positions whose next token is to be learned carry that token as label; all others carry ``IGNORE``. Which samples make
up a step is a pure function of (seed, global step): a resumed run sees what the interrupted one would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.prompts import Format, example
from raycloud.data.splits import Row
from raycloud.errors import DataError

IGNORE = -100
_GROUP = 16
"""Batches that are sorted by length together."""


@dataclass(frozen=True)
class Sample:
    """Token ids of prompt and response, and how many of them are prompt."""

    ids: tuple[int, ...]
    prompt: int

    @property
    def targets(self) -> int:
        """Tokens to be predicted: the response, but for a first token that nothing precedes."""
        return len(self.ids) - max(self.prompt, 1)


@dataclass(frozen=True)
class Tally:
    """What became of the rows of a data set on their way to samples; with two tokenizers, for either of them."""

    rows: int
    empty: int
    """Dropped: the response leaves no token to predict."""
    crowded: int
    """Dropped: the prompt takes all of ``max_length``."""
    shortened: int
    """Had a prompt over ``max_prompt`` tokens."""
    unlike: int = 0
    """Have a prompt that two tokenizers' templates write differently."""

    @property
    def kept(self) -> int:
        """Samples."""
        return self.rows - self.empty - self.crowded


@dataclass(frozen=True)
class _Encoded:
    """A row as one tokenizer has it, and the texts it was made of."""

    sample: Sample
    prompt: str
    response: str
    shortened: bool


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (B, T), which of them are real (B, T), and what is to be learned from them.

    Labels are next tokens (B, T), or one or two numbers of a whole text, (B,) or (B, 2).
    """

    ids: Tensor
    valid: Tensor
    labels: Tensor
    types: Tensor | None = None
    """(B, T): 1 for tokens of the second text of a pair, in families that are told so."""
    places: tuple[int, ...] | None = None
    """Which samples of their data set they are, where somebody asks."""

    @property
    def targets(self) -> int:
        """Labels; of numbers, all are."""
        return self.labels.numel() if self.labels.is_floating_point() else int((self.labels != IGNORE).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        tensors = (self.ids, self.valid, self.labels, self.types)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        types = None if self.types is None else self.types.to(device)
        return Batch(self.ids.to(device), self.valid.to(device), self.labels.to(device), types, self.places)


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, form: Format, *, max_length: int, max_prompt: int
) -> list[Sample]:
    """Samples of the rows that leave something to predict.

    Prompt and response are tokenised apart and without special tokens; a response to a prompt ends with EOS. A prompt
    over ``max_prompt`` tokens is shortened in its body, the whole is cut at ``max_length``.

    Raises:
        DataError: no row is left, or a row lacks a column of the format.
    """
    return encode_tallied(rows, tokenizer, form, max_length=max_length, max_prompt=max_prompt)[0]


def encode_tallied(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, form: Format, *, max_length: int, max_prompt: int
) -> tuple[list[Sample], Tally]:
    """As :func:`encode`, and what became of the rows."""
    (kept,), tally = _kept([_encoded(rows, tokenizer, form, max_length, max_prompt)], max_length)
    return [one.sample for one in kept], tally


def encode_both(
    rows: Sequence[Row],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    form: Format,
    *,
    max_length: int,
    max_prompt: int,
) -> tuple[list[Sample], list[Sample], list[str], Tally]:
    """Samples of the same rows for two tokenizers, of the rows that leave both something to predict.

    Returns:
        Both sides' samples, the responses' texts, and what became of the rows.
    """
    sides = [_encoded(rows, one, form, max_length, max_prompt) for one in tokenizers]
    (ours, theirs), tally = _kept(sides, max_length)
    return [one.sample for one in ours], [one.sample for one in theirs], [one.response for one in ours], tally


def _encoded(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, form: Format, max_length: int, max_prompt: int
) -> list[_Encoded]:
    pairs = [example(row, form, tokenizer) for row in rows]
    prompts = _tokens(tokenizer, [prompt.text for prompt, _ in pairs])
    responses = _tokens(tokenizer, [response for _, response in pairs])
    ending = [] if form == "plain" else [tokenizer.eos_token_id]
    encoded = []
    for (prompt, response), asked, answer in zip(pairs, prompts, responses, strict=True):
        shortened = len(asked) > max_prompt
        if shortened:
            before, body, after = _tokens(tokenizer, [prompt.before, prompt.body, prompt.after])
            room = max(0, max_prompt - len(before) - len(after))
            asked = [*before, *body[:room], *after]
        sample = Sample(tuple([*asked, *answer, *ending][:max_length]), len(asked))
        encoded.append(_Encoded(sample, prompt.text, response, shortened))
    return encoded


def _kept(sides: Sequence[Sequence[_Encoded]], max_length: int) -> tuple[list[list[_Encoded]], Tally]:
    """Of every side the rows that leave all sides something to predict."""
    whole = list(zip(*sides, strict=True))
    kept = [row for row in whole if all(one.sample.targets > 0 for one in row)]
    if not kept:
        raise DataError(f"no row of {len(whole)} leaves a token to predict within max_length={max_length}")
    crowded = sum(any(one.sample.prompt >= max_length for one in row) for row in whole)
    tally = Tally(
        len(whole),
        empty=len(whole) - len(kept) - crowded,
        crowded=crowded,
        shortened=sum(any(one.shortened for one in row) for row in whole),
        unlike=sum(len({one.prompt for one in row}) > 1 for row in whole),
    )
    return [list(side) for side in zip(*kept, strict=True)], tally


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Samples padded on the right to the longest of them."""
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    prompts = torch.tensor([sample.prompt for sample in samples])
    slots = torch.arange(int(lengths.max()))
    valid = slots < lengths[:, None]
    ids = torch.full(valid.shape, pad)
    ids[valid] = torch.tensor([token for sample in samples for token in sample.ids])
    labels = torch.full(valid.shape, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    labelled = (slots >= prompts[:, None] - 1) & (slots < lengths[:, None] - 1)
    return Batch(ids, valid, labels.masked_fill(~labelled, IGNORE))


class SampleOrder:
    """Which samples step ``s`` takes: a pure function of (lengths, batch size, seed, s).

    Every epoch is a new permutation in which samples of similar length share a batch, since a short sentence padded
    to a long one's length costs as much as the long one. Samples that do not fill a batch sit that epoch out.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = min(batch_size, len(lengths))
        self.seed = seed
        self.steps_per_epoch = len(lengths) // self.batch_size
        self._epoch: tuple[int, np.ndarray] | None = None

    def indices(self, step: int) -> list[int]:
        """The samples of a global step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._permutation(epoch))
        return [int(index) for index in self._epoch[1][within]]

    def _permutation(self, epoch: int) -> np.ndarray:
        """The batches of an epoch, (steps per epoch, batch size)."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))[: self.steps_per_epoch * self.batch_size]
        group = np.arange(len(order)) // (self.batch_size * _GROUP)
        order = order[np.lexsort((self.lengths[order], group))]
        return random.permutation(order.reshape(self.steps_per_epoch, self.batch_size), axis=0)


def in_length_order(samples: Sequence[Sample], batch_size: int, pad: int) -> list[Batch]:
    """All samples in batches of similar length, for evaluation."""
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    return [collate(ordered[at : at + batch_size], pad) for at in range(0, len(ordered), batch_size)]
