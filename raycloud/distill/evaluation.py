"""Evaluation of a student beside its teacher on held-out text: perplexity, agreement, KL, answers, tokens per
second."""

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

from raycloud.data.batches import IGNORE, Batch, encode, length_sorted_batches
from raycloud.data.prompts import Format
from raycloud.data.splits import Row
from raycloud.distill.alignment.pairs import AlignedSamples, DeviceVocabularyMap
from raycloud.distill.objectives.forward_kl import forward_kl
from raycloud.distill.objectives.mined import covered_kl, map_to_student_vocab
from raycloud.durable import write_atomically
from raycloud.errors import about
from raycloud.evaluation.answers import answer_end_ids, answer_text, generate_answers
from raycloud.evaluation.perplexity import TokenPredictions, final_hidden, perplexity, predict, predict_from_hidden
from raycloud.evaluation.questions import build_questions
from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.evaluation.rouge import rouge_l
from raycloud.models.generation import greedy
from raycloud.models.loading import Pretrained
from raycloud.models.segments import Segment
from raycloud.models.texts import Bos, TextBounds
from raycloud.results import cached_path

ALL = "(all)"
_BATCH = 16
_CHUNK = 64
"""Number of tokens whose logits exist at a time, for both models."""
_PAIRS = 7
"""Least number of texts that teacher and student generate in turn to compare their speeds."""


@dataclass(frozen=True)
class GroupMetrics:
    """Perplexity on held-out text, agreement with the teacher's most likely token, and KL divergence from the
    teacher."""

    perplexity: float
    agreement: float
    tokens: int
    """Number of teacher tokens."""
    kl: float
    """KL(teacher‖student) in nats, the mean over the tokens that both tokenizers have."""


@dataclass(frozen=True)
class TextMetrics:
    """Sums over one held-out text, for a comparison of students text by text."""

    group: str
    text: int
    """Index of the text; the same text has the same index for all students with one tokenizer and one set of texts."""
    tokens: int
    """Number of student tokens."""
    nll: float
    """Negative log-likelihood in nats."""
    compared: int
    """Number of tokens that both tokenizers have; ``kl`` and ``agree`` are sums over these."""
    kl: float
    agree: int


@dataclass(frozen=True)
class CompletionComparison:
    """Completions of the same prompts by both models, and the speed of both, measured in alternation."""

    prompts: list[str]
    teacher: list[str]
    student: list[str]
    teacher_tok_s: float
    student_tok_s: float


@dataclass(frozen=True)
class StudentEvaluation:
    """Results of a student's evaluation: by group, over all text, and text by text."""

    scores: dict[str, GroupMetrics]
    texts: list[TextMetrics]


@dataclass(frozen=True)
class _Group:
    """Held-out texts of one group in the tokens of both models, and the teacher's outputs on them."""

    batches: list[Batch]
    """Batches in the student's tokens."""
    texts: Tensor
    """(n,): index of the text that each labelled student token belongs to."""
    partner: Tensor
    """(n,): index of the teacher token with the same bytes, or -1."""
    hidden: Tensor
    """(m, D): final hidden states of the teacher."""
    reference: TokenPredictions


