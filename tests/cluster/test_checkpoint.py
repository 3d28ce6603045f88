"""Checkpoints of the driver between rounds: which are kept, and the fallback for a damaged one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from raycloud.cluster.checkpoint import DistillCheckpoint, StudentCheckpoint
from raycloud.distill.recipe import ObjectiveRecipe
from raycloud.errors import ResultError
from raycloud.jobs.distill_summary import summarise
from raycloud.results import plain_json


def saved(folder: Path, rounds: int) -> None:
    weights = {"weight": torch.full((4,), float(rounds))}
    students = {"edge": StudentCheckpoint(LlamaConfig(num_hidden_layers=1), weights)}
    DistillCheckpoint(rounds, students, {"students": {"edge": {}}, "tokens": rounds}).save(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for rounds in range(4):
        saved(tmp_path, rounds)
    return tmp_path


def test_the_newest_and_the_one_before_it_stay(state: Path) -> None:
    assert names(state) == ["round-0002", "round-0003"]
    found = DistillCheckpoint.latest(state)
    assert found is not None and found.rounds == 3 and found.facts["tokens"] == 3
    assert torch.equal(found.students["edge"].weights["weight"], torch.full((4,), 3.0))


def damage(folder: Path, how: str) -> None:
    path = folder / ("facts.json" if how == "facts" else "edge/weights.safetensors")
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(content[:-3])
    else:
        content[-3] ^= 1  # as safetensors, or as JSON, it may well be read
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "shorter", "missing", "facts"])
def test_a_damaged_newest_one_falls_back_to_the_one_before(
    state: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(state / "round-0003", how)
    found = DistillCheckpoint.latest(state)
    assert found is not None and found.rounds == 2
    assert torch.equal(found.students["edge"].weights["weight"], torch.full((4,), 2.0))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].endswith("trying the checkpoint before it") and "round-0003" in said[0]
    assert names(state) == ["round-0002"]
    saved(state, 3)
    assert names(state) == ["round-0002", "round-0003"]


def test_without_an_undamaged_one_it_is_one_line(state: Path) -> None:
    for name in names(state):
        damage(state / name, "flipped")
    with pytest.raises(ResultError, match="cannot resume from") as caught:
        DistillCheckpoint.latest(state)
    assert "\n" not in str(caught.value)
    assert names(state) == ["round-0002", "round-0003"]


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert DistillCheckpoint.latest(tmp_path / "state") is None


def test_facts_that_are_not_finite_are_json_and_lead_to_a_summary(tmp_path: Path) -> None:
    """Regression: such numbers were written as NaN and Infinity, which are not JSON."""
    score = {"perplexity": 9.0, "agreement": 0.5, "kl": 1.0, "tokens": 7}
    found: dict[str, Any] = {
        "teacher": {"scores": {"(all)": score}, "rouge_l": None},
        "before": {"scores": {"(all)": {**score, "perplexity": math.inf}}, "rouge_l": None},
        "after": {"scores": {"(all)": {**score, "perplexity": math.nan, "kl": math.nan}}, "rouge_l": None},
        "singles": {},
        "comparison": {"prompts": [], "teacher": [], "student": [], "teacher_tok_s": 1.0, "student_tok_s": 2.0},
        **{"blocks": [0], "tokens": 7},
    }
    facts = {"students": {"edge": found}, "wire": {}, "tokens": 7, "diagnostics": {}, "seconds": 1.0}
    student = StudentCheckpoint(LlamaConfig(num_hidden_layers=1), {"weight": torch.ones(1)})
    DistillCheckpoint(1, {"edge": student}, facts).save(tmp_path)
    json.loads((tmp_path / "round-0001" / "facts.json").read_text(), parse_constant=pytest.fail)
    resumed = DistillCheckpoint.latest(tmp_path)
    assert resumed is not None
    for checkpoint in (resumed, DistillCheckpoint(1, {"edge": student}, facts)):
        summary = summarise("run", checkpoint, 5, {"edge": 3}, {"edge": ObjectiveRecipe()})
        summary = json.loads(plain_json(summary))
        numbers = [summary[key] for key in ("teacher_ppl", "student_ppl_before", "student_ppl_after", "kl_after")]
        assert numbers == [9.0, None, None, None] and summary["gap_closed"] is None
