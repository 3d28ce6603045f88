"""What a recipe's task learns from and is judged by: texts as tokens, their labels, and what became of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import IGNORE, Batch, SampleOrder, collate, encode
from raycloud.data.labelled import classes_of, collate_labelled, encode_labelled
from raycloud.data.sources import load_rows
from raycloud.data.splits import Row, Split, select, spread
from raycloud.evaluation.labels import METRICS
from raycloud.split.finetune.recipe import ClassificationRecipe, LanguageRecipe, SplitTuneRecipe

_BATCH = 32
_CALIBRATE = 256


@dataclass(frozen=True)
class Examples:
    """Texts of one split."""

    samples: Sequence[Any]
    join: Callable[[Sequence[Any]], Batch]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(sample.ids) for sample in self.samples]

    def batch(self, places: Sequence[int]) -> Batch:
        """Some of them, padded on the right."""
        return self.join([self.samples[place] for place in places])

    def in_length_order(self) -> list[Batch]:
        """All of them, for evaluation."""
        order = np.argsort(self.lengths, kind="stable")
        return [self.batch(order[at : at + _BATCH].tolist()) for at in range(0, len(order), _BATCH)]


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
        return [self.examples.batch(places) for places in self._places(step)]

    def lengths(self, step: int) -> list[list[int]]:
        """The tokens of each text, by micro-batch."""
        return [[int(self.order.lengths[place]) for place in places] for places in self._places(step)]

    def samples(self, step: int) -> int:
        """How many texts a step takes."""
        return sum(map(len, self._places(step)))

    def _places(self, step: int) -> list[list[int]]:
        return [self.order.indices(step * self.accumulate + micro) for micro in range(self.accumulate)]


def calibration(examples: Examples) -> list[Batch]:
    """Some of the texts in batches, spread over all of them."""
    places = range(len(examples.samples))
    return [examples.batch(places[at::_CALIBRATE]) for at in range(min(8, len(places)))]


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

    def rows(split: Split, most: int | None) -> list[Row]:
        found = select(load_rows(data.source, split, notify), data.where)
        if isinstance(task, ClassificationRecipe) and task.classes is not None:
            found = select(found, {task.label: task.classes})
        return [found[place] for place in spread(len(found), most)]

    train, held_out = rows("train", data.limit), rows("test", data.held_out)
    if isinstance(task, LanguageRecipe):
        spoken = [
            Examples(
                encode(some, tokenizer, task.format, max_length=data.max_length, max_prompt=task.max_prompt),
                lambda samples: collate(samples, pad),
            )
            for some in (train, held_out)
        ]
        return spoken[0], spoken[1], 0
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
    spoken, labelled, done = list[Tensor](), list[Tensor](), 0
    for batch in examples.in_length_order():
        told(done := done + len(batch.ids))
        said, labels = predict(batch).float().cpu(), batch.labels
        if isinstance(recipe.task, LanguageRecipe):
            nll = said.logsumexp(dim=-1) - said.gather(-1, labels[labels != IGNORE][:, None])[:, 0]
            spoken.append(nll.double())
        else:
            spoken.append(said.argmax(dim=-1) if said.ndim == 2 else said)
            labelled.append(labels)
    if isinstance(recipe.task, LanguageRecipe):
        return {"perplexity": math.exp(float(torch.cat(spoken).mean()))}
    found, true = torch.cat(spoken).numpy(), torch.cat(labelled).numpy()
    return {name: METRICS[name](found, true) for name in recipe.task.metrics}
