"""What the rows of a search say: spreads over seeds, and paired comparisons over the same texts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from raycloud.search.front import front
from raycloud.search.rows import Row, Scores
from raycloud.search.space import Metric, Space

_RESAMPLES = 4000


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; no deviation of a single value."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Paired:
    """How a variant differs from the baseline on the same texts: the mean of ours − theirs, where it lies, by chance?

    Args:
        difference: mean over the texts.
        low: lower end of the bootstrap's 95 % interval of that mean.
        high: its upper end.
        p: of Wilcoxon's signed-rank test, two-sided.
        texts: how many both have.
    """

    difference: float
    low: float
    high: float
    p: float
    texts: int


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of some values; None if there are none."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean_scores(runs: Sequence[Scores]) -> Scores:
    """The mean over runs of each text that all of them have."""
    if not runs:
        return {}
    common = set(runs[0]).intersection(*runs[1:])
    return {text: statistics.fmean(run[text] for run in runs) for text in runs[0] if text in common}


def paired(ours: Scores, theirs: Scores, *, seed: int = 0) -> Paired | None:
    """Compare two variants on the texts that both were judged on; None if there are none."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    difference = np.array([ours[text] - theirs[text] for text in common])
    picks = np.random.default_rng(seed).integers(len(common), size=(_RESAMPLES, len(common)))
    low, high = np.quantile(difference[picks].mean(axis=1), [0.025, 0.975])
    p = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
    return Paired(float(difference.mean()), float(low), float(high), p, len(common))


def best(metric: Metric, means: Mapping[str, float]) -> str | None:
    """The name with the best value."""
    if not means:
        return None
    choose = min if metric.direction == "min" else max
    return choose(means, key=lambda name: means[name])


def means_of(metric: Metric, rows: Sequence[Row]) -> dict[str, float]:
    """The mean of a metric over the seeds of each variant that has it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row.metrics.get(metric.name)
        if value is not None and row.error is None and row.stopped is None:
            values.setdefault(row.variant, []).append(value)
    return {name: statistics.fmean(some) for name, some in values.items()}


def compare(space: Space, rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison of a space's variants from the latest row of each trial, as plain values.

    Keys: ``metrics``, ``baseline``, ``best``, ``front`` and ``variants``, the space's in its order, after its
    references; those that were sampled in the order of their rows. ``front`` names the variants that no other dominates
    in the means of all metrics, where there are several; references do not compete.
    """
    good = [row for row in rows if row.error is None and row.stopped is None]
    names = [metric.name for metric in space.metrics]
    base = _texts([row for row in good if row.variant == space.baseline])
    variants = [
        {
            "name": name,
            "reference": True,
            # Every run says the same again.
            "metrics": {metric: _plain(spread(sorted(set(_values(good, numbers.get(metric)))))) for metric in names},
        }
        for name, numbers in space.references.items()
    ]
    for name in space.names or dict.fromkeys(row.variant for row in rows):
        mine = [row for row in good if row.variant == name]
        texts = _texts(mine) if name != space.baseline else {}
        variants.append(
            {
                "name": name,
                "reference": False,
                "seeds": [row.seed for row in mine],
                "failed": [
                    {"seed": row.seed, "error": row.error}
                    for row in rows
                    if row.variant == name and row.error is not None
                ],
                "stopped": [
                    {"seed": row.seed, "step": row.stopped, "metrics": row.metrics}
                    for row in rows
                    if row.variant == name and row.stopped is not None
                ],
                "seconds": statistics.fmean(row.seconds for row in mine) if mine else None,
                "metrics": {metric: _plain(spread(_values(mine, metric))) for metric in names},
                "paired": {
                    score: _plain(found)
                    for score, scores in texts.items()
                    if (found := paired(scores, base.get(score, {}))) is not None
                },
            }
        )
    return {
        "metrics": [metric.model_dump() for metric in space.metrics],
        "baseline": space.baseline,
        "best": best(space.metrics[0], means_of(space.metrics[0], good)),
        "front": _front(space.metrics, good),
        "variants": variants,
    }


def _front(metrics: Sequence[Metric], rows: Sequence[Row]) -> list[str]:
    if len(metrics) < 2:
        return []
    means = [means_of(metric, rows) for metric in metrics]
    whole = [name for name in means[0] if all(name in of for of in means)]
    points = {name: [of[name] for of in means] for name in whole}
    return front(points, [metric.direction for metric in metrics])


def _values(rows: Sequence[Row], metric: str | None) -> list[float]:
    found = (row.metrics.get(metric) for row in rows) if metric is not None else ()
    return [value for value in found if value is not None]


def _texts(rows: Sequence[Row]) -> dict[str, Scores]:
    """The mean scores over the seeds of a variant, as far as all of them have them."""
    if not rows:
        return {}
    kinds = set(rows[0].texts).intersection(*(row.texts for row in rows[1:]))
    return {kind: mean_scores([row.texts[kind] for row in rows]) for kind in rows[0].texts if kind in kinds}


def _plain(one: Spread | Paired | None) -> dict[str, Any] | None:
    return None if one is None else asdict(one)
