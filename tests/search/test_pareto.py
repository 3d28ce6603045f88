"""The Pareto front against its definition."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from raycloud.search.compare import compare
from raycloud.search.pareto import dominates, pareto_front
from raycloud.search.rows import TrialRow
from raycloud.search.space import Direction, Metric, Space, Variant

POINTS = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 3), max_size=12)
DIRECTIONS: list[Direction] = ["min", "max", "min"]


def test_by_hand() -> None:
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (2.0, 6.0), "d": (0.5, 9.0), "a again": (1.0, 5.0)}
    assert pareto_front(points, ["min", "min"]) == ["a", "b", "d", "a again"]
    assert pareto_front(points, ["max", "max"]) == ["c", "d"]
    assert pareto_front({"alone": (3.0,)}, ["min"]) == ["alone"]
    assert pareto_front({}, ["min"]) == []
    assert not dominates((1.0, 2.0), (1.0, 2.0), ["min", "max"])


def test_what_is_not_finite_is_not_on_the_front() -> None:
    """Regression: nothing dominates a NaN, so it was on every front."""
    points = {"nan": (math.nan, 0.0), "inf": (0.0, -math.inf), "good": (1.0, 1.0), "worse": (2.0, 2.0)}
    assert pareto_front(points, ["min", "min"]) == ["good"]


@given(POINTS)
def test_the_front_is_what_nothing_dominates_and_it_dominates_all_else(points: list[tuple[float, ...]]) -> None:
    def is_better_everywhere(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        no_worse = one[0] <= other[0] and one[1] >= other[1] and one[2] <= other[2]
        return no_worse and one != other

    named = {str(number): point for number, point in enumerate(points)}
    found = pareto_front(named, DIRECTIONS)
    for name, point in named.items():
        beaten = [other for other in found if is_better_everywhere(named[other], point)]
        assert (name in found) == (not any(is_better_everywhere(other, point) for other in points))
        assert name in found or beaten
    signed = {name: (-a, -b, -c) for name, (a, b, c) in named.items()}
    assert pareto_front(signed, ["max", "min", "max"]) == found


def test_a_comparison_has_a_front_where_there_are_several_metrics() -> None:
    metrics = [Metric(name="ppl", direction="min"), Metric(name="speed", direction="max")]
    variants = {name: Variant(overrides={"seed": number}) for number, name in enumerate("abcdef")}
    space = Space(base={}, variants=variants, metrics=metrics)

    def row(variant: str, ppl: float | None, speed: float, **more: int) -> TrialRow:
        return TrialRow(variant=variant, seed=1, recipe={}, metrics={"ppl": ppl, "speed": speed}, **more)  # type: ignore[arg-type]

    rows = [
        row("a", 5.0, 1.0),
        row("b", 9.0, 3.0),
        row("c", 9.5, 2.0),
        row("d", None, 9.0),
        row("e", 0.1, 9.0, stopped=64),
        TrialRow(variant="f", seed=1, recipe={}, error="broke"),
    ]
    found = compare(space, rows)
    assert found["pareto"] == ["a", "b"] and found["best"] == "a"
    assert found["variants"][4]["stopped"] == [{"seed": 1, "step": 64, "metrics": {"ppl": 0.1, "speed": 9.0}}]
    assert compare(space.model_copy(update={"metrics": metrics[:1]}), rows)["pareto"] == []
