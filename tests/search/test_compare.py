"""Comparisons against values by hand and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, wilcoxon

from raycloud.search.compare import Spread, compare, mean_scores, paired, spread
from raycloud.search.rows import Row
from raycloud.search.space import Metric, Space, Variant


def test_spreads() -> None:
    assert spread([]) is None
    assert spread([2.0]) == Spread(2.0, None, 1)
    found = spread([1.0, 2.0, 6.0])
    assert found is not None and found.mean == 3.0 and found.count == 3
    assert found.deviation == pytest.approx(7**0.5)


def test_paired_comparisons_are_scipys() -> None:
    rng = np.random.default_rng(1)
    theirs = {f"t{n}": float(value) for n, value in enumerate(rng.normal(3, 1, 200))}
    ours = {text: value - 0.05 + float(rng.normal(0, 0.3)) for text, value in theirs.items()}
    found = paired({**ours, "only ours": 9.0}, {**theirs, "only theirs": 9.0})
    assert found is not None and found.texts == 200
    difference = np.array([ours[text] - theirs[text] for text in ours])
    assert found.difference == pytest.approx(difference.mean())
    assert found.p == pytest.approx(wilcoxon(difference).pvalue)
    interval = bootstrap((difference,), np.mean, n_resamples=4000, method="percentile").confidence_interval
    width = interval.high - interval.low
    assert found.low == pytest.approx(interval.low, abs=0.1 * width)
    assert found.high == pytest.approx(interval.high, abs=0.1 * width)
    assert paired(ours, theirs) == paired(ours, theirs)


def test_equal_scores_differ_by_nothing() -> None:
    same = {"a": 1.0, "b": 2.0}
    found = paired(same, same)
    assert found is not None and (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert paired(same, {"c": 1.0}) is None


def test_mean_scores_are_over_the_texts_that_all_have() -> None:
    assert mean_scores([{"a": 1.0, "b": 2.0}, {"b": 4.0, "c": 0.0}]) == {"b": 3.0}
    assert mean_scores([]) == {}


def test_a_whole_comparison() -> None:
    space = Space(
        base={"job": "distill"},
        variants={"plain": Variant(), "good": Variant(overrides={"seed": 1}), "broken": Variant(overrides={"seed": 2})},
        metrics=[Metric(name="ppl", direction="min"), Metric(name="agreement", direction="max")],
        baseline="plain",
        references={"none": {"ppl": "before"}},
    )

    def row(variant: str, seed: int, ppl: float, texts: dict[str, dict[str, float]]) -> Row:
        metrics = {"ppl": ppl, "before": 50.0}
        return Row(variant=variant, seed=seed, recipe={}, metrics=metrics, texts=texts, seconds=4.0)

    rows = [
        row("plain", 1, 10.0, {"nll": {"a": 2.0, "b": 3.0}}),
        row("good", 1, 8.0, {"nll": {"a": 1.0, "b": 1.0}}),
        row("good", 2, 6.0, {"nll": {"a": 2.0, "b": 2.0}, "kl": {"a": 1.0}}),
        Row(variant="broken", seed=1, recipe={}, error="a wall"),
    ]
    found = compare(space, rows)
    assert found["best"] == "good"
    none, plain, good, broken = found["variants"]
    assert (
        none["metrics"]["ppl"] == {"mean": 50.0, "deviation": None, "count": 1}
        and none["metrics"]["agreement"] is None
        and none["reference"]
    )
    assert plain["paired"] == {} and plain["seeds"] == [1]
    assert good["metrics"]["ppl"] == {"mean": 7.0, "deviation": pytest.approx(2**0.5), "count": 2}
    assert good["paired"].keys() == {"nll"}
    assert good["paired"]["nll"]["difference"] == pytest.approx(-1.0)
    assert broken["failed"] == [{"seed": 1, "error": "a wall"}] and broken["metrics"]["ppl"] is None
