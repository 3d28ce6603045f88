"""Report of a run of split fine-tuning."""

from __future__ import annotations

import pytest

from raycloud.report.console import console
from raycloud.report.split_tune import print_summary


def test_bytes_are_in_kilobytes_and_seconds_in_thousandths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 100)
    with console.capture() as captured:
        print_summary(
            {
                "perplexity_before": 22.384,
                "perplexity": 4.0643,
                "steps": 40,
                "train_texts": 320,
                "held_out_texts": 128,
                "bytes_per_step": 660_163.2,
                "bytes_up_per_step": 440_013.0,
                "seconds_per_step": 6.57955,
                "waiting_seconds_per_step": 4.7e-6,
            }
        )
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in captured.get().splitlines()]
    for row in (
        ["held-out perplexity", "22.38", "4.064"],
        ["kB per step in total", "", "660.2"],
        ["kB per step to the cloud", "", "440.0"],
        ["seconds per step", "", "6.580"],
        ["seconds per step of waiting for cloud and link", "", "0.000"],
    ):
        assert row in rows
