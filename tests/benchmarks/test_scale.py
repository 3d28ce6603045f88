"""The scale benchmark's arithmetic, and a small run of it; its figures are its own business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raycloud.benchmarks.scale import extrapolate

ROOT = Path(__file__).parents[2]


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


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_shared_batch_is_answered_and_stored_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raycloud", "bench", "scale", "--quick", "--json"],
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["students"], row["students_per_actor"]) for row in rows] == [(1, 1), (2, 1), (4, 2)]
    assert [row["teacher_forwards_per_batch"] for row in rows] == [1.0, 1.0, 1.0]
    assert [row["asked_per_batch"] for row in rows] == [1.0, 2.0, 4.0]
    for row in rows:
        held = row["object_store_bytes_per_student"] * row["students"]
        assert row["signal_bytes"] <= held < 2 * row["signal_bytes"]
        assert row["coordinator_ms_per_round_per_student"] > 0
