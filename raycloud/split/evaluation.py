"""Evaluation of a split plan: perplexity with the codec at both cuts, bytes and time of a token, edge memory."""

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

from raycloud.data.batches import IGNORE, Batch, Sample, length_sorted_batches
from raycloud.data.sources import load_rows
from raycloud.errors import DataError, ModelError
from raycloud.evaluation.perplexity import TokenPredictions, predict_from_hidden
from raycloud.link.codecs.floats import CODECS
from raycloud.models.devices import Device, DType
from raycloud.models.loading import check_model, load_tokenizer, resolve
from raycloud.models.threads import torch_threads
from raycloud.models.verdict import structure_of
from raycloud.models.weights import fingerprint, weights_of
from raycloud.origin import cores
from raycloud.report.console import console
from raycloud.results import Mode, ResultDir
from raycloud.split.calibration import CALIBRATION_TOKENS
from raycloud.split.calibration_folder import calibration_for
from raycloud.split.calibration_texts import load_calibration_texts
from raycloud.split.codec_round_trip import codec_round_trip
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.timing import UNTIMED_TOKENS, measure_split, measure_unsplit
from raycloud.split.parts import CloudPart, EdgePart, SplittableModel, edge_bytes, load_splittable
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.recipe import SplitEvaluateRecipe

_BATCH = 16

OnProgress = Callable[[int, dict[str, Any]], None]
"""Callback with the number of held-out tokens so far and the metrics over them."""


@dataclass(frozen=True)
class _ModelUnderTest:
    """Model under evaluation with its tokenizer and the values common to all its plans, computed once."""

    whole: SplittableModel
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
        """Held-out texts of all sources, shuffled."""
        found = load_calibration_texts(self.sources, "test", self.tokenizer, self.tokens, console.print)
        random.Random(0).shuffle(found)
        return found

    @cached_property
    def unsplit(self) -> dict[str, float]:
        """Metrics of the unsplit model, which is whole at the edge."""
        blocks = self.whole.blocks
        edge = self.whole.edge(PlanSet.of(SplitPlan(blocks, blocks)))
        batches = self.batches(self.texts)
        return {
            "unsplit_perplexity": predict_from_hidden(edge.last, _final_hidden(edge, None, None, batches)).perplexity,
            "unsplit_ms_per_token": measure_unsplit(edge, _session_tokens(self.texts, 16, 0)),
            "unsplit_edge_mb": _edge_mb(self.whole, edge.plans),
            "unsplit_bytes_per_token": 0.0,
        }

    def batches(self, texts: Sequence[Sample]) -> list[Batch]:
        return [batch.to(self.device) for batch in length_sorted_batches(texts, _BATCH, pad=0)]

    def codecs(self, recipe: SplitEvaluateRecipe) -> CutCodecs:
        width = int(self.whole.model.config.hidden_size)
        if recipe.codec in CODECS:
            return CutCodecs(width)

        def texts() -> list[Sample]:
            return load_calibration_texts(self.sources, "train", self.tokenizer, CALIBRATION_TOKENS, console.print)

        folder = Path(recipe.calibration).expanduser() if recipe.calibration else None
        return CutCodecs(width, calibration_for(self.whole.model, self.fingerprint, recipe.plans.cuts, texts, folder))


@lru_cache(maxsize=1)
def _subject(model: str, device: Device, dtype: DType, sources: tuple[str, ...], tokens: int) -> _ModelUnderTest:
    whole = load_splittable(model, device=device, dtype=dtype, notify=console.print)
    return _ModelUnderTest(whole, load_tokenizer(whole.source), sources, tokens)


def check(recipe: SplitEvaluateRecipe) -> None:
    """Check a recipe against file headers and rows of data, before a model is loaded.

    Raises:
        RaycloudError: the recipe cannot be run.
    """
    where = resolve(recipe.model, console.print)
    config = check_model(where)
    if not structure_of(config).causal:
        raise ModelError(f"model '{recipe.model}' is an encoder; allowed: causal language models")
    load_tokenizer(where)
    recipe.plans.check(config.num_hidden_layers)
    for source in recipe.data:
        for split in ("train", "test"):
            load_rows(source, split, console.print)


