"""Attack on reports of drift: which of some words were in the texts of a window, from what its edge sent.

Reports of windows are simulated from the hidden states of single texts, with and without a word planted in them, so a
text runs once however many windows it is in.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raycloud.data.sources import load_rows
from raycloud.data.splits import Row
from raycloud.errors import DataError
from raycloud.evaluation.privacy.evaluation import ProgressContext
from raycloud.evaluation.privacy.word_presence import presence_area, word_directions
from raycloud.retrain.drift import TapMeans, TapStatistics, drift_distances, tap_means
from raycloud.retrain.recipe import LEAST_OF_MEANS
from raycloud.retrain.samples import Samples

WORDS = ("chemotherapy", "bankruptcy", "Bergström", "password", "great", "money")
"""Words to plant: rare ones, a name, and common ones."""
COUNTS = (1, 8)
"""Numbers of texts of a window that have the word."""
WINDOWS = 400
"""Number of windows on which an attack is fitted, and as many that it is tried on."""

_LENGTH = 48
"""Largest number of tokens of a text."""
_VARIANTS = 32
"""Number of texts that a word is planted in."""


@dataclass(frozen=True)
class WordAreas:
    """Areas under the curve of one word; 0.5 is guessing."""

    distances: float
    """From the distances of a report."""
    means: float
    """From the mean hidden states behind each block as well, as with ``statistics=means``."""
    chance: float
    """From both, by an attack whose own windows were labelled at random."""


@dataclass(frozen=True)
class ReportPrivacy:
    """Areas by number of texts of a window that have the word, and by word."""

    window: int
    """Number of texts of a window."""
    areas: dict[int, dict[str, WordAreas]]

    def mean(self, count: int, name: str) -> float:
        """Mean over the words."""
        found = [getattr(one, name) for one in self.areas[count].values()]
        return sum(found) / len(found)

    def summary(self) -> dict[str, Any]:
        """All results as one JSON object."""
        areas = {str(count): {word: asdict(one) for word, one in words.items()} for count, words in self.areas.items()}
        names = ("distances", "means", "chance")
        means = {str(count): {name: self.mean(count, name) for name in names} for count in self.areas}
        return {"window": self.window, "areas": areas, "mean_areas": means}


@dataclass(frozen=True)
class TextSide:
    """Hidden states of the texts of one side, the attacker's or the edge's: (n, d) at each tap."""

    plain: TapMeans
    planted: tuple[TapMeans, ...]
    """Those of the first texts with each of the words in them."""

    def windows(
        self, source: TapStatistics, size: int, count: int, total: int, draw: random.Random
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Distances (total, taps), mean hidden states (total, d) at each tap, and which words windows have.

        Args:
            source: statistics of the source.
            size: number of texts of a window.
            count: number of them that have a word, if the window has it.
            total: number of windows.
            draw: random numbers.
        """
        texts, words = len(self.plain[0]), len(self.planted)
        distances, means, truth = [], [], torch.zeros(total, words, dtype=torch.bool)
        for number in range(total):
            chosen = torch.tensor(draw.sample(range(texts), size))
            window = [one[chosen] for one in self.plain]
            free = draw.sample(range(size), size)
            for word, planted in enumerate(self.planted):
                if draw.random() < 0.5:
                    continue
                truth[number, word] = True
                variants = torch.tensor(draw.choices(range(len(planted[0])), k=count))
                places = torch.tensor([free[word * count + at] for at in range(count)])
                for tap, one in enumerate(planted):
                    window[tap][places] = one[variants]
            distances.append(drift_distances(window, source))
            means.append([one.mean(0) for one in window])
        return torch.stack(distances), [torch.stack(one) for one in zip(*means, strict=True)], truth