class StudentEvaluator:
    """Evaluates students on held-out rows by group. The teacher is evaluated once.

    A student with its own tokenizer is evaluated on the same texts. Its perplexity is normalised by the number of
    teacher tokens, so that both models measure the same quantity. At tokens that both tokenizers have, it agrees if
    both most likely tokens are the same vocabulary entry, and KL compares it with the teacher's probabilities mapped to
    its own vocabulary.

    Args:
        teacher: model and tokenizer.
        student_tokenizer: tokenizer of the students; None if it is the teacher's.
        held_out: rows by group name.
        form: prompt format.
        max_length: maximum number of tokens of prompt and response.
        max_prompt_length: maximum number of prompt tokens.
        bos: whether texts begin with BOS.
        cache: cache folder for the teacher's outputs, which are then not computed again.
        name: name of the teacher with a fingerprint of its weights, the cache key; required with ``cache``.
    """

    def __init__(
        self,
        teacher: Pretrained,
        student_tokenizer: PreTrainedTokenizerBase | None,
        held_out: Mapping[str, Sequence[Row]],
        form: Format,
        *,
        max_length: int,
        max_prompt_length: int,
        bos: Bos = "auto",
        cache: Path | None = None,
        name: str = "",
    ) -> None:
        self._pretrained, self._teacher, self._tokenizer = teacher, Segment(teacher.model), teacher.tokenizer
        self._student_tokenizer = student_tokenizer or teacher.tokenizer
        self._device = teacher.model.device
        self._form, self._max_prompt, self._bos = form, max_prompt_length, bos
        options = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        self._vocabulary: DeviceVocabularyMap | None = None
        self._groups: dict[str, _Group] = {}
        for group, rows in held_out.items():
            if student_tokenizer is None:
                samples = encode(rows, self._tokenizer, form, **options, bos=bos)
                teacher_batches = batches = length_sorted_batches(samples, _BATCH, self._tokenizer.pad_token_id)
                partner = torch.arange(sum(batch.targets for batch in batches))
            else:
                pairs = AlignedSamples(rows, student_tokenizer, self._tokenizer, form, **options, bos=bos)
                batches, teacher_batches, partner = _aligned_batches(pairs)
                self._vocabulary = self._vocabulary or DeviceVocabularyMap(pairs.map, self._device)
            outputs = self._cached(teacher_batches, cache, name)
            reference = TokenPredictions(outputs["nll"], outputs["guesses"])
            hidden = outputs["hidden"].to(self._device)
            self._groups[group] = _Group(batches, _text_of_each(batches), partner, hidden, reference)

    def _cached(self, batches: Sequence[Batch], folder: Path | None, name: str) -> dict[str, Tensor]:
        """The teacher's final hidden states and predictions at the labelled tokens, from the cache if possible."""
        if folder is None:
            return self._outputs(batches)
        texts = hashlib.sha256(b"".join(t.numpy().tobytes() for one in batches for t in (one.ids, one.labels)))
        dtype = str(next(self._teacher.parameters()).dtype)
        path = cached_path(
            folder, {"teacher": name, "texts": texts.hexdigest(), "dtype": dtype, "version": 2}, "safetensors"
        )
        with suppress(OSError, SafetensorError):
            return load_file(path)
        outputs = self._outputs(batches)
        write_atomically(path, save(outputs))
        return outputs

    def _outputs(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        pairs = list(final_hidden(self._teacher, self._on_device(batches)))
        reference = predict_from_hidden(self._teacher, pairs, chunk=_CHUNK)
        hidden = torch.cat([some for some, _ in pairs]).cpu()
        return {"hidden": hidden, "nll": reference.nll, "guesses": reference.guesses}

    def _on_device(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        return (batch.to(self._device) for batch in batches)

    def evaluate_teacher(self) -> dict[str, GroupMetrics]:
        """Metrics of the teacher by group and over all text."""
        references = {name: group.reference for name, group in self._groups.items()}
        references = {ALL: TokenPredictions.join(references.values()), **references}
        return {name: GroupMetrics(one.perplexity, 1.0, len(one.nll), 0.0) for name, one in references.items()}

    def evaluate_student(self, model: PreTrainedModel) -> StudentEvaluation:
        """Metrics of a student by group, over all text, and text by text."""
        segment, texts = Segment(model), list[TextMetrics]()
        for name, group in self._groups.items():
            predicted = predict(
                segment, self._on_device(group.batches), chunk=_CHUNK, beside=partial(self._divergence, group)
            )
            texts += self._by_text(name, group, predicted)
        names = {ALL: list(self._groups), **{name: [name] for name in self._groups}}
        return StudentEvaluation({name: self._score(texts, some) for name, some in names.items()}, texts)

    def _divergence(self, group: _Group, logits: Tensor, at: slice) -> Tensor:
        """KL(teacher‖student) (c,) at some of the student's tokens; 0 where the teacher has no such token."""
        partner = group.partner[at].to(logits.device)
        found = (partner >= 0).nonzero()[:, 0]
        teacher_logits = self._teacher.logits(group.hidden[partner[found]]).float()
        divergence = logits.new_zeros(len(partner))
        if self._vocabulary is None:
            divergence[found] = forward_kl(teacher_logits.log_softmax(dim=-1), logits[found].log_softmax(dim=-1))
        else:
            named = map_to_student_vocab(teacher_logits.softmax(dim=-1), self._vocabulary, logits.shape[-1])
            covered = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            covered[self._vocabulary.entries[0]] = True
            divergence[found] = covered_kl(named, logits[found], covered)
        return divergence

    def _by_text(self, name: str, group: _Group, predicted: TokenPredictions) -> list[TextMetrics]:
        assert predicted.beside is not None
        both = group.partner >= 0
        agree = torch.zeros(len(both))
        agree[both] = (predicted.guesses[both] == self._named(group.reference.guesses[group.partner[both]])).float()
        count = int(group.texts.max()) + 1
        values = torch.stack(
            [torch.ones(len(both)), predicted.nll, both.float(), predicted.beside, agree], dim=1
        ).double()
        sums = torch.zeros(count, 5, dtype=torch.float64).index_add_(0, group.texts, values)
        return [
            TextMetrics(name, text, int(tokens), nll, int(compared), kl, int(same))
            for text, (tokens, nll, compared, kl, same) in enumerate(sums.tolist())
        ]

    def _named(self, guesses: Tensor) -> Tensor:
        """Student ids (c,) of the teacher's ids, or -1 where the student has no such entry."""
        if self._vocabulary is None:
            return guesses
        student_ids, teacher_ids = (one.cpu() for one in self._vocabulary.shared)
        names = torch.full((self._pretrained.model.config.get_text_config().vocab_size,), -1)
        names[teacher_ids] = student_ids
        return names[guesses]

    def _score(self, texts: Sequence[TextMetrics], groups: Sequence[str]) -> GroupMetrics:
        chosen = [text for text in texts if text.group in groups]
        tokens = sum(len(self._groups[name].reference.nll) for name in groups)
        compared = max(1, sum(text.compared for text in chosen))
        return GroupMetrics(
            perplexity(sum(text.nll for text in chosen) / tokens),
            sum(text.agree for text in chosen) / compared,
            tokens,
            sum(text.kl for text in chosen) / compared,
        )

    def tokenizer(self, model: PreTrainedModel | None) -> PreTrainedTokenizerBase:
        """Tokenizer of the students, or of the teacher if no model is given."""
        return self._student_tokenizer if model else self._tokenizer

    def rouge_l(
        self, model: PreTrainedModel | None, rows: Sequence[Row], count: int, how: GenerationRecipe, seed: int
    ) -> float:
        """ROUGE-L (%) of answers to ``count`` evenly spaced rows, by the teacher if no model is given."""
        tokenizer, model = self.tokenizer(model), model or self._pretrained.model
        questions = build_questions(
            rows, tokenizer, self._form, max_prompt_length=self._max_prompt, limit=count, bos=self._bos
        )
        with about("teacher" if model is self._pretrained.model else "student"):
            made = generate_answers(
                Segment(model),
                [question.ids for question in questions],
                how,
                seed=seed,
                ends=answer_end_ids(model, tokenizer),
                numbers=[question.number for question in questions],
            )
        texts = (answer_text(ids, tokenizer) for ids in made)
        return statistics.fmean(
            rouge_l(text, question.references) for text, question in zip(texts, questions, strict=True)
        )

    def compare(self, model: PreTrainedModel, prompts: Sequence[str], max_new_tokens: int) -> CompletionComparison:
        """Complete prompts with both models, one prompt at a time; tokens/s are medians over interleaved pairs."""
        both = {"teacher": (self._teacher, self._tokenizer), "student": (Segment(model), self._student_tokenizer)}
        texts: dict[str, list[str]] = {name: [] for name in both}
        speeds: dict[str, list[float]] = {name: [] for name in both}
        rounds = -(-_PAIRS // len(prompts))
        for repeat in range(rounds):
            for prompt in prompts:
                for name, (segment, tokenizer) in both.items():
                    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                    ids = TextBounds.of(tokenizer, self._bos).begun(bare)
                    start = time.perf_counter()
                    with about(name):
                        made = greedy(segment, [ids], max_new_tokens)[0]
                    speeds[name].append(len(made) / (time.perf_counter() - start))
                    if repeat == 0:
                        texts[name].append(str(tokenizer.decode(made, skip_special_tokens=True)))
        median = {name: statistics.median(values) for name, values in speeds.items()}
        return CompletionComparison(
            list(prompts), texts["teacher"], texts["student"], median["teacher"], median["student"]
        )


def _aligned_batches(pairs: AlignedSamples) -> tuple[list[Batch], list[Batch], Tensor]:
    """Batches of similar length of all samples for both sides, and the teacher partner of every labelled student
    token."""
    order = sorted(range(len(pairs.student)), key=lambda index: len(pairs.student[index].ids))
    student_batches, teacher_batches, partners, before = [], [], [], 0
    for at in range(0, len(order), _BATCH):
        sample_indices = order[at : at + _BATCH]
        student_batch, teacher_batch = pairs.batches(sample_indices)
        partner = pairs.partners(sample_indices)
        partners.append(torch.where(partner >= 0, partner + before, -1))
        student_batches.append(student_batch)
        teacher_batches.append(teacher_batch)
        before += teacher_batch.targets
    return student_batches, teacher_batches, torch.cat(partners)


def _text_of_each(batches: Sequence[Batch]) -> Tensor:
    """Index (n,) of the text that every labelled token belongs to, counted through all batches."""
    counts = torch.cat([(batch.labels != IGNORE).sum(dim=1) for batch in batches])
    return torch.arange(len(counts)).repeat_interleave(counts)


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Share (ln before − ln after) / (ln before − ln teacher) of perplexities: 0 if nothing was learned, 1 if the gap
    is closed.

    Returns None if there was no gap, as for a student with all of the teacher's blocks, or if a perplexity is not
    finite.
    """
    if not all(value is not None and math.isfinite(value) for value in (before, after, teacher)):
        return None
    first, last, goal = (math.log(value) for value in (before, after, teacher) if value is not None)
    return (first - last) / (first - goal) if abs(first - goal) > 1e-6 else None
