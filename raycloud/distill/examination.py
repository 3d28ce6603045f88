"""A student beside its teacher on held-out text: perplexity, agreement, divergence, answers, tokens per second."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raycloud.data.batches import IGNORE, Batch, encode, in_length_order
from raycloud.data.prompts import Format
from raycloud.data.splits import Row
from raycloud.distill.objectives.forward_kl import forward_kl
from raycloud.distill.objectives.mined import carried_over, covered_kl
from raycloud.distill.pairs import Pairs, Words
from raycloud.evaluation.answers import answers, ends_of, text_of
from raycloud.evaluation.language import Judgement, final_rows, judge, judge_rows
from raycloud.evaluation.questions import ask
from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.evaluation.rouge import rouge_l
from raycloud.models.generation import greedy
from raycloud.models.loading import Pretrained
from raycloud.models.segments import Segment
from raycloud.results import kept_at, write_atomically

ALL = "(all)"
_BATCH = 16
_CHUNK = 64
"""Tokens whose logits exist at a time: those of both models do."""
_PAIRS = 7


@dataclass(frozen=True)
class Score:
    """Perplexity on a text, the share of tokens where the most likely one is the teacher's, and the distance to it."""

    perplexity: float
    agreement: float
    tokens: int
    kl: float
    """KL(teacher‖student) in nats, the mean over the tokens that both have."""


@dataclass(frozen=True)
class TextScore:
    """Sums over one held-out text, to compare students text by text."""

    group: str
    text: int
    """Its place in the examination: the same one for all students with one tokenizer and one set of texts."""
    tokens: int
    """Of the student."""
    nll: float
    """Nats."""
    compared: int
    """Tokens that both have: those the next two are about."""
    kl: float
    agree: int


@dataclass(frozen=True)
class Comparison:
    """The same prompts completed by both models, and the speed of both, measured turn about."""

    prompts: list[str]
    teacher: list[str]
    student: list[str]
    teacher_tok_s: float
    student_tok_s: float


@dataclass(frozen=True)
class Examined:
    """What a student's examination finds, by group and over all text, and text by text."""

    scores: dict[str, Score]
    texts: list[TextScore]


@dataclass(frozen=True)
class _Group:
    """Held-out texts of one group as both models read them, and what the teacher makes of them."""

    batches: list[Batch]
    """The student's."""
    texts: Tensor
    """(n,): which text each labelled token of theirs belongs to."""
    partner: Tensor
    """(n,): the teacher's token that stands for the same, or -1."""
    rows: Tensor
    """(m, D): the teacher's final rows."""
    reference: Judgement


