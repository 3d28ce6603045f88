"""Drift of a running model's inputs, from its hidden states: distance to the source at each tap, and signatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.block_trace import without_cache
from raycloud.models.chain import block_list_of
from raycloud.retrain.samples import Samples

_LEAST_VARIANCE = 1e-12
TapMeans = Sequence[Tensor]
"""Mean over the tokens of the hidden states of n samples, (n, d) at each tap: the stem and behind each block."""


@dataclass(frozen=True)
class TapStatistics:
    """Means and variances of a model's hidden states over source samples, at the stem and behind each block."""

    mean: tuple[Tensor, ...]
    """(d,) of each tap; stages of a model may differ in d."""
    variance: tuple[Tensor, ...]

    @staticmethod
    def of(taps: TapMeans) -> TapStatistics:
        """Statistics of n ≥ 2 samples."""
        return TapStatistics(
            tuple(one.mean(0) for one in taps), tuple(one.var(0).clamp_min(_LEAST_VARIANCE) for one in taps)
        )


def drift_distances(taps: TapMeans, source: TapStatistics) -> Tensor:
    """Distance of a window of samples from the source at each tap, (taps,).

    mean_k [((z̄_k − μ_k) / σ_k)² − v_k / (σ_k² W)] + (mean_k log(v_k / σ_k²))², with the window's mean z̄ and variance
    v over its W samples. The second term of the mean removes its bias, which is 1 / W: without drift the expectation of
    the mean is 0 whatever W is.

    Args:
        taps: mean hidden states of the window's W ≥ 2 samples.
        source: statistics of the source.
    """
    count = len(taps[0])
    if count < 2:
        raise ValueError(f"a window has {count} samples; allowed: 2 or more")
    found = []
    for values, mean, variance in zip(taps, source.mean, source.variance, strict=True):
        ours = values.var(0).clamp_min(_LEAST_VARIANCE)
        shift = (values.mean(0) - mean).square() / variance - ours / (variance * count)
        found.append(shift.mean() + (ours / variance).log().mean().square())
    return torch.stack(found)


@dataclass(frozen=True)
class DomainSignature:
    """Signature of a domain, by which it is recognised when it comes back."""

    distances: Tensor
    """Distances from the source, (taps,)."""
    means: tuple[Tensor, ...] | None = None
    """Mean hidden states behind each block, (d,) each; None if the edge does not share them."""

    def distance(self, other: DomainSignature, source: TapStatistics) -> float:
        """Distance of two signatures: relative, of the distances; with means also of these in standard deviations."""
        scale = torch.maximum(self.distances.abs(), other.distances.abs()).clamp_min(1.0)
        found = float(((self.distances - other.distances) / scale).square().mean().sqrt())
        if self.means is None or other.means is None:
            return found
        apart = [
            ((ours - theirs).square() / variance).mean()
            for ours, theirs, variance in zip(self.means, other.means, source.variance[1:], strict=True)
        ]
        return found + float(torch.stack(apart).mean().sqrt())


@dataclass(frozen=True)
class DriftVerdict:
    """Result of a window."""

    score: float
    drifted: bool
    """True if the score is above the threshold."""
    distances: Tensor


