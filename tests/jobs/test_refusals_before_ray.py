"""Checks of every cluster job before it joins or starts Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from raycloud.benchmarks.family_configs import DECODERS, tiny_config
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.errors import ModelError, RaycloudError, RecipeError, ResultError, StorageError
from raycloud.jobs import distill, split_tune, tune_teacher
from raycloud.recipe import Recipe
from raycloud.split.finetune.edge_data import EdgeData
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.training.recipe import LoraRecipe
from tests.cluster.recipes import small, split_edges
from tests.tokenizers import tokenizer_of


def teacher(model: Path, output: Path) -> TuneTeacherRecipe:
    data = {"source": "builtin:instruct", "format": "alpaca", "max_length": 96, "max_prompt_length": 80}
    return TuneTeacherRecipe.model_validate({"output": str(output), "device": "cpu", "model": str(model), "data": data})


Make, Run = Callable[[Path, Path], Recipe], Callable[..., Any]
JOBS: dict[str, tuple[Make, Run]] = {
    "distill": (small, distill.run),
    "split-tune": (split_edges, split_tune.run),
    "tune-teacher": (teacher, tune_teacher.run),
}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(*_: object) -> None:
        raise AssertionError("the job joins a cluster")

    monkeypatch.setattr("raycloud.jobs.runner.ray_connection", joined)
    found = tune_teacher.importlib.util.find_spec
    monkeypatch.setattr(
        tune_teacher.importlib.util, "find_spec", lambda name: object() if name == "deepspeed" else found(name)
    )


@pytest.fixture(params=JOBS)
def job(request: pytest.FixtureRequest) -> tuple[Make, Run]:
    return JOBS[request.param]


def refused(job: tuple[Make, Run], model: Path, output: Path, error: type[RaycloudError], said: str) -> None:
    make, run = job
    with pytest.raises(error, match=said) as caught:
        run(make(model, output))
    assert "\n" not in str(caught.value)


def test_outputs_that_cannot_be_used(job: tuple[Make, Run], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes").touch()
    (tmp_path / "link").symlink_to("elsewhere")
    refused(job, tiny_llama, tmp_path / "used", ResultError, "exists; pass --resume")
    refused(job, tiny_llama, tmp_path / "used" / "notes", ResultError, "is a file")
    refused(job, tiny_llama, tmp_path / "used" / "notes" / "run", StorageError, "'.*notes' is not a writable directory")
    refused(job, tiny_llama, tmp_path / "link", ResultError, "is a symbolic link")


def test_a_folder_for_signals_that_cannot_be_written(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = small(tiny_llama, tmp_path / "run", teacher={"signals": str(tmp_path / "file" / "signals")})
    with pytest.raises(StorageError, match=r"cannot write into '.*signals'"):
        distill.run(recipe)


def test_a_complete_run_is_not_begun_again(job: tuple[Make, Run], tiny_llama: Path, tmp_path: Path) -> None:
    make, run = job
    recipe = make(tiny_llama, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.dump())
    (tmp_path / "run" / "summary.json").write_text('{"run": "abc"}')
    assert run(recipe, "resume") == {"run": "abc"}


def test_a_tokenizer_without_an_end(job: tuple[Make, Run], tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            kept = json.loads((model / name).read_text())
            kept.pop("eos_token")
            (model / name).write_text(json.dumps(kept))
    refused(job, model, tmp_path / "run", ModelError, "tokenizer of '.*model' has no token that ends a text")


def test_more_tokens_than_positions(job: tuple[Make, Run], tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    refused(job, model, tmp_path / "run", RecipeError, r"data\.max_length=\d+; allowed: up to the model's 16 positions")


def test_a_model_without_a_tokenizer(job: tuple[Make, Run], tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    for path in model.glob("token*"):
        path.unlink()
    refused(job, model, tmp_path / "run", ModelError, "holds no tokenizer; allowed: one of the files tokenizer.json, ")


def saved(name: str, folder: Path) -> Path:
    """Save a tiny random model of a type, with a tokenizer of bytes."""
    kind, options = DECODERS[name]
    config = tiny_config(kind, {**options, "vocab_size": 264, "max_position_embeddings": 512})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def test_experts_without_adapters_are_named_at_the_start(
    job: tuple[Make, Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def adapted(model: Path, output: Path) -> Recipe:
        if job[0] is small:
            return small(model, output, student={"lora": {"r": 2}})
        if job[0] is teacher:
            return teacher(model, output).model_copy(update={"lora": LoraRecipe(r=2)})
        data = {"source": "builtin:instruct", "max_length": 400, "limit": 24, "held_out_samples": 4}
        return split_edges(model, output, data=data).of("store").model_copy(update={"lora": LoraRecipe(r=2)})

    recipe = adapted(saved("qwen3_moe", tmp_path / "model"), tmp_path / "run")
    if isinstance(recipe, SplitTuneRecipe):
        lines: list[str] = []
        EdgeData(recipe, lines.append)
    else:
        with pytest.raises(AssertionError, match="joins a cluster"):
            job[1](recipe)
        lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[:2] for line in lines if "experts" in line] == [["warning", " lora"]]


@pytest.mark.parametrize("chosen", [{"blocks": [0, 1, 2]}, {"blocks": 1, "choose": "spacing"}])
def test_a_student_without_any_block_that_attends(chosen: dict[str, Any], tmp_path: Path) -> None:
    saved("qwen3_next", tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"no 'qwen3_next' model consists of the blocks \[0.*Attention layers"
    ) as caught:
        distill.run(small(tmp_path / "model", tmp_path / "run", student=chosen))
    assert "\n" not in str(caught.value) and str(caught.value).endswith("allowed: other blocks")
    assert not (tmp_path / "run").exists()


def test_a_bos_that_cannot_be(job: tuple[Make, Run], tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            kept = json.loads((model / name).read_text())
            kept.pop("bos_token", None)
            (model / name).write_text(json.dumps(kept))
    make, run = job

    def asking(*where: Path) -> Recipe:
        recipe = make(*where)
        return type(recipe).parse(recipe.model_dump(), ["data.bos=true"])

    refused((asking, run), model, tmp_path / "run", ModelError, "bos is true, and the tokenizer '.*' names no BOS")
