"""``raycloud split plan`` as a user sees it: a configuration is enough, and wrong input is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, RwkvConfig

from raycloud.cli.app import main


@dataclass(frozen=True)
class Said:
    """Output and exit status of a command."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object on the last line."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


Plan = Callable[..., Said]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plan:
    """Run the command for a folder with the configuration of a model of 80 blocks, and nothing else."""
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path / "large")
    (tmp_path / "edge.yaml").write_text("edge: {memory_gb: 16, memory_gb_s: 20, gflop_s: 100, dtype: bfloat16}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYCLOUD_CACHE", str(tmp_path / "cache"))

    def run(*words: str, model: str = "large") -> Said:
        monkeypatch.setattr(sys, "argv", ["raycloud", "split", "plan", "--model", model, *words])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return Said(int(left.value.code or 0), said.out, said.err)

    return run


def test_a_configuration_is_enough(plan: Plan) -> None:
    (Path("cloud.yaml")).write_text(Path("edge.yaml").read_text() + "cloud: {memory_gb_s: 2000, gflop_s: 100000}\n")
    done = plan("--profile", "cloud.yaml", "--bandwidth", "100Mbit", "--rtt", "20ms", "--codec", "bfloat16", "--json")
    assert done.code == 0, done.err
    found = done.summary
    assert (found["path"], found["blocks"], len(found["plans"])) == ("fast", 80, 80 * 81 / 2 + 1)
    assert (found["profile"]["network"]["mbit_s"], found["profile"]["network"]["rtt_ms"]) == (100, 20)
    chosen = found["recommended"]
    assert (chosen["start_block"], chosen["end_block"], chosen["fits"]) == (0, 80, True)
    assert chosen["edge_weight_bytes"] == 2 * (2 * 128256 * 8192 + 8192)
    assert chosen["link_bytes_per_token"] == 2 * (72 + 2 * 8192)
    assert "all at the edge" in chosen["reason"] and "does not fit" in chosen["reason"]
    assert "recommended: --start-block 0 --end-block 80" in done.out
    assert "fast path, 80 blocks, 70,554 million weights" in done.out


def test_no_plan_that_fits_is_an_error_after_the_table(plan: Plan) -> None:
    done = plan("--profile", "edge.yaml", "--json")  # 6 of the 80 blocks fit the edge
    assert done.code == 2
    assert done.summary["recommended"] is None and len(done.summary["plans"]) == 3241
    assert done.err == (
        "error: no plan fits: with edge.memory_gb 16 the cloud needs at least 127.26 GB and cloud.memory_gb is 80\n"
    )


def test_a_refused_model_says_why(plan: Plan) -> None:
    RwkvConfig(hidden_size=32, num_hidden_layers=4, attention_hidden_size=32, vocab_size=97).save_pretrained("odd")
    done = plan("--json", model="odd")
    assert done.code == 2
    assert done.summary["path"] == "refused" and done.summary["reason"] in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--bandwidth", "10"), "--bandwidth: '10' is no bandwidth; allowed: a number with a unit of kbit, mbit, gbit"),
        (("--rtt", "50"), "--rtt: '50' is no delay"),
        (("--codec", "int3"), "--codec: no codec 'int3'; allowed: float32"),
        (("--context", "0"), "Invalid value for '--context'"),
        (("--profile", "none.yaml"), "cannot read recipe 'none.yaml'"),
        (("--profile", "bad.yaml"), "bad.yaml: unknown key 'edge.ram'"),
    ],
)
def test_wrong_input_is_one_line(words: tuple[str, ...], why: str, plan: Plan) -> None:
    Path("bad.yaml").write_text("edge: {memory_gb_s: 1, gflop_s: 1, ram: 2}")
    done = plan(*words)
    assert done.code == 2 and why in done.err and len(done.err.splitlines()) == 1


def test_a_folder_without_a_configuration_is_refused(plan: Plan) -> None:
    Path("empty").mkdir()
    done = plan(model="empty")
    assert done.code == 2 and done.err.startswith("error: 'empty' holds no config.json; allowed:")
    done = plan(model="./none")
    assert done.code == 2 and done.err.startswith("error: no model at './none'; allowed:")
