"""A student beside its teacher: perplexity and agreement on held-out text, completions, tokens per second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raycloud.data.batches import Batch, encode, in_length_order
from raycloud.data.prompts import Format
from raycloud.data.splits import Row
from raycloud.distill.pairs import Pairs, Words
from raycloud.evaluation.language import Judgement, judge
from raycloud.models.generation import greedy
from raycloud.models.loading import Pretrained
from raycloud.models.segments import Segment

ALL = "(all)"
_BATCH = 16
_PAIRS = 7


@dataclass(frozen=True)
class Score:
    """Perplexity on a text, and the share of tokens where the most likely one is the teacher's."""

    perplexity: float
    agreement: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """The same prompts completed by both models, and the speed of both, measured turn about."""

    prompts: list[str]
    teacher: list[str]
    student: list[str]
    teacher_tok_s: float
    student_tok_s: float


class Examiner:
    """Judges students on held-out rows by group; the teacher is judged once.

    A student with a tokenizer of its own is judged on the same texts. Its perplexity is per token of the teacher, so
    that both measure the same thing, and it agrees where both likeliest words are the same, at tokens that both have.

    Args:
        teacher: model and tokenizer.
        own: the students' tokenizer; None where it is the teacher's.
        held_out: rows by group name.
        form: of the prompts.
        max_length: tokens of prompt and response.
        max_prompt: tokens of the prompt.
    """

    def __init__(
        self,
        teacher: Pretrained,
        own: PreTrainedTokenizerBase | None,
        held_out: Mapping[str, Sequence[Row]],
        form: Format,
        *,
        max_length: int,
        max_prompt: int,
    ) -> None:
        self._teacher, self._tokenizer = Segment(teacher.model), teacher.tokenizer
        self._own = own or teacher.tokenizer
        self._device = teacher.model.device
        options = {"max_length": max_length, "max_prompt": max_prompt}
        self._partners: dict[str, Tensor] | None = None
        if own is None:
            pad = teacher.tokenizer.pad_token_id
            samples = {group: encode(rows, self._tokenizer, form, **options) for group, rows in held_out.items()}
            self._asked = {group: in_length_order(some, _BATCH, pad) for group, some in samples.items()}
            self._batches = self._asked
        else:
            both = {group: Pairs(rows, own, self._tokenizer, form, **options) for group, rows in held_out.items()}
            self._batches, self._asked, self._partners = {}, {}, {}
            for group, pairs in both.items():
                self._batches[group], self._asked[group], self._partners[group] = _paired(pairs)
            first = next(iter(both.values()))
            self._words = Words(first.map, torch.device("cpu"))
        self._reference = self._judge(self._teacher, self._asked)

    def _judge(self, model: Segment, batches: Mapping[str, Sequence[Batch]]) -> dict[str, Judgement]:
        judged = {group: judge(model, (batch.to(self._device) for batch in some)) for group, some in batches.items()}
        return {ALL: Judgement.join(judged.values()), **judged}

    def teacher(self) -> dict[str, Score]:
        """The teacher's scores by group and over all text."""
        return {
            group: Score(one.perplexity, one.agreement(one), len(one.nll)) for group, one in self._reference.items()
        }

    def student(self, model: PreTrainedModel) -> dict[str, Score]:
        """A student's scores by group and over all text."""
        judged = self._judge(Segment(model), self._batches)
        scores = {}
        for group, one in judged.items():
            reference = self._reference[group]
            perplexity = math.exp(float(one.nll.double().sum()) / len(reference.nll))
            scores[group] = Score(perplexity, self._agreement(group, one, reference), len(reference.nll))
        return scores

    def _agreement(self, group: str, student: Judgement, teacher: Judgement) -> float:
        if self._partners is None:
            return student.agreement(teacher)
        partner = self._partners[group] if group != ALL else _joined(self._partners, self._asked)
        mine, theirs = self._words.shared
        named = torch.full((1 + int(max(teacher.guesses.max(), theirs.max())),), -1)
        named[theirs] = mine
        found = (partner >= 0).nonzero()[:, 0]
        return float((student.guesses[found] == named[teacher.guesses[partner[found]]]).double().mean())

    def compare(self, model: PreTrainedModel, prompts: Sequence[str], new_tokens: int) -> Comparison:
        """Complete prompts with both models, one prompt at a time; tokens/s are medians over interleaved pairs."""
        both = {"teacher": (self._teacher, self._tokenizer), "student": (Segment(model), self._own)}
        texts: dict[str, list[str]] = {name: [] for name in both}
        speeds: dict[str, list[float]] = {name: [] for name in both}
        rounds = -(-_PAIRS // len(prompts))
        for repeat in range(rounds):
            for prompt in prompts:
                for name, (segment, tokenizer) in both.items():
                    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                    start = time.perf_counter()
                    made = greedy(segment, [ids], new_tokens)[0]
                    speeds[name].append(len(made) / (time.perf_counter() - start))
                    if repeat == 0:
                        texts[name].append(str(tokenizer.decode(made, skip_special_tokens=True)))
        median = {name: statistics.median(values) for name, values in speeds.items()}
        return Comparison(list(prompts), texts["teacher"], texts["student"], median["teacher"], median["student"])


def _paired(pairs: Pairs) -> tuple[list[Batch], list[Batch], Tensor]:
    """All samples in batches of similar length for both sides, and the partners of all the student's tokens."""
    order = sorted(range(len(pairs.student)), key=lambda index: len(pairs.student[index].ids))
    mine, theirs, partners, before = [], [], [], 0
    for at in range(0, len(order), _BATCH):
        which = order[at : at + _BATCH]
        ours, asked = pairs.batches(which)
        partner = pairs.partners(which)
        partners.append(torch.where(partner >= 0, partner + before, -1))
        mine.append(ours)
        theirs.append(asked)
        before += asked.targets
    return mine, theirs, torch.cat(partners)


def _joined(partners: Mapping[str, Tensor], asked: Mapping[str, Sequence[Batch]]) -> Tensor:
    """The partners of all groups one after the other."""
    found, before = [], 0
    for group, partner in partners.items():
        found.append(torch.where(partner >= 0, partner + before, -1))
        before += sum(batch.targets for batch in asked[group])
    return torch.cat(found)


def gap_closed(before: float, after: float, teacher: float) -> float | None:
    """(ln before − ln after) / (ln before − ln teacher) of perplexities: 0 for nothing learnt, 1 for all of it.

    None where there was no gap, as for a student with all of the teacher's blocks.
    """
    gap = math.log(before) - math.log(teacher)
    return (math.log(before) - math.log(after)) / gap if abs(gap) > 1e-6 else None
