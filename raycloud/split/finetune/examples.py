"""Examples of a recipe's task: tokenized texts with labels for training, and the evaluation on held-out ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, assert_never

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import IGNORE, Batch, SampleOrder, collate, encode
from raycloud.data.checks import check_eos
from raycloud.data.labelled import class_in, classes_of, collate_labelled, encode_labelled
from raycloud.data.prompts import bounds_of
from raycloud.data.sources import limit_rows, load_split_rows
from raycloud.data.spans import SpanQuestion, encode_spans
from raycloud.data.splits import Row, evenly_spread_indices, select
from raycloud.errors import TrainingError
from raycloud.evaluation.classification import METRICS, Metric
from raycloud.evaluation.spans import best_match, best_spans, exact_match, overlap_f1
from raycloud.models.texts import TextBounds
from raycloud.split.finetune.recipe import (
    ClassificationRecipe,
    LanguageRecipe,
    RegressionRecipe,
    SpanRecipe,
    SplitTuneRecipe,
)

_BATCH = 32
CALIBRATION_TEXTS = 8
"""Largest number of calibration texts in a batch."""


@dataclass(frozen=True)
class Examples:
    """Examples of one data split."""

    samples: Sequence[Any]
    join: Callable[[Sequence[Any]], Batch]
    questions: Sequence[SpanQuestion] = ()
    """Questions that the samples are windows of, if the task has questions."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Counts of how the source's rows were used, if known; see :class:`~raycloud.data.sources.Parts`."""

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sample."""
        return [len(sample.ids) for sample in self.samples]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Batch of the samples at these indices, padded on the right."""
        return self.join([self.samples[index] for index in indices])

    def largest(self, together: int) -> int:
        """Number of tokens of the largest batch of ``together`` samples made by :meth:`in_length_order`."""
        lengths = sorted(self.lengths)
        return max(sum(lengths[at : at + together]) for at in range(0, len(lengths), together))

    def in_length_order(self, together: int) -> Iterator[tuple[list[Any], Batch]]:
        """Yield all samples by length, ``together`` at a time, for evaluation: the samples and their batch."""
        order = np.argsort(self.lengths, kind="stable").tolist()
        for at in range(0, len(order), together):
            indices = order[at : at + together]
            yield [self.samples[index] for index in indices], self.batch(indices)


@dataclass(frozen=True)
class BatchSchedule:
    """Schedule of the texts of each step: a function of the step alone.

    Args:
        examples: examples for training.
        order: order of the samples in micro-batches.
        accumulate: number of micro-batches of a step.
    """

    examples: Examples
    order: SampleOrder
    accumulate: int

    def batches(self, step: int) -> list[Batch]:
        """Micro-batches of a step."""
        return [replace(self.examples.batch(indices), sample_indices=tuple(indices)) for indices in self._indices(step)]

    def lengths(self, step: int) -> list[list[int]]:
        """Token counts of the texts of a step, by micro-batch."""
        return [[int(self.order.lengths[index]) for index in indices] for indices in self._indices(step)]

    def largest(self, steps: int) -> int:
        """Number of tokens of the largest micro-batch of the first ``steps`` steps."""
        return max(sum(lengths) for step in range(steps) for lengths in self.lengths(step))

    def samples(self, step: int) -> int:
        """Number of texts of a step."""
        return sum(map(len, self._indices(step)))

    def _indices(self, step: int) -> list[list[int]]:
        return [self.order.indices(step * self.accumulate + micro) for micro in range(self.accumulate)]


def calibration_batches(examples: Examples, texts: int = 64, *, most: int = CALIBRATION_TEXTS) -> list[Batch]:
    """Calibration texts: ``texts`` of the examples, evenly spread, in batches of at most ``most``."""
    indices, size = evenly_spread_indices(len(examples.samples), texts), min(most, CALIBRATION_TEXTS)
    return [examples.batch(indices[at : at + size]) for at in range(0, len(indices), size)]


def max_batch_tokens(schedule: BatchSchedule, steps: int, held_out: Examples, recipe: SplitTuneRecipe) -> int:
    """Number of tokens of the largest batch of a run, in training or evaluation."""
    return max(schedule.largest(steps), held_out.largest(_evaluation_batch_size(recipe)))


def _evaluation_batch_size(recipe: SplitTuneRecipe) -> int:
    return min(_BATCH, recipe.training.batch_size)


def batch_schedule(examples: Examples, recipe: SplitTuneRecipe) -> BatchSchedule:
    """Batch schedule of a recipe."""
    order = SampleOrder(examples.lengths, recipe.training.batch_size, recipe.seed)
    return BatchSchedule(examples, order, recipe.training.gradient_accumulation_steps)


