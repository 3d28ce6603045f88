"""What a recipe's task learns from and is judged by: texts as tokens, their labels, and what became of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import IGNORE, Batch, SampleOrder, collate, encode
from raycloud.data.labelled import classes_of, collate_labelled, encode_labelled
from raycloud.data.sources import load_rows
from raycloud.data.spans import Question, encode_spans
from raycloud.data.splits import Row, select, spread
from raycloud.evaluation.labels import METRICS, Metric
from raycloud.evaluation.spans import best_over, best_spans, exact_match, overlap_f1
from raycloud.split.finetune.recipe import ClassificationRecipe, LanguageRecipe, SpanRecipe, SplitTuneRecipe

_BATCH = 32
CALIBRATION_TEXTS = 8
"""Of a batch that codes are fitted to, at most."""


@dataclass(frozen=True)
class Examples:
    """Texts of one split."""

    samples: Sequence[Any]
    join: Callable[[Sequence[Any]], Batch]
    questions: Sequence[Question] = ()
    """That the samples are windows of, where the task has any."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(sample.ids) for sample in self.samples]

    def batch(self, places: Sequence[int]) -> Batch:
        """Some of them, padded on the right."""
        return self.join([self.samples[place] for place in places])

    def largest(self, together: int) -> int:
        """The tokens of the largest batch of so many, as :meth:`in_length_order` makes them."""
        lengths = sorted(self.lengths)
        return max(sum(lengths[at : at + together]) for at in range(0, len(lengths), together))

    def in_length_order(self, together: int) -> Iterator[tuple[list[Any], Batch]]:
        """All of them, so many at once, for evaluation: the samples and what they are as a batch."""
        order = np.argsort(self.lengths, kind="stable").tolist()
        for at in range(0, len(order), together):
            places = order[at : at + together]
            yield [self.samples[place] for place in places], self.batch(places)


@dataclass(frozen=True)
class Lessons:
    """Which texts each step takes: a function of the step alone.

    Args:
        examples: to learn from.
        order: of the micro-batches.
        accumulate: how many of them make a step.
    """

    examples: Examples
    order: SampleOrder
    accumulate: int

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step."""
        return [replace(self.examples.batch(places), places=tuple(places)) for places in self._places(step)]

    def lengths(self, step: int) -> list[list[int]]:
        """The tokens of each text, by micro-batch."""
        return [[int(self.order.lengths[place]) for place in places] for places in self._places(step)]

    def largest(self, steps: int) -> int:
        """The tokens of the largest micro-batch of so many steps."""
        return max(sum(lengths) for step in range(steps) for lengths in self.lengths(step))

    def samples(self, step: int) -> int:
        """How many texts a step takes."""
        return sum(map(len, self._places(step)))

    def _places(self, step: int) -> list[list[int]]:
        return [self.order.indices(step * self.accumulate + micro) for micro in range(self.accumulate)]


def calibration(examples: Examples, texts: int = 64, *, most: int = CALIBRATION_TEXTS) -> list[Batch]:
    """So many of the texts, spread over all of them, in batches of ``most`` at most."""
    places, size = spread(len(examples.samples), texts), min(most, CALIBRATION_TEXTS)
    return [examples.batch(places[at : at + size]) for at in range(0, len(places), size)]


def most_tokens(lessons: Lessons, steps: int, held_out: Examples, recipe: SplitTuneRecipe) -> int:
    """The tokens of the largest batch of a run whose rows cross both cuts: to learn from, or to be judged by."""
    return max(lessons.largest(steps), held_out.largest(_judged_at_once(recipe)))


def _judged_at_once(recipe: SplitTuneRecipe) -> int:
    return min(_BATCH, recipe.training.batch_size)


def lessons_of(examples: Examples, recipe: SplitTuneRecipe) -> Lessons:
    """What each step of a recipe takes."""
    order = SampleOrder(examples.lengths, recipe.training.batch_size, recipe.seed)
    return Lessons(examples, order, recipe.training.accumulate)


def examples_of(
    recipe: SplitTuneRecipe, tokenizer: PreTrainedTokenizerBase, notify: Callable[[str], None]
) -> tuple[Examples, Examples, int]:
    """Training and held-out texts, and how many classes they have (0 where there are none).

    Raises:
        DataError: they cannot be read, or lack what the task names.
    """
    data, task, pad = recipe.data, recipe.task, int(tokenizer.pad_token_id)

    def rows(split: str, most: int | None) -> list[Row]:
        found = select(load_rows(data.source, split, notify), data.where)
        if isinstance(task, ClassificationRecipe) and task.classes is not None:
            found = select(found, {task.label: task.classes})
        return [found[place] for place in spread(len(found), most)]

    train, held_out = rows("train", data.limit), rows(data.held_out_split, data.held_out)
    if isinstance(task, LanguageRecipe):
        spoken = [
            Examples(
                encode(some, tokenizer, task.format, max_length=data.max_length, max_prompt=task.max_prompt),
                lambda samples: collate(samples, pad),
            )
            for some in (train, held_out)
        ]
        return spoken[0], spoken[1], 0
    if isinstance(task, SpanRecipe):
        asked = []
        for some in (train, held_out):
            windows, questions = encode_spans(
                some,
                tokenizer,
                question=task.question,
                context=task.context,
                answers=task.answers,
                max_length=data.max_length,
                max_question=task.max_question,
                stride=task.stride,
            )
            asked.append(Examples(windows, lambda samples: collate_labelled(samples, pad), questions))
        return asked[0], asked[1], 0
    classes = (task.classes or classes_of(train, task.label)) if isinstance(task, ClassificationRecipe) else None
    made = [
        Examples(
            encode_labelled(
                some,
                tokenizer,
                text=task.text,
                pair=task.pair,
                label=task.label,
                classes=classes,
                max_length=data.max_length,
            ),
            lambda samples: collate_labelled(samples, pad),
        )
        for some in (train, held_out)
    ]
    return made[0], made[1], len(classes or ())


@torch.no_grad()
def judge(
    predict: Callable[[Batch], Tensor],
    examples: Examples,
    recipe: SplitTuneRecipe,
    told: Callable[[int], None] = lambda texts: None,
) -> dict[str, float]:
    """The task's metrics over all texts, from what its head says of each batch; ``told`` hears how many are done."""

    def said() -> Iterator[tuple[list[Any], Batch, Tensor]]:
        done = 0
        for samples, batch in examples.in_length_order(_judged_at_once(recipe)):
            told(done := done + len(samples))
            yield samples, batch, predict(batch).float().cpu()

    match recipe.task:
        case LanguageRecipe():
            return _spoken(said())
        case SpanRecipe() as task:
            return _answered(said(), examples.questions, task.max_answer)
        case task:
            return _labelled(said(), task.metrics)


