"""Tokens, labels and the order of samples.

The label of a position is its next token if that is a target, and ``IGNORE`` otherwise. The samples of a step are a
pure function of (seed, global step): a resumed run sees the same samples as a run without interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.prompts import Format, Prompt, bounds_of, prompt_and_response
from raycloud.data.splits import Row
from raycloud.errors import DataError
from raycloud.models.texts import Bos, TextBounds

IGNORE = -100
_GROUP = 16
"""Number of batches whose samples are sorted by length together."""


@dataclass(frozen=True)
class Sample:
    """Token ids of prompt and response, and the number of tokens of the prompt."""

    ids: tuple[int, ...]
    prompt: int

    @property
    def targets(self) -> int:
        """Number of tokens to predict: the response, except a first token that has no context."""
        return len(self.ids) - max(self.prompt, 1)


@dataclass(frozen=True)
class RowCounts:
    """Counts of the rows of a data set that were encoded, dropped and shortened; with two tokenizers, by either one."""

    rows: int
    empty: int
    """Rows dropped because the response leaves no token to predict."""
    crowded: int
    """Rows dropped because the prompt takes all of ``max_length``."""
    shortened: int
    """Rows with a prompt over ``max_prompt_length`` tokens, which was shortened."""
    unlike: int = 0
    """Rows with a prompt that the templates of two tokenizers write differently."""

    @property
    def kept(self) -> int:
        """Number of samples."""
        return self.rows - self.empty - self.crowded


@dataclass(frozen=True)
class _Encoded:
    """Row encoded by one tokenizer, with the texts that it was made of."""

    sample: Sample
    prompt: str
    response: str
    shortened: bool


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids (B, T), a mask (B, T), False for padding, and labels.

    Labels are next tokens (B, T), or one or two numbers per text, (B,) or (B, 2).
    """

    ids: Tensor
    valid: Tensor
    labels: Tensor
    types: Tensor | None = None
    """Token types (B, T): 1 for tokens of the second text of a pair, in families that take them."""
    sample_indices: tuple[int, ...] | None = None
    """Indices of the samples in their data set; None if not recorded."""

    @property
    def targets(self) -> int:
        """Number of labels; all of them if they are numbers per text."""
        return self.labels.numel() if self.labels.is_floating_point() else int((self.labels != IGNORE).sum())

    @property
    def nbytes(self) -> int:
        """Total bytes of the tensors."""
        tensors = (self.ids, self.valid, self.labels, self.types)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device) -> Batch:
        """Copy of the batch on a device."""
        types = None if self.types is None else self.types.to(device)
        return Batch(self.ids.to(device), self.valid.to(device), self.labels.to(device), types, self.sample_indices)


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    form: Format,
    *,
    max_length: int,
    max_prompt_length: int,
    bos: Bos = "auto",
) -> list[Sample]:
    """Encode rows as samples; rows that leave no token to predict are dropped.

    Prompt and response are tokenised separately; :class:`~raycloud.models.texts.TextBounds` gives the tokens at their
    beginning and end. A prompt over ``max_prompt_length`` tokens is shortened in its body, the whole is truncated at
    ``max_length``.

    Raises:
        DataError: no row is left, or a row lacks a column of the format.
        ModelError: the tokenizer has no token that the format or ``bos`` needs.
    """
    return encode_counted(rows, tokenizer, form, max_length=max_length, max_prompt_length=max_prompt_length, bos=bos)[0]


def encode_counted(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    form: Format,
    *,
    max_length: int,
    max_prompt_length: int,
    bos: Bos = "auto",
) -> tuple[list[Sample], RowCounts]:
    """Encode rows like :func:`encode`, and count them."""
    (kept,), tally = _kept([_encoded(rows, tokenizer, form, max_length, max_prompt_length, bos)], max_length)
    return [one.sample for one in kept], tally