@dataclass(frozen=True)
class DriftDetector:
    """Detector of drift.

    The score of a window is the largest of its distances over the taps, each in standard deviations of clean windows: a
    drift that shows at one depth of the model is not averaged away. It has no memory; see
    :class:`~raycloud.retrain.alarms.DriftAlarm`.
    """

    source: TapStatistics
    centre: Tensor
    """Mean distance of clean windows at each tap, (taps,)."""
    spread: Tensor
    """Standard deviation of it, (taps,)."""
    threshold: float

    @staticmethod
    def calibrated(
        clean: TapMeans, window: int, *, quantile: float = 0.99, draws: int = 800, seed: int = 0
    ) -> DriftDetector:
        """Detector whose threshold is a quantile of the scores of clean windows.

        Each draw takes a window out of the clean samples, and measures its distance from the statistics of the others:
        its score then varies as that of new windows does, with the error of the statistics.

        Args:
            clean: mean hidden states of source samples. They should not be training data of the model, which its
                hidden states tell from new data.
            window: number of samples of a window.
            quantile: share of clean windows below the threshold.
            draws: number of windows drawn.
            seed: seed of the draws.

        Raises:
            ModelError: there are fewer clean samples than two windows have, or a value is not finite.
        """
        if len(clean[0]) < 2 * window:
            raise ModelError(f"{len(clean[0])} clean samples are given; allowed: at least two windows of {window}")
        source, generator = TapStatistics.of(clean), torch.Generator().manual_seed(seed)
        distances = torch.stack([_left_out(clean, window, generator) for _ in range(draws)])
        centre, spread = distances.mean(0), distances.std(0).clamp_min(_LEAST_VARIANCE)
        threshold = float(((distances - centre) / spread).max(1).values.quantile(quantile))
        if not math.isfinite(threshold):
            raise ModelError("the hidden states of the source are not all finite")
        return DriftDetector(source, centre, spread, threshold)

    def judge(self, taps: TapMeans) -> DriftVerdict:
        """Score a window of samples.

        Raises:
            ModelError: a hidden state is not finite.
        """
        distances = drift_distances(taps, self.source)
        score = float(((distances - self.centre) / self.spread).max())
        if not math.isfinite(score):
            raise ModelError("the hidden states of a window are not all finite")
        return DriftVerdict(score, score > self.threshold, distances)


def _left_out(clean: TapMeans, window: int, generator: torch.Generator) -> Tensor:
    """Distances of a random window from the statistics of the other samples."""
    order = torch.randperm(len(clean[0]), generator=generator).to(clean[0].device)
    others = TapStatistics.of([one[order[window:]] for one in clean])
    return drift_distances([one[order[:window]] for one in clean], others)


class Taps:
    """Collector of the mean hidden states of each sample at the stem and behind each block."""

    def __init__(self, total: int) -> None:
        self._found: list[list[Tensor]] = [[] for _ in range(total)]

    def add(self, tap: int, hidden: Tensor, valid: Tensor | None) -> None:
        """Add hidden states (B, T, d) of one tap; positions that are not valid (B, T) do not count."""
        hidden = hidden.detach().float()
        if valid is None or valid.shape != hidden.shape[:2]:
            mean = hidden.flatten(1, -2).mean(1)
        else:
            weight = valid.to(hidden).unsqueeze(-1)
            mean = (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
        self._found[tap].append(mean.cpu())

    def take(self) -> list[Tensor]:
        """Return the means at each tap, each (n, d of the tap), and forget them."""
        found = [torch.cat(one) for one in self._found]
        self._found = [[] for _ in self._found]
        return found


@contextmanager
def tapped(blocks: Mapping[str, nn.Module], valid: Sequence[Tensor | None] = (None,)) -> Iterator[Taps]:
    """Context in which the forwards of a model feed a collector; it keeps means, and no hidden state of a token.

    Args:
        blocks: blocks of the model, in order.
        valid: one element, the mask (B, T) of the current forward, which the caller may replace.
    """
    taps = Taps(len(blocks) + 1)

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taps.add(0, args[0] if args else kwargs["hidden_states"], valid[0])

    def behind(number: int) -> Any:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            taps.add(number, output[0] if isinstance(output, tuple) else output, valid[0])

        return hook

    with ExitStack() as stack:
        modules = list(blocks.values())
        stack.callback(modules[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for number, block in enumerate(modules):
            stack.callback(block.register_forward_hook(behind(number + 1)).remove)
        yield taps


def tap_means(
    model: PreTrainedModel,
    samples: Samples,
    batch_size: int = 32,
    on_logits: Callable[[Tensor, Tensor], None] = lambda logits, labels: None,
) -> TapMeans:
    """Serve samples, and return their mean hidden states at the stem and behind each block, (n, d) each.

    Args:
        model: the model.
        samples: samples; positions that their ``attention_mask`` leaves out do not count.
        batch_size: number of samples of a forward.
        on_logits: called with logits and labels of each batch.
    """
    valid: list[Tensor | None] = [None]
    arguments = without_cache(model)
    with torch.no_grad(), tapped(block_list_of(model).blocks, valid) as taps:
        for batch in samples.batches(batch_size):
            mask = batch.inputs.get("attention_mask")
            valid[0] = None if mask is None else mask.bool()
            on_logits(model(**batch.inputs, **arguments).logits, batch.labels)
    return taps.take()