Said = Iterator[tuple[list[Any], Batch, Tensor]]
"""Samples, the batch that they are, and what the head says of it."""


def _spoken(said: Said) -> dict[str, float]:
    nll = []
    for _, batch, logits in said:
        labels = batch.labels[batch.labels != IGNORE]
        nll.append((logits.logsumexp(dim=-1) - logits.gather(-1, labels[:, None])[:, 0]).double())
    return {"perplexity": float(torch.cat(nll).mean().exp())}


def _labelled(said: Said, metrics: Sequence[Metric]) -> dict[str, float]:
    guesses, true = [], []
    for _, batch, outputs in said:
        guesses.append(outputs.argmax(dim=-1) if outputs.ndim == 2 else outputs)
        true.append(batch.labels)
    found, wanted = torch.cat(guesses).numpy(), torch.cat(true).numpy()
    return {name: METRICS[name](found, wanted) for name in metrics}


def _answered(said: Said, questions: Sequence[Question], most: int) -> dict[str, float]:
    """Of each question the answer of the window that is surest."""
    surest = [-math.inf] * len(questions)
    answers = [""] * len(questions)
    for windows, batch, logits in said:
        of_text = torch.zeros_like(batch.valid)
        for row, window in enumerate(windows):
            of_text[row, : len(window.ids)] = torch.from_numpy(window.offsets[:, 0] >= 0)
        spans = zip(windows, *(found.tolist() for found in best_spans(logits, of_text, most)), strict=True)
        for window, first, last, score in spans:
            if score > surest[window.question]:
                surest[window.question] = score
                context = questions[window.question].context
                answers[window.question] = context[window.offsets[first, 0] : window.offsets[last, 1]]
    both = {"exact_match": exact_match, "f1": overlap_f1}
    return {
        name: statistics.fmean(
            best_over(measure, answer, question.answers) for answer, question in zip(answers, questions, strict=True)
        )
        for name, measure in both.items()
    }