def attacked(
    known: TextSide, seen: TextSide, source: TapStatistics, words: Sequence[str], *, window: int, count: int, seed: int
) -> dict[str, WordAreas]:
    """Attack simulated reports, and return the areas under the curve of each word.

    Args:
        known: the attacker's texts.
        seen: those of the edge.
        source: statistics of the source.
        words: the words that are planted.
        window: number of texts of a window.
        count: number of texts of a window that have a word.
        seed: seed of the windows.
    """
    if count * len(words) > window:
        raise ValueError(f"{len(words)} words in {count} texts each do not fit into a window of {window}")
    draw = random.Random(seed)
    own, own_means, own_truth = known.windows(source, window, count, WINDOWS, draw)
    sent, sent_means, truth = seen.windows(source, window, count, WINDOWS, draw)
    mixed = own_truth[torch.randperm(WINDOWS, generator=torch.Generator().manual_seed(seed))]
    found = {}
    for number, word in enumerate(words):
        planted = known.planted[number]
        before = [one[: len(planted[0])] for one in known.plain]
        directions = word_directions(known.plain[1:], planted[1:], before[1:])  # nothing of the embedding is sent

        def features(distances: Tensor, means: list[Tensor], along: tuple[Tensor, ...] = directions) -> Tensor:
            shifts = [one @ direction for one, direction in zip(means[1:], along, strict=True)]
            return torch.cat([distances, torch.stack(shifts, 1)], 1)

        ours, theirs = features(own, own_means), features(sent, sent_means)
        found[word] = WordAreas(
            presence_area(own, own_truth[:, number], sent, truth[:, number]),
            presence_area(ours, own_truth[:, number], theirs, truth[:, number]),
            presence_area(ours, mixed[:, number], theirs, truth[:, number]),
        )
    return found


def evaluate_report_privacy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str = "builtin:reviews",
    texts: int = 128,
    words: Sequence[str] = WORDS,
    seed: int = 0,
    stage: ProgressContext = nullcontext,
) -> ReportPrivacy:
    """Attack reports of drift with and without means of hidden states.

    Texts that have one of the words themselves are left out. The attacker's are of the train split; the edge's and the
    source's are of the test and valid split.

    Args:
        model: a model for texts.
        tokenizer: its tokenizer.
        data: texts with the column ``text``.
        texts: number of texts of the attacker, and of the edge.
        words: words to plant.
        seed: seed of texts, places and windows.
        stage: called with the name of each stage.

    Raises:
        DataError: the data cannot be loaded or have too few texts.
    """
    if texts < 2 * LEAST_OF_MEANS:
        raise DataError(f"texts={texts}; allowed: {2 * LEAST_OF_MEANS} or more, two windows")
    draw = random.Random(seed)

    def side(split: str, planted: Sequence[str]) -> TextSide:
        chosen = _texts(load_rows(data, split), words, texts, draw, split)
        some = chosen[: min(_VARIANTS, texts)]
        variants = [[_planted(one, word, draw) for one in some] for word in planted]
        with stage(f"{len(chosen) + sum(map(len, variants))} texts of the {split} split run"):
            plain, *rest = [tap_means(model, _samples(tokenizer, some_texts)) for some_texts in (chosen, *variants)]
        return TextSide(plain, tuple(rest))

    source = TapStatistics.of(side("valid", ()).plain)
    known, seen = side("train", words), side("test", words)
    with stage("reports attacked"):
        areas = {
            count: attacked(known, seen, source, words, window=LEAST_OF_MEANS, count=count, seed=seed)
            for count in COUNTS
        }
    return ReportPrivacy(LEAST_OF_MEANS, areas)


def _texts(rows: Sequence[Row], words: Sequence[str], count: int, draw: random.Random, split: str) -> list[str]:
    """Random texts without the words."""
    pattern = re.compile("|".join(map(re.escape, words)), re.IGNORECASE)
    found = [text for row in rows if not pattern.search(text := str(row.get("text") or "")) and len(text.split()) > 2]
    if len(found) < count:
        raise DataError(f"texts={count}, and the {split} split has {len(found)} without the words; allowed: these")
    return draw.sample(found, count)


def _planted(text: str, word: str, draw: random.Random) -> str:
    """Text with a word at a random place."""
    parts = text.split()
    at = draw.randint(0, min(len(parts), _LENGTH // 4))
    return " ".join([*parts[:at], word, *parts[at:]])


def _samples(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Samples:
    coded = tokenizer(
        list(texts),
        truncation=True,
        max_length=_LENGTH,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    ids: Tensor = coded["input_ids"]
    return Samples({"input_ids": ids, "attention_mask": coded["attention_mask"]}, torch.zeros_like(ids))