def bos_of(recipe: SplitTuneRecipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """Description, for people, of whether the texts of a recipe begin with BOS and why; needs no data.

    Raises:
        ModelError: the tokenizer cannot begin or end texts as the recipe asks.
    """
    if isinstance(recipe.task, LanguageRecipe):
        return bounds_of(tokenizer, recipe.task.format, recipe.data.bos).bos
    return TextBounds.of(tokenizer).bos


def load_examples(
    recipe: SplitTuneRecipe, tokenizer: PreTrainedTokenizerBase, notify: Callable[[str], None]
) -> tuple[Examples, Examples, int]:
    """Load training and held-out examples, and the number of classes (0 if there are none).

    Raises:
        DataError: the data cannot be read, or lacks columns that the task names.
        ModelError: the tokenizer has no end-of-text token and the task needs one.
    """
    data, task = recipe.data, recipe.task
    if isinstance(task, LanguageRecipe):
        check_eos("model", recipe.model, tokenizer)
    pad = int(tokenizer.pad_token_id)

    parts = load_split_rows(data, data.held_out_split, notify)

    def chosen(rows: list[Row], most: int | None) -> list[Row]:
        found = select(rows, data.where)
        if isinstance(task, ClassificationRecipe) and task.classes is not None:
            for row in found:
                class_in(row, task.label)  # a row without a class is an error, not a row of another class
            found = select(found, {task.label: task.classes})
        return limit_rows(found, most)

    parts = parts.trained(chosen(parts.train, data.limit))
    notify(parts.message(data))
    train, held_out = parts.train, chosen(parts.held_out, data.held_out_samples)
    if isinstance(task, LanguageRecipe):
        spoken = [
            Examples(
                encode(
                    some,
                    tokenizer,
                    task.format,
                    max_length=data.max_length,
                    max_prompt_length=task.max_prompt_length,
                    bos=data.bos,
                ),
                lambda samples: collate(samples, pad),
            )
            for some in (train, held_out)
        ]
        return replace(spoken[0], rows=parts.counts), spoken[1], 0
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
        return replace(asked[0], rows=parts.counts), asked[1], 0
    classes: list[Any] | None = None
    match task:
        case ClassificationRecipe():
            classes = task.classes or classes_of(train, task.label)
        case RegressionRecipe():
            pass
        case _:
            assert_never(task)
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
    return replace(made[0], rows=parts.counts), made[1], len(classes or ())


@torch.no_grad()
def evaluate(
    predict: Callable[[Batch], Tensor],
    examples: Examples,
    recipe: SplitTuneRecipe,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> dict[str, float]:
    """Compute the task's metrics over all texts from the head's outputs; call ``on_progress`` with the number done.

    Raises:
        TrainingError: the outputs are not all finite.
    """

    def said() -> Iterator[tuple[list[Any], Batch, Tensor]]:
        done = 0
        for samples, batch in examples.in_length_order(_evaluation_batch_size(recipe)):
            on_progress(done := done + len(samples))
            outputs = predict(batch).float().cpu()
            if not bool(outputs.isfinite().all()):  # argmax over NaN would give a class like any other
                raise TrainingError("the head's outputs are not all finite; a smaller training.lr may help")
            yield samples, batch, outputs

    match recipe.task:
        case LanguageRecipe():
            return _language_metrics(said())
        case SpanRecipe() as task:
            return _span_metrics(said(), examples.questions, task.max_answer)
        case ClassificationRecipe() | RegressionRecipe() as task:
            return _label_metrics(said(), task.metrics)


Predictions = Iterator[tuple[list[Any], Batch, Tensor]]
"""Samples, their batch, and the head's outputs."""


def _language_metrics(said: Predictions) -> dict[str, float]:
    nll = []
    for _, batch, logits in said:
        labels = batch.labels[batch.labels != IGNORE]
        nll.append((logits.logsumexp(dim=-1) - logits.gather(-1, labels[:, None])[:, 0]).double())
    return {"perplexity": float(torch.cat(nll).mean().exp())}


def _label_metrics(said: Predictions, metrics: Sequence[Metric]) -> dict[str, float]:
    guesses, true = [], []
    for _, batch, outputs in said:
        guesses.append(outputs.argmax(dim=-1) if outputs.ndim == 2 else outputs)
        true.append(batch.labels)
    found, wanted = torch.cat(guesses).numpy(), torch.cat(true).numpy()
    return {name: METRICS[name](found, wanted) for name in metrics}


def _span_metrics(said: Predictions, questions: Sequence[SpanQuestion], most: int) -> dict[str, float]:
    """Metrics of the answers; each question's answer is that of its window with the highest score."""
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
            best_match(measure, answer, question.answers) for answer, question in zip(answers, questions, strict=True)
        )
        for name, measure in both.items()
    }