def run(
    recipe: SplitEvaluateRecipe, mode: Mode = "new", report: OnProgress = lambda tokens, numbers: None
) -> dict[str, Any]:
    """Evaluate one plan and write ``recipe.yaml``, ``metrics.jsonl`` and ``summary.json``.

    A process that evaluates several plans loads the model once.

    Args:
        recipe: recipe of the evaluation.
        mode: ``new``, ``resume`` (which starts again, as a run takes seconds) or ``overwrite``.
        report: called with the perplexity at the recipe's rungs; it may end the evaluation by raising.

    Returns:
        ``perplexity``, ``bytes_per_token``, ``ms_per_token``, ``edge_ms_per_token`` and ``edge_mb`` (1e6 bytes of
        weights), the same of the unsplit model, and the tokens, threads and device of the measurement.

    Raises:
        RaycloudError: an error that the user can fix.
    """
    with torch_threads(recipe.threads or cores()), ResultDir.open(recipe.output, recipe, mode) as results:
        summary = _evaluate(recipe, results, report)
        results.write_summary(summary)
    return summary


@torch.inference_mode()
def _evaluate(recipe: SplitEvaluateRecipe, results: ResultDir, report: OnProgress) -> dict[str, Any]:
    subject = _subject(recipe.model, recipe.device, recipe.dtype, tuple(recipe.data), recipe.tokens)
    edge, cloud = subject.whole.edge(recipe.plans), subject.whole.cloud(recipe.plans)
    codecs = subject.codecs(recipe)
    # The text for the timing first: errors in the data show before minutes are spent.
    ids = _session_tokens(subject.texts, recipe.new_tokens, recipe.seed)
    results.filter_metrics(lambda record: False)
    num_tokens, parts = 0, list[TokenPredictions]()
    steps = (*recipe.rungs, recipe.tokens)
    for step, portion in zip(steps, texts_by_budget(subject.texts, steps), strict=True):
        batches = subject.batches(portion)
        if batches:
            parts.append(predict_from_hidden(edge.last, _final_hidden(edge, cloud, (codecs, recipe), batches)))
        num_tokens += sum(len(text.ids) for text in portion)
        perplexity = TokenPredictions.join(parts).perplexity
        results.log_metrics({"tokens": num_tokens, "perplexity": perplexity})
        if step != recipe.tokens:
            report(step, {"perplexity": perplexity})
    pace = measure_split(edge, cloud, codecs, recipe.codec, recipe.network.network(), ids)
    return {
        "perplexity": perplexity,
        "bytes_per_token": pace.bytes_per_token,
        "ms_per_token": pace.ms_per_token,
        "edge_ms_per_token": pace.edge_ms_per_token,
        "edge_mb": _edge_mb(subject.whole, recipe.plans),
        **subject.unsplit,
        "tokens": num_tokens,
        "threads": torch.get_num_threads(),
        "device": str(subject.device),
    }


def texts_by_budget(texts: Sequence[Sample], steps: Sequence[int]) -> Iterator[list[Sample]]:
    """Yield the additional texts for each of ascending token budgets: whole texts up to the budget, finally all."""
    left, so_far = iter(texts), 0
    for step in steps[:-1]:
        portion = []
        while so_far < step and (text := next(left, None)) is not None:
            portion.append(text)
            so_far += len(text.ids)
        yield portion
    yield list(left)


def _final_hidden(
    edge: EdgePart,
    cloud: CloudPart | None,
    link: tuple[CutCodecs, SplitEvaluateRecipe] | None,
    batches: Sequence[Batch],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each batch the hidden states (n, d) entering the head at labelled positions, and their labels (n,).

    Hidden states are encoded and decoded at each cut; without a cloud there are no cuts.
    """
    for batch in batches:
        hidden = edge.first.hidden(batch.ids, valid=batch.valid)
        if cloud is not None and link is not None:
            codecs, recipe = link
            uplink, downlink = (codecs.cut_codec(recipe.codec, cut) for cut in (recipe.start_block, recipe.end_block))
            hidden = cloud.middle.hidden(codec_round_trip(uplink, hidden, batch.valid).hidden, valid=batch.valid)
            hidden = codec_round_trip(downlink, hidden, batch.valid).hidden
        wanted = batch.labels != IGNORE
        yield edge.last.hidden(hidden, valid=batch.valid)[wanted], batch.labels[wanted]


def _session_tokens(texts: Sequence[Sample], new_tokens: int, seed: int) -> list[int]:
    """Consecutive held-out tokens, as many as a session needs, from a random start given by the seed."""
    ids = list(chain.from_iterable(text.ids for text in texts))
    needed = UNTIMED_TOKENS + new_tokens
    if len(ids) < needed:
        raise DataError(f"there are {len(ids)} held-out tokens; new_tokens={new_tokens} needs {needed}")
    start = random.Random(seed).randrange(len(ids) - needed + 1)
    return ids[start : start + needed]


def _edge_mb(whole: SplittableModel, plans: PlanSet) -> float:
    return edge_bytes(whole.model.config, plans, whole.model.dtype) / 1e6
