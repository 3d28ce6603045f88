"""Evaluation harness `lm-eval`, in a separate environment, against the server: numbers of the stock model."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from raycloud.edge.server import create_app
from raycloud.edge.whole_model import load_whole
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.models.text_model import TextModel
from raycloud.split.plan import PlanSet
from tests.edge.sources import cut, running

pytestmark = pytest.mark.slow

NAME = "builtin:smollm2-135m-instruct"
QUESTIONS: list[dict[str, Any]] = [
    {"text": "The capital of France is", "choices": ["Paris", "Berlin", "a banana"], "right": 0},
    {"text": "Water freezes and becomes", "choices": ["music", "ice", "a bird"], "right": 1},
    {"text": "Two plus two equals", "choices": ["ninety", "a river", "four"], "right": 2},
    {"text": "At night one can see the", "choices": ["stars", "spoon of tea", "Tuesday"], "right": 0},
    {"text": "The opposite of hot is", "choices": ["hotter", "cold", "green"], "right": 1},
    # The model prefers what is not marked as right: an accuracy of one would hide a mistake.
    {"text": "A dog is an", "choices": ["animal", "opera singer"], "right": 1},
]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with lm-eval, which also imports the packages installed here."""
    folder = tmp_path_factory.mktemp("harness")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    purelib = Path(sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"])
    (purelib / "host.pth").write_text(sysconfig.get_paths()["purelib"])
    pinned = Path(__file__).with_name("harness.txt")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "-r", pinned]
    try:
        subprocess.run(install, capture_output=True, text=True, timeout=500, check=True)
    except subprocess.TimeoutExpired:
        pytest.skip("lm-eval cannot be installed: pip took more than 500 s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"lm-eval cannot be installed: {(error.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    """Log-probability of each choice after its question, by the stock model."""
    folder = resolve(NAME)
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def logprob(text: str, choice: str) -> float:
        begin, ids = tokenizer(text)["input_ids"], tokenizer(f"{text} {choice}")["input_ids"]
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logs[at - 1, ids[at]]) for at in range(len(begin), len(ids)))

    return [[logprob(one["text"], choice) for choice in one["choices"]] for one in QUESTIONS]


@contextmanager
def model(kind: str) -> Iterator[TextModel]:
    if kind == "whole":
        yield load_whole(NAME)
    else:
        with cut(resolve(NAME), PlanSet((4,), (26,))) as made:
            yield made


@pytest.mark.parametrize("kind", ["whole", "split"])
def test_a_multiple_choice_task(harness: Path, expected: list[list[float]], tmp_path: Path, kind: str) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    task = {
        "task": "small",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(task))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    with model(kind) as served, running(create_app(served, "smol")) as url:
        options = f"model=smol,base_url={url}/completions,tokenizer={resolve(NAME)},max_retries=1,max_length=512"
        words = ["--model", "local-completions", "--model_args", options, "--tasks", "small"]
        words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
        done = subprocess.run(
            [harness, "-m", "lm_eval", *words],
            capture_output=True,
            text=True,
            timeout=600,
            env=environment,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_small_*.jsonl")
    found: dict[int, list[float]] = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        found[sample["doc_id"]] = [float(answer[0][0]) for answer in sample["resps"]]
    for number, logprobs in enumerate(expected):
        assert found[number] == pytest.approx(logprobs, abs=1e-3)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["small"]["acc,none"]
    right = [
        max(range(len(said)), key=said.__getitem__) == one["right"]
        for said, one in zip(expected, QUESTIONS, strict=True)
    ]
    assert accuracy == pytest.approx(sum(right) / len(right)) and 0 < accuracy < 1