def encode_for_two(
    rows: Sequence[Row],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    form: Format,
    *,
    max_length: int,
    max_prompt_length: int,
    bos: Bos = "auto",
) -> tuple[list[Sample], list[Sample], list[str], RowCounts]:
    """Encode the same rows with two tokenizers; rows that leave either one no token to predict are dropped.

    Returns:
        The samples of either tokenizer, the texts of the responses, and the counts of the rows.
    """
    sides = [_encoded(rows, one, form, max_length, max_prompt_length, bos) for one in tokenizers]
    (ours, theirs), tally = _kept(sides, max_length)
    return [one.sample for one in ours], [one.sample for one in theirs], [one.response for one in ours], tally


def _encoded(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    form: Format,
    max_length: int,
    max_prompt_length: int,
    bos: Bos,
) -> list[_Encoded]:
    bounds = bounds_of(tokenizer, form, bos)
    ending = bounds.end if form == "plain" else bounds.answer
    pairs = [prompt_and_response(row, form, tokenizer) for row in rows]
    prompts = _tokens(tokenizer, [prompt.text for prompt, _ in pairs])
    responses = _tokens(tokenizer, [response for _, response in pairs])
    encoded = []
    for (prompt, response), bare, answer in zip(pairs, prompts, responses, strict=True):
        begun = bounds.begun([*bare, *answer])
        asked = begun[: len(begun) - len(answer)]
        shortened = len(asked) > max_prompt_length
        if shortened:
            asked = shortened_prompt(prompt, tokenizer, bounds, max_prompt_length)
        sample = Sample(tuple([*asked, *answer, *ending][:max_length]), len(asked))
        encoded.append(_Encoded(sample, prompt.text, response, shortened))
    return encoded


def _kept(sides: Sequence[Sequence[_Encoded]], max_length: int) -> tuple[list[list[_Encoded]], RowCounts]:
    """Rows of every tokenizer that leave all tokenizers a token to predict."""
    whole = list(zip(*sides, strict=True))
    kept = [row for row in whole if all(one.sample.targets > 0 for one in row)]
    if not kept:
        raise DataError(f"no row of {len(whole)} leaves a token to predict within max_length={max_length}")
    crowded = sum(any(one.sample.prompt >= max_length for one in row) for row in whole)
    tally = RowCounts(
        len(whole),
        empty=len(whole) - len(kept) - crowded,
        crowded=crowded,
        shortened=sum(any(one.shortened for one in row) for row in whole),
        unlike=sum(len({one.prompt for one in row}) > 1 for row in whole),
    )
    return [list(side) for side in zip(*kept, strict=True)], tally


def shortened_prompt(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, bounds: TextBounds, max_prompt_length: int
) -> list[int]:
    """Token ids of a prompt whose body is shortened to at most ``max_prompt_length`` tokens in all."""
    before, body, after = _tokens(tokenizer, [prompt.before, prompt.body, prompt.after])
    before = bounds.begun(before)
    room = max(0, max_prompt_length - len(before) - len(after))
    return [*before, *body[:room], *after]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Batch of samples, padded on the right to the longest of them."""
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
    """Order of samples: the batch of step ``s`` is a pure function of (lengths, batch size, seed, s).

    Every epoch is a new permutation in which samples of similar length share a batch, since a short sentence padded
    to the length of a long one costs as much as the long one. Samples that do not fill a batch are skipped in that
    epoch.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = min(batch_size, len(lengths))
        self.seed = seed
        self.steps_per_epoch = len(lengths) // self.batch_size
        self._epoch: tuple[int, np.ndarray] | None = None

    def indices(self, step: int) -> list[int]:
        """Indices of the samples of a global step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._permutation(epoch))
        return [int(index) for index in self._epoch[1][within]]

    def _permutation(self, epoch: int) -> np.ndarray:
        """Indices of the batches of an epoch, (steps per epoch, batch size)."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))[: self.steps_per_epoch * self.batch_size]
        group = np.arange(len(order)) // (self.batch_size * _GROUP)
        order = order[np.lexsort((self.lengths[order], group))]
        return random.permutation(order.reshape(self.steps_per_epoch, self.batch_size), axis=0)


def length_sorted_batches(samples: Sequence[Sample], batch_size: int, pad: int) -> list[Batch]:
    """Batches of all samples, grouped by similar length, for evaluation."""
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    return [collate(ordered[at : at + batch_size], pad) for at in range(0, len(ordered), batch_size)]
