"""Comparisons against values computed by hand and by SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, wilcoxon

from raycloud.report.search import _sorted as ranked
from raycloud.search.compare import Spread, best, compare, mean_scores, paired, spread
from raycloud.search.rows import TrialRow
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

    def row(variant: str, seed: int, ppl: float, texts: dict[str, dict[str, float]]) -> TrialRow:
        metrics = {"ppl": ppl, "before": 50.0}
        return TrialRow(variant=variant, seed=seed, recipe={}, metrics=metrics, texts=texts, seconds=4.0)

    rows = [
        row("plain", 1, 10.0, {"nll": {"a": 2.0, "b": 3.0}}),
        row("good", 1, 8.0, {"nll": {"a": 1.0, "b": 1.0}}),
        row("good", 2, 6.0, {"nll": {"a": 2.0, "b": 2.0}, "kl": {"a": 1.0}}),
        TrialRow(variant="broken", seed=1, recipe={}, error="a wall"),
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


@pytest.mark.parametrize("error", [None, "ppl: no finite number, the run has diverged"])
def test_a_variant_with_a_seed_that_diverged_wins_nothing(error: str | None) -> None:
    """Regression: the mean of the other seeds was the best, so the variant was also on the Pareto front."""
    space = Space(
        base={"job": "distill"},
        variants={"steady": Variant(), "wild": Variant(overrides={"seed": 1}), "slow": Variant(overrides={"seed": 2})},
        metrics=[Metric(name="ppl", direction="min"), Metric(name="agreement", direction="max")],
    )

    def row(variant: str, seed: int, ppl: float | None, agreement: float = 0.5) -> TrialRow:
        failed = {"error": error} if ppl is None else {}
        return TrialRow(variant=variant, seed=seed, recipe={}, metrics={"ppl": ppl, "agreement": agreement}, **failed)

    rows = [row("wild", 1, 2.0, 0.9), row("wild", 2, None), row("steady", 1, 5.0), row("steady", 2, 6.0)]
    found = compare(space, [*rows, row("slow", 1, 7.0)])
    assert (found["best"], found["pareto"]) == ("steady", ["steady"])
    wild = next(one for one in found["variants"] if one["name"] == "wild")
    assert (wild["seeds"], wild["diverged"]) == ([1], [2])
    assert wild["failed"][0]["error"] == (error or "no finite number: ppl")
    assert [one["name"] for one in ranked({**found, "trials": 5, "failed": 1})] == ["steady", "slow", "wild"]


def test_the_best_is_a_number() -> None:
    lowest, highest = (Metric(name="m", direction=way) for way in ("min", "max"))
    means = {"nan": math.nan, "low": -math.inf, "high": math.inf, "one": 1.0, "two": 2.0}
    assert (best(lowest, means), best(highest, means)) == ("one", "two")
    assert best(lowest, {"nan": math.nan}) is None
