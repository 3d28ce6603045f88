"""Benchmark of split fine-tuning on a tiny language model and a few texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycloud.benchmarks import split_tune_language as bench


def test_it_ends_with_its_figures(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"MODEL": str(tiny_llama), "BATCH": 4, "SPLIT": 1, "SECOND": 3, "WORSE": 2.0}
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    low_rank = bench._both(kind="low_rank", rank=10, num_outliers=2, dtype="int4")
    cuts = {"rows": bench._both(kind="plain", dtype="float32"), "few": {**low_rank, "trainable": "last+middle"}}
    monkeypatch.setattr(bench, "CUTS", cuts)
    result = bench.run(texts=16, held_out=8).figures
    rows = {row["cut"]: row for row in result["rows"]}
    assert list(rows) == ["unsplit", "rows", "few"]
    # Rows as they are change nothing, and are what bytes are compared with.
    assert rows["rows"]["perplexity_ratio"] == pytest.approx(1.0, rel=1e-5)
    assert rows["rows"]["byte_ratio"] == 1.0
    assert rows["few"]["first_cut_bytes"] + rows["few"]["second_cut_bytes"] < rows["few"]["total_bytes"]
    assert rows["few"]["byte_ratio"] > 4
    assert result["best_byte_ratio_at_1_percent"] == max(rows["rows"]["byte_ratio"], rows["few"]["byte_ratio"])