class Examiner:
    """Judges students on held-out rows by group; the teacher is judged once.

    A student with a tokenizer of its own is judged on the same texts. Its perplexity is per token of the teacher, so
    that both measure the same thing. It agrees where both likeliest words are the same, and its divergence is taken
    from the teacher's probabilities as far as its own vocabulary can name them, both at tokens that both have.

    Args:
        teacher: model and tokenizer.
        own: the students' tokenizer; None where it is the teacher's.
        held_out: rows by group name.
        form: of the prompts.
        max_length: tokens of prompt and response.
        max_prompt: tokens of the prompt.
        kept: folder for what the teacher makes of the texts, which is then not computed again.
        name: of the teacher, by which its weights are told from others'; needed for ``kept``.
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
        kept: Path | None = None,
        name: str = "",
    ) -> None:
        self._pretrained, self._teacher, self._tokenizer = teacher, Segment(teacher.model), teacher.tokenizer
        self._own = own or teacher.tokenizer
        self._device = teacher.model.device
        self._form, self._max_prompt = form, max_prompt
        options = {"max_length": max_length, "max_prompt": max_prompt}
        self._words: Words | None = None
        self._groups: dict[str, _Group] = {}
        for group, rows in held_out.items():
            if own is None:
                samples = encode(rows, self._tokenizer, form, **options)
                asked = batches = in_length_order(samples, _BATCH, self._tokenizer.pad_token_id)
                partner = torch.arange(sum(batch.targets for batch in batches))
            else:
                pairs = Pairs(rows, own, self._tokenizer, form, **options)
                batches, asked, partner = _paired(pairs)
                self._words = self._words or Words(pairs.map, self._device)
            said = self._kept(asked, kept, name)
            reference = Judgement(said["nll"], said["guesses"])
            here = said["rows"].to(self._device)
            self._groups[group] = _Group(batches, _text_of_each(batches), partner, here, reference)

    def _kept(self, asked: Sequence[Batch], folder: Path | None, name: str) -> dict[str, Tensor]:
        """The teacher's final rows at the labelled tokens, and its judgement of them."""
        if folder is None:
            return self._said(asked)
        texts = hashlib.sha256(b"".join(t.numpy().tobytes() for one in asked for t in (one.ids, one.labels)))
        dtype = str(next(self._teacher.parameters()).dtype)
        path = kept_at(folder, {"teacher": name, "texts": texts.hexdigest(), "dtype": dtype}, "safetensors")
        with suppress(OSError, SafetensorError):
            return load_file(path)
        said = self._said(asked)
        write_atomically(path, save(said))
        return said

    def _said(self, asked: Sequence[Batch]) -> dict[str, Tensor]:
        pairs = list(final_rows(self._teacher, self._here(asked)))
        reference = judge_rows(self._teacher, pairs, chunk=_CHUNK)
        rows = torch.cat([some for some, _ in pairs]).cpu()
        return {"rows": rows, "nll": reference.nll, "guesses": reference.guesses}

    def _here(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        return (batch.to(self._device) for batch in batches)

    def teacher(self) -> dict[str, Score]:
        """The teacher's scores by group and over all text."""
        references = {name: group.reference for name, group in self._groups.items()}
        references = {ALL: Judgement.join(references.values()), **references}
        return {name: Score(one.perplexity, 1.0, len(one.nll), 0.0) for name, one in references.items()}

    def student(self, model: PreTrainedModel) -> Examined:
        """A student's scores, and what they are made of."""
        segment, texts = Segment(model), list[TextScore]()
        for name, group in self._groups.items():
            judged = judge(segment, self._here(group.batches), chunk=_CHUNK, beside=partial(self._divergence, group))
            texts += self._by_text(name, group, judged)
        names = {ALL: list(self._groups), **{name: [name] for name in self._groups}}
        return Examined({name: self._score(texts, some) for name, some in names.items()}, texts)

    def _divergence(self, group: _Group, logits: Tensor, at: slice) -> Tensor:
        """KL(teacher‖student) (c,) at some of the student's tokens; 0 where the teacher has no such token."""
        partner = group.partner[at].to(logits.device)
        found = (partner >= 0).nonzero()[:, 0]
        theirs = self._teacher.logits(group.rows[partner[found]]).float()
        divergence = logits.new_zeros(len(partner))
        if self._words is None:
            divergence[found] = forward_kl(theirs.log_softmax(dim=-1), logits[found].log_softmax(dim=-1))
        else:
            named = carried_over(theirs.softmax(dim=-1), self._words, logits.shape[-1])
            covered = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            covered[self._words.edges[0]] = True
            divergence[found] = covered_kl(named, logits[found], covered)
        return divergence

    def _by_text(self, name: str, group: _Group, judged: Judgement) -> list[TextScore]:
        assert judged.beside is not None
        both = group.partner >= 0
        agree = torch.zeros(len(both))
        agree[both] = (judged.guesses[both] == self._named(group.reference.guesses[group.partner[both]])).float()
        count = int(group.texts.max()) + 1
        values = torch.stack([torch.ones(len(both)), judged.nll, both.float(), judged.beside, agree], dim=1).double()
        sums = torch.zeros(count, 5, dtype=torch.float64).index_add_(0, group.texts, values)
        return [
            TextScore(name, text, int(tokens), nll, int(compared), kl, int(same))
            for text, (tokens, nll, compared, kl, same) in enumerate(sums.tolist())
        ]

    def _named(self, guesses: Tensor) -> Tensor:
        """The teacher's words (c,) as the student calls them, or -1."""
        if self._words is None:
            return guesses
        mine, theirs = (one.cpu() for one in self._words.shared)
        names = torch.full((self._pretrained.model.config.get_text_config().vocab_size,), -1)
        names[theirs] = mine
        return names[guesses]

    def _score(self, texts: Sequence[TextScore], groups: Sequence[str]) -> Score:
        chosen = [text for text in texts if text.group in groups]
        tokens = sum(len(self._groups[name].reference.nll) for name in groups)
        compared = max(1, sum(text.compared for text in chosen))
        return Score(
            math.exp(sum(text.nll for text in chosen) / tokens),
            sum(text.agree for text in chosen) / compared,
            tokens,
            sum(text.kl for text in chosen) / compared,
        )

    def tokenizer(self, model: PreTrainedModel | None) -> PreTrainedTokenizerBase:
        """The students', or the teacher's where no model is given."""
        return self._own if model else self._tokenizer

    def rouge_l(
        self, model: PreTrainedModel | None, rows: Sequence[Row], count: int, how: GenerationRecipe, seed: int
    ) -> float:
        """ROUGE-L (%) of answers to ``count`` of the rows, evenly spread; of the teacher where no model is given."""
        tokenizer, model = self.tokenizer(model), model or self._pretrained.model
        questions = ask(rows, tokenizer, self._form, max_prompt=self._max_prompt, limit=count)
        made = answers(
            Segment(model),
            [question.ids for question in questions],
            how,
            seed=seed,
            ends=ends_of(model, tokenizer),
            numbers=[question.number for question in questions],
        )
        texts = (text_of(ids, tokenizer) for ids in made)
        return statistics.fmean(
            rouge_l(text, question.references) for text, question in zip(texts, questions, strict=True)
        )

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


def _text_of_each(batches: Sequence[Batch]) -> Tensor:
    """Which text every labelled token belongs to (n,), counted through all batches."""
    counts = torch.cat([(batch.labels != IGNORE).sum(dim=1) for batch in batches])
    return torch.arange(len(counts)).repeat_interleave(counts)


def gap_closed(before: float, after: float, teacher: float) -> float | None:
    """(ln before − ln after) / (ln before − ln teacher) of perplexities: 0 for nothing learnt, 1 for all of it.

    None where there was no gap, as for a student with all of the teacher's blocks.
    """
    gap = math.log(before) - math.log(teacher)
    return (math.log(before) - math.log(after)) / gap if abs(gap) > 1e-6 else None
