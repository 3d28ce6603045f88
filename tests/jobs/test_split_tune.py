"""Split fine-tuning job with several edges on one Ray: its results, and recovery from failures."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raycloud.errors import ClusterError, DataError, ModelError
from raycloud.jobs import split_tune as job
from raycloud.jobs.registry import REPORTS
from raycloud.jobs.split_tune import EdgeHandle, run
from raycloud.models.segments import Segment
from raycloud.report.render import render
from raycloud.results import read_records
from tests.cluster.recipes import split_edges

pytestmark = pytest.mark.usefixtures("local_ray")


def of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_records(path / "metrics.jsonl") if record["kind"] == kind]


def test_edges_train_alone_and_together_and_one_table_says_what_came_of_it(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    summary = run(split_edges(tiny_llama, path, alone=True))
    assert summary["metrics"] == ["perplexity"]
    for edge in summary["edges"].values():
        assert edge["together"]["perplexity"] < edge["before"]["perplexity"]
        assert edge["train_texts"] == 24 and edge["bytes_per_step"] > 0 and edge["bytes_per_round"] > 0
    assert summary["rounds"] == [
        {"round": number, "members": ["store", "newsroom"], "missed": {}} for number in (1, 2, 3)
    ]
    assert summary["perplexity"] < summary["perplexity_alone"] < summary["perplexity_before"]
    steps = [(one["edge"], one["what"], one["step"]) for one in of_kind(path, "step")]
    assert len(steps) == len(set(steps)) == 2 * 2 * 6
    # Both ended with what the group has in common, and nothing but that is on any disk.
    shared = load_file(path / "group.safetensors")
    for name in ("store", "newsroom"):
        learned = load_file(path / "edges" / name / "together.safetensors")
        assert all(torch.equal(tensor, shared[f"edge/{key}"]) for key, tensor in learned.items())
        kept = {one.name for one in (path / "edges" / name).iterdir()}
        assert kept == {"alone.safetensors", "together.safetensors", "inputs.json", "checksums.json"}
    model = Segment(AutoModelForCausalLM.from_pretrained(path / "model"), 1, 3, embed=False, head=False)
    middle = {f"middle.{name}": parameter for name, parameter in model.named_parameters()}
    assert middle and all(torch.equal(parameter, shared[name]) for name, parameter in middle.items())
    page = path / "report.html"
    before = page.read_bytes()
    assert b"store: held-out perplexity" in before and b"store, newsroom" in before
    page.unlink()
    assert render(path, REPORTS) == page and page.read_bytes() == before
    log = read_records(path / "log.jsonl")
    assert {record["source"] for record in log} == {"driver", "cloud", "edge store", "edge newsroom"}
    assert run(split_edges(tiny_llama, path, alone=True), "resume") == json.loads((path / "summary.json").read_text())


@pytest.mark.waits
def test_an_edge_that_is_killed_is_missed_and_trains_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others finish their round at the deadline; the edge is restarted and continues from their state."""
    killed: list[int] = []
    listen = job._SplitTuneJob._listen

    def listening(self: Any, edge: EdgeHandle, progress: Any) -> bool:
        news = listen(self, edge, progress)
        if not killed and edge.name == "store" and edge.num_received and edge.pid:
            killed.append(edge.pid)
            os.kill(edge.pid, signal.SIGKILL)
        return news

    monkeypatch.setattr(job._SplitTuneJob, "_listen", listening)
    path = tmp_path / "run"
    rounds = {"count": 6, "steps": 10, "deadline_s": 0.5}
    summary = run(split_edges(tiny_llama, path, rounds=rounds))
    assert killed
    assert [record["edge"] for record in of_kind(path, "died")] == ["store"]
    assert [one["round"] for one in summary["rounds"]] == [1, 2, 3, 4, 5, 6]
    assert any(one["missed"] == {"store": "died"} for one in summary["rounds"])
    for edge in summary["edges"].values():
        assert edge["together"]["perplexity"] < edge["before"]["perplexity"]
    learned = [load_file(path / "edges" / name / "together.safetensors") for name in ("store", "newsroom")]
    assert all(torch.equal(tensor, learned[1][key]) for key, tensor in learned[0].items())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "./nowhere"}, ModelError, "no model at './nowhere'"),
        ({"end_block": 9}, ModelError, "9"),
        ({"edges": [{"name": "a", "where": {"domain": ["sport"]}}]}, DataError, "there are: movie, news"),
        ({"edges": [{"name": f"e{n}"} for n in range(9)]}, ClusterError, "has 8 of the resource 'edge'"),
    ],
)
def test_mistakes_leave_nothing_behind(
    changes: dict[str, Any], error: type[Exception], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(split_edges(tiny_llama, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
