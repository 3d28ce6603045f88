"""Types of models of which no line of the library knows the name: served in parts, fine-tuned in parts, distilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.cluster.every_type import DISTILLED, TYPES
from tests.cluster.one_machine import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("types")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, dict[str, Any]]:
    """Run everything in one process, with one Ray."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.every_type", str(folder)],
        env={**env, "HOME": str(folder), "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", TYPES)
def test_the_text_over_a_link_is_the_librarys(name: str, seen: dict[str, dict[str, Any]]) -> None:
    assert seen[name]["served"] == seen[name]["library"]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("how", ["frozen", "lora"])
def test_split_fine_tuning_lowers_the_perplexity(name: str, how: str, seen: dict[str, dict[str, Any]]) -> None:
    found = seen[name][how]
    assert isinstance(found, dict), found
    assert found["perplexity"] < found["perplexity_before"]


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_student_loads_like_any_model(name: str, seen: dict[str, dict[str, Any]], folder: Path) -> None:
    assert seen[name]["distilled"] == {"missed": {}}
    student = AutoModelForCausalLM.from_pretrained(folder / name / "distilled" / "student")
    assert student.config.model_type == name and student.config.num_hidden_layers == 2
