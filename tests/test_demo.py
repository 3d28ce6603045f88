"""The demo job reaches the figures of the README, on real models and data, with half the texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.endings import report_of

ROOT = Path(__file__).parents[1]
FOREIGN = {"store": ("news", "tweet"), "newsroom": ("movie", "product")}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_closes_the_gap_on_every_domain_and_averaging_pays(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "raycloud", "distill", "--recipe", "jobs/recipes/demo.yaml"]
    half = ["training.batch_size=16", "evaluation.held_out_samples=32"]
    done = subprocess.run(
        [*command, f"output={tmp_path / 'demo'}", *half], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert report_of(done.stdout, done.stderr) is None
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["rounds"] == 3
    assert summary["gap_closed"] >= 0.7
    assert summary["agreement_after"] > summary["agreement_before"] + 0.05
    for name, group in summary["groups"].items():
        assert group["gap_closed"] >= 0.6, name
    for student, domains in FOREIGN.items():
        for domain in domains:
            group = summary["groups"][domain]
            assert group["student_ppl_after"] <= group["single_ppl"][student], (student, domain)
    assert {one["prompt"] for one in summary["completions"]} == {"The film is", "This phone", "The president said"}
