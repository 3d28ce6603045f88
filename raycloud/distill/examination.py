"""A student beside its teacher: perplexity and agreement on held-out text, completions, tokens per second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from raycloud.data.batches import Sample, in_length_order
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
    """Judges students on held-out samples by group; the teacher is judged once.

    Args:
        teacher: model and tokenizer.
        held_out: samples by group name.
    """

    def __init__(self, teacher: Pretrained, held_out: Mapping[str, Sequence[Sample]]) -> None:
        self._teacher, self._tokenizer = Segment(teacher.model), teacher.tokenizer
        self._device = teacher.model.device
        pad = teacher.tokenizer.pad_token_id
        self._batches = {
            group: [batch.to(self._device) for batch in in_length_order(samples, _BATCH, pad)]
            for group, samples in held_out.items()
        }
        self._reference = self._judge(self._teacher)

    def _judge(self, model: Segment) -> dict[str, Judgement]:
        judged = {group: judge(model, batches) for group, batches in self._batches.items()}
        return {ALL: Judgement.join(judged.values()), **judged}

    def teacher(self) -> dict[str, Score]:
        """The teacher's scores by group and over all text."""
        return self._scores(self._reference)

    def student(self, model: PreTrainedModel) -> dict[str, Score]:
        """A student's scores by group and over all text."""
        return self._scores(self._judge(Segment(model)))

    def _scores(self, judged: Mapping[str, Judgement]) -> dict[str, Score]:
        return {
            group: Score(one.perplexity, one.agreement(self._reference[group]), len(one.nll))
            for group, one in judged.items()
        }

    def compare(self, model: PreTrainedModel, prompts: Sequence[str], new_tokens: int) -> Comparison:
        """Complete prompts with both models, one prompt at a time; tokens/s are medians over interleaved pairs."""
        ids = [self._tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        both = {"teacher": self._teacher, "student": Segment(model)}
        texts: dict[str, list[str]] = {name: [] for name in both}
        speeds: dict[str, list[float]] = {name: [] for name in both}
        rounds = -(-_PAIRS // len(ids))
        for repeat in range(rounds):
            for prompt in ids:
                for name, segment in both.items():
                    start = time.perf_counter()
                    made = greedy(segment, [prompt], new_tokens)[0]
                    speeds[name].append(len(made) / (time.perf_counter() - start))
                    if repeat == 0:
                        texts[name].append(str(self._tokenizer.decode(made, skip_special_tokens=True)))
        median = {name: statistics.median(values) for name, values in speeds.items()}
        return Comparison(list(prompts), texts["teacher"], texts["student"], median["teacher"], median["student"])


def gap_closed(before: float, after: float, teacher: float) -> float | None:
    """(ln before − ln after) / (ln before − ln teacher) of perplexities: 0 for nothing learnt, 1 for all of it.

    None where there was no gap, as for a student with all of the teacher's blocks.
    """
    gap = math.log(before) - math.log(teacher)
    return (math.log(before) - math.log(after)) / gap if abs(gap) > 1e-6 else None
