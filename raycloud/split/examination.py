"""Examining a split plan: perplexity through the codec at both cuts, bytes and time of a token, edge memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import IGNORE, Batch, Sample, in_length_order
from raycloud.errors import DataError
from raycloud.evaluation.language import Judgement, judge_rows
from raycloud.link.codecs import CODECS
from raycloud.models.loading import Device, DType, load_tokenizer
from raycloud.models.weights import fingerprint, weights_of
from raycloud.report.console import console
from raycloud.results import Mode, ResultDir
from raycloud.split.calibration import TOKENS
from raycloud.split.calibration_folder import calibration_of
from raycloud.split.crossing import crossed
from raycloud.split.parts import CloudPart, EdgePart, Whole, edge_bytes, load_whole
from raycloud.split.passages import passages
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.recipe import SplitPlanRecipe
from raycloud.split.session import AROUND, measure, measure_unsplit
from raycloud.split.terms import Codecs

_BATCH = 16

Report = Callable[[int, dict[str, Any]], None]
"""Told the held-out tokens so far, and the numbers over them."""


@dataclass(frozen=True)
class _Subject:
    """A model with its tokenizer, and what is the same for all of its plans: computed once in a process."""

    whole: Whole
    tokenizer: PreTrainedTokenizerBase
    sources: tuple[str, ...]
    tokens: int

    @property
    def device(self) -> torch.device:
        return self.whole.model.device

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(weights_of(self.whole.model))

    @cached_property
    def texts(self) -> list[Sample]:
        """Held-out texts, those of all sources mixed."""
        found = passages(self.sources, "test", self.tokenizer, self.tokens, console.print)
        random.Random(0).shuffle(found)
        return found

    @cached_property
    def unsplit(self) -> dict[str, float]:
        """What the model does if it is whole at the edge."""
        blocks = self.whole.blocks
        edge = self.whole.edge(PlanSet.of(SplitPlan(blocks, blocks)))
        batches = self.batches(self.texts)
        return {
            "unsplit_perplexity": judge_rows(edge.last, _final_rows(edge, None, None, batches)).perplexity,
            "unsplit_ms_per_token": measure_unsplit(edge, _continued(self.texts, 16, 0)),
            "unsplit_edge_mb": _edge_mb(self.whole, edge.plans),
            "unsplit_bytes_per_token": 0.0,
        }

    def batches(self, texts: Sequence[Sample]) -> list[Batch]:
        return [batch.to(self.device) for batch in in_length_order(texts, _BATCH, pad=0)]

    def codecs(self, recipe: SplitPlanRecipe) -> Codecs:
        width = int(self.whole.model.config.hidden_size)
        if recipe.codec in CODECS:
            return Codecs(width)

        def texts() -> list[Sample]:
            return passages(self.sources, "train", self.tokenizer, TOKENS, console.print)

        folder = Path(recipe.calibration).expanduser() if recipe.calibration else None
        return Codecs(width, calibration_of(self.whole.model, self.fingerprint, recipe.plans.cuts, texts, folder))


@lru_cache(maxsize=1)
def _subject(model: str, device: Device, dtype: DType, sources: tuple[str, ...], tokens: int) -> _Subject:
    whole = load_whole(model, device=device, dtype=dtype, notify=console.print)
    return _Subject(whole, load_tokenizer(whole.source), sources, tokens)


def run(recipe: SplitPlanRecipe, mode: Mode = "new", report: Report = lambda tokens, numbers: None) -> dict[str, Any]:
    """Examine one plan and leave ``recipe.yaml``, ``metrics.jsonl`` and ``summary.json`` behind.

    A process that examines one plan after the other loads the model once.

    Args:
        recipe: what to examine.
        mode: ``new``, ``resume`` (it begins anew: it is a matter of seconds) or ``overwrite``.
        report: told perplexity at the recipe's rungs; it may end the examination by raising.

    Returns:
        ``perplexity``, ``bytes_per_token``, ``ms_per_token``, ``edge_ms_per_token`` and ``edge_mb`` (1e6 bytes of
        weights), the same of the unsplit model, and what they were measured with.

    Raises:
        RaycloudError: whatever the user can mend.
    """
    with ResultDir.open(recipe.output, recipe, mode) as results:
        summary = _examined(recipe, results, report)
        results.write_summary(summary)
    return summary


@torch.inference_mode()
def _examined(recipe: SplitPlanRecipe, results: ResultDir, report: Report) -> dict[str, Any]:
    subject = _subject(recipe.model, recipe.device, recipe.dtype, tuple(recipe.data), recipe.tokens)
    edge, cloud = subject.whole.edge(recipe.plans), subject.whole.cloud(recipe.plans)
    codecs = subject.codecs(recipe)
    # A text for the time first: what is wrong with the data shows before minutes are spent.
    ids = _continued(subject.texts, recipe.new_tokens, recipe.seed)
    results.keep_metrics(lambda record: False)
    judged, parts = 0, list[Judgement]()
    steps = (*recipe.rungs, recipe.tokens)
    for step, portion in zip(steps, portions(subject.texts, steps), strict=True):
        batches = subject.batches(portion)
        if batches:
            parts.append(judge_rows(edge.last, _final_rows(edge, cloud, (codecs, recipe), batches)))
        judged += sum(len(text.ids) for text in portion)
        perplexity = Judgement.join(parts).perplexity
        results.log({"tokens": judged, "perplexity": perplexity})
        if step != recipe.tokens:
            report(step, {"perplexity": perplexity})
    pace = measure(edge, cloud, codecs, recipe.codec, recipe.network.network(), ids)
    return {
        "perplexity": perplexity,
        "bytes_per_token": pace.bytes_per_token,
        "ms_per_token": pace.ms_per_token,
        "edge_ms_per_token": pace.edge_ms_per_token,
        "edge_mb": _edge_mb(subject.whole, recipe.plans),
        **subject.unsplit,
        "tokens": judged,
        "threads": torch.get_num_threads(),
        "device": str(subject.device),
    }


def portions(texts: Sequence[Sample], steps: Sequence[int]) -> Iterator[list[Sample]]:
    """The texts that are new at each of ascending numbers of tokens: whole ones until there are enough, at last all."""
    left, so_far = iter(texts), 0
    for step in steps[:-1]:
        portion = []
        while so_far < step and (text := next(left, None)) is not None:
            portion.append(text)
            so_far += len(text.ids)
        yield portion
    yield list(left)


def _final_rows(
    edge: EdgePart, cloud: CloudPart | None, link: tuple[Codecs, SplitPlanRecipe] | None, batches: Sequence[Batch]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows (n, d) entering the head at labelled positions, and their labels (n,), batch by batch.

    What crosses a cut is coded and decoded on its way; without a cloud nothing crosses.
    """
    for batch in batches:
        rows = edge.first.rows(batch.ids, valid=batch.valid)
        if cloud is not None and link is not None:
            codecs, recipe = link
            up, down = (codecs.boundary(recipe.codec, cut) for cut in (recipe.first, recipe.second))
            rows = cloud.middle.rows(crossed(up, rows, batch.valid).rows, valid=batch.valid)
            rows = crossed(down, rows, batch.valid).rows
        wanted = batch.labels != IGNORE
        yield edge.last.rows(rows, valid=batch.valid)[wanted], batch.labels[wanted]


def _continued(texts: Sequence[Sample], new_tokens: int, seed: int) -> list[int]:
    """Neighbouring held-out tokens, as many as a session needs, from a place that the seed draws."""
    ids = list(chain.from_iterable(text.ids for text in texts))
    needed = AROUND + new_tokens
    if len(ids) < needed:
        raise DataError(f"there are {len(ids)} held-out tokens; new_tokens={new_tokens} needs {needed}")
    start = random.Random(seed).randrange(len(ids) - needed + 1)
    return ids[start : start + needed]


def _edge_mb(whole: Whole, plans: PlanSet) -> float:
    return edge_bytes(whole.model.config, plans, whole.model.dtype) / 1e6
