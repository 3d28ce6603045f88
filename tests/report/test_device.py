"""Console report of a device that took part in a job."""

from __future__ import annotations

from typing import Any

import pytest

from raycloud.report.device import print_learnt

ENDS = {"job": "tune", "device": "shop", "bytes_up": 2_000_000, "bytes_down": 3_000_000, "seconds": 12.0}


def test_the_rounds_of_a_distillation(capsys: pytest.CaptureFixture[str]) -> None:
    one: dict[str, Any] = {"round": 0, "accepted": False, "reason": "closed", "tokens": 7, "loss": 1.5, "seconds": 2.0}
    print_learnt({**ENDS, "rounds": [one], "student": "learn/tune/student"})
    said = capsys.readouterr().out
    assert "refused (closed)" in said and "2.0 MB sent, 3.0 MB received in 12 s" in said and "model: learn" in said


def test_the_phases_of_a_split_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    phases = {"before": {"accuracy": 0.5}, "together": {"accuracy": 0.75, "bytes_per_step": 1000.0}}
    rounds = [{"counted": True}, {"counted": False}]
    print_learnt({**ENDS, "phases": phases, "rounds": rounds, "counted": 1, "weights": None})
    said = capsys.readouterr().out
    assert "together" in said and "0.75" in said and "counted in 1 of 2 rounds" in said and "model" not in said
