"""Types of models of which no line of the library knows the name: served in parts, fine-tuned in parts, distilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from raycloud.models.segments import Segment
from raycloud.models.structure import LogitsRule
from raycloud.models.surgery.extraction import extract
from raycloud.models.verdict import structure_of
from tests.cluster.every_type import KEPT, PROMPT, TYPES, WORDS
from tests.cluster.one_machine import ROOT
from tests.tokenizers import tokenizer_of

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


@torch.no_grad()
def divergence(teacher: PreTrainedModel, student: PreTrainedModel) -> tuple[float, int]:
    """Mean KL divergence of the next tokens of all texts by the library's own logits, and the number of tokens."""
    total, count = 0.0, 0
    for word in WORDS:
        ids = torch.tensor([tokenizer_of()(f"It is {word}.", add_special_tokens=False)["input_ids"]])
        theirs, ours = (model(input_ids=ids).logits[0, :-1].log_softmax(-1) for model in (teacher, student))
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += ids.shape[1] - 1
    return total / count, count


@pytest.mark.parametrize("name", TYPES)
def test_a_round_of_distillation_lowers_the_loss_that_the_library_gives(
    name: str, seen: dict[str, dict[str, Any]], folder: Path
) -> None:
    """The losses are those of the library's own forwards, so the rule of the teacher's and student's logits holds."""
    found = seen[name]["distilled"]
    assert isinstance(found, dict) and found["missed"] == {}, found
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / name / path, dtype=torch.float32).eval()
        for path in ("model", "distilled/student")
    )
    assert student.config.model_type == name and student.config.num_hidden_layers == len(KEPT)
    before, tokens = divergence(teacher, extract(teacher, KEPT).eval())
    assert found["steps"][0] == [pytest.approx(before, rel=1e-4), tokens]
    losses = [loss for loss, _ in found["steps"]]
    # Every step has the same texts.
    assert losses == sorted(losses, reverse=True) and divergence(teacher, student)[0] < losses[-1] < 0.9 * before


@pytest.mark.parametrize(("name", "rule"), [("gpt_oss", "head"), ("gemma2", "cap"), ("granite", "divisor")])
def test_the_rules_of_logits_differ_and_each_matters(name: str, rule: str, folder: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(folder / name / "model", dtype=torch.float32).eval()
    structure = structure_of(teacher.config)
    assert structure.logits.kind == rule
    plain = structure.model_copy(update={"logits": LogitsRule()})
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        differs = (Segment(teacher, structure=plain)(ids) - teacher(ids).logits).abs().max() > 0.1
    assert differs == (rule != "head")
