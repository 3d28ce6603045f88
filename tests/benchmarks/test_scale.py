"""Arithmetic of the scale benchmark; its quick run is tested with those of all benchmarks."""

from __future__ import annotations

import pytest

from raycloud.benchmarks.scale import extrapolate


def test_many_edges_are_on_the_line_through_the_rows() -> None:
    rows = [
        {
            "students": count,
            "coordinator_ms_per_round_per_student": 5.0 + 40.0 / count,
            "signal_bytes": 1000.0,
            "object_store_bytes_per_student": 1200.0 / count,
            "round_s": 2.0,
        }
        for count in (1, 2, 4, 8)
    ]
    far = extrapolate(rows, weights_bytes=3_000, edges=10_000)
    assert far["coordinator_ms_per_student"] == pytest.approx(5.0)
    assert far["coordinator_s_per_round"] == pytest.approx((40 + 5 * 10_000) / 1e3)
    assert far["object_store_bytes_per_batch"] == pytest.approx(1200.0)
    assert far["signal_bytes_sent_per_batch"] == pytest.approx(1e7)
    assert any("a round lasts 2 s" in one for one in far["assumptions"])
    assert far["weights_bytes_per_round"] == 2 * 3_000 * 10_000
