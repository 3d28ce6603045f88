"""Errors and regret of predictions, by hand."""

from __future__ import annotations

import pytest

from raycloud.benchmarks.split_plan import LARGE, PlanTimes, plan_large
from raycloud.split.cost import PlanCost


def cost(edge_bytes: int, ms: float) -> PlanCost:
    return PlanCost(
        start_block=edge_bytes,
        end_block=30,
        edge_weight_bytes=edge_bytes,
        edge_kv_bytes=0,
        cloud_weight_bytes=0,
        cloud_kv_bytes=0,
        link_bytes_per_token=0,
        link_bytes_per_prompt=0,
        ms_per_token=ms,
        edge_ms=ms,
        link_ms=0,
        cloud_ms=0,
        ms_per_prompt=ms,
        fits=True,
    )


def test_errors_and_regret() -> None:
    """The plan of 3 bytes is recommended and measured slower than that of 2 bytes by a tenth in most rounds."""
    times = PlanTimes(
        "link", [cost(1, 20), cost(2, 12), cost(3, 10)], [[20, 25, 15], [10, 10, 10], [11, 30, 11]]
    )  # fmt: skip
    assert times.measured == [20, 10, 11]
    assert times.errors == pytest.approx([0, 0.2, -1 / 11])
    assert times.regret(float("inf")) == pytest.approx(0.1)
    assert times.regret(2) == 0  # of the two that fit the recommended one is the best
    assert times.regret(1) == 0


def test_a_model_of_70_billion_weights_is_planned_in_a_fraction_of_its_memory() -> None:
    assert LARGE["num_hidden_layers"] == 80
    assert plan_large()["large_mb"] < 2000
