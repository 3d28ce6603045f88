"""Comparison of the rows of a search: spreads over seeds, and paired comparisons on the same texts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from raycloud.search.pareto import pareto_front
from raycloud.search.rows import Scores, TrialRow, diverged
from raycloud.search.space import Metric, Space

_RESAMPLES = 4000


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; the deviation of a single value is None."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class PairedComparison:
    """Difference between a variant and the baseline on the same texts: ours − theirs.

    Args:
        difference: mean of the differences over the texts.
        low: lower end of the bootstrap's 95 % interval of that mean.
        high: upper end of that interval.
        p: p value of Wilcoxon's signed-rank test, two-sided.
        texts: number of texts that both have.
    """

    difference: float
    low: float
    high: float
    p: float
    texts: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return the spread of some values; None if there are none."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean_scores(runs: Sequence[Scores]) -> Scores:
    """Return the mean over runs for each text that all runs have."""
    if not runs:
        return {}
    common = set(runs[0]).intersection(*runs[1:])
    return {text: statistics.fmean(run[text] for run in runs) for text in runs[0] if text in common}


def paired(ours: Scores, theirs: Scores, *, seed: int = 0) -> PairedComparison | None:
    """Compare two variants on the texts that both have scores for; None if there are none."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    difference = np.array([ours[text] - theirs[text] for text in common])
    picks = np.random.default_rng(seed).integers(len(common), size=(_RESAMPLES, len(common)))
    low, high = np.quantile(difference[picks].mean(axis=1), [0.025, 0.975])
    p = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
    return PairedComparison(float(difference.mean()), float(low), float(high), p, len(common))


def best(metric: Metric, means: Mapping[str, float]) -> str | None:
    """Return the name with the best value; values that are not finite are ignored. None if no value is left."""
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not finite:
        return None
    choose = min if metric.direction == "min" else max
    return choose(finite, key=lambda name: finite[name])


def means_of(metric: Metric, rows: Sequence[TrialRow]) -> dict[str, float]:
    """Return the mean of a metric over the seeds, by variant; variants with a diverged seed are left out."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row.metrics.get(metric.name)
        if value is not None and row.error is None and row.stopped is None:
            values.setdefault(row.variant, []).append(value)
    lost = {row.variant for row in rows if diverged(row, [metric.name])}
    return {name: statistics.fmean(some) for name, some in values.items() if name not in lost}


def compare(space: Space, rows: Sequence[TrialRow]) -> dict[str, Any]:
    """Compare a space's variants by the latest row of each trial; the result consists of plain values.

    Keys: ``metrics``, ``baseline``, ``best``, ``pareto`` and ``variants``. ``variants`` lists the references, then the
    variants in the order of the space; sampled ones are in the order of their rows. ``pareto`` names the variants on
    the Pareto front of the means of all metrics, if there are several metrics; it leaves out references and variants
    with a diverged seed, since the mean of their other seeds is not representative.
    """
    names = [metric.name for metric in space.metrics]
    good = [row for row in rows if row.error is None and row.stopped is None and not diverged(row, names)]
    base = _texts([row for row in good if row.variant == space.baseline])
    variants = [
        {
            "name": name,
            "reference": True,
            # Every run has the same numbers of a reference.
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
                    {"seed": row.seed, "error": row.error or f"no finite number: {', '.join(diverged(row, names))}"}
                    for row in rows
                    if row.variant == name and (row.error is not None or diverged(row, names))
                ],
                "diverged": [row.seed for row in rows if row.variant == name and diverged(row, names)],
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
        "best": best(space.metrics[0], means_of(space.metrics[0], rows)),
        "pareto": _pareto(space.metrics, rows),
        "variants": variants,
    }


def _pareto(metrics: Sequence[Metric], rows: Sequence[TrialRow]) -> list[str]:
    if len(metrics) < 2:
        return []
    means = [means_of(metric, rows) for metric in metrics]
    whole = [name for name in means[0] if all(name in of for of in means)]
    points = {name: [of[name] for of in means] for name in whole}
    return pareto_front(points, [metric.direction for metric in metrics])


def _values(rows: Sequence[TrialRow], metric: str | None) -> list[float]:
    found = (row.metrics.get(metric) for row in rows) if metric is not None else ()
    return [value for value in found if value is not None]


def _texts(rows: Sequence[TrialRow]) -> dict[str, Scores]:
    """Return the mean scores over the seeds of a variant, for the scores and texts that all seeds have."""
    if not rows:
        return {}
    kinds = set(rows[0].texts).intersection(*(row.texts for row in rows[1:]))
    return {kind: mean_scores([row.texts[kind] for row in rows]) for kind in rows[0].texts if kind in kinds}


def _plain(one: Spread | PairedComparison | None) -> dict[str, Any] | None:
    return None if one is None else asdict(one)
