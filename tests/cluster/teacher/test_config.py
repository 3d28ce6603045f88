"""DeepSpeed's configuration from the recipe, and the keys that a given JSON may add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raycloud.cluster.teacher.config import deepspeed_config
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.errors import RecipeError

CPU = torch.device("cpu")
RECIPE = {
    "dtype": "bfloat16",
    "training": {"lr": 1e-4, "batch_size": 8, "gradient_accumulation_steps": 2},
    "workers": {"count": 2},
}


def _recipe(given: Path | None = None, **deepspeed: Any) -> TuneTeacherRecipe:
    return TuneTeacherRecipe.model_validate({**RECIPE, "deepspeed": {"config": given and str(given), **deepspeed}})


def _json(folder: Path, **content: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return path


def test_the_recipe_says_batches_precision_and_stage() -> None:
    settings = deepspeed_config(_recipe(stage=3, offload_parameters=True), CPU)
    assert settings["train_batch_size"] == 16
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["bf16"]["enabled"]
    assert not settings["fp16"]["enabled"]
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["offload_param"]["device"], zero["offload_optimizer"]["device"]) == (3, "cpu", "none")


def test_a_given_json_adds_to_it_and_leaves_auto_to_it(tmp_path: Path) -> None:
    given = _json(
        tmp_path,
        train_batch_size="auto",
        bf16={"enabled": "auto"},
        zero_optimization={"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto"},
        optimizer={"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.01}},
        scheduler={"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto"}},
    )
    settings = deepspeed_config(_recipe(given), CPU)
    assert settings["train_batch_size"] == 16
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert "allgather_bucket_size" not in settings["zero_optimization"]
    assert "optimizer" not in settings
    assert "scheduler" not in settings


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train_batch_size": 64}, "train_batch_size is 64; allowed: the value of the recipe, 16"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3; allowed: the value of the recipe, 2"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True"),
        ({"bf16": True}, "bf16 is True; allowed: an object"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is 'Lamb'; allowed: Adam, AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optimizer.params.lr is 1.0"),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": 1.0}}}, "unknown optimizer.params.momentum"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "warmup_num_steps is 5"),
    ],
)
def test_a_given_json_that_says_otherwise_is_refused(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        deepspeed_config(_recipe(_json(tmp_path, **content)), CPU)
    assert said in str(refused.value)
    assert "ds.json" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(RecipeError, match=r"ds\.json"):
        deepspeed_config(_recipe(path), CPU)
    with pytest.raises(RecipeError, match="No such file"):
        deepspeed_config(_recipe(tmp_path / "none.json"), CPU)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"batch_size": 3}}, "training.batch_size is 3; allowed: a multiple of workers.count, 2"),
        ({"dtype": "float16", "deepspeed": {"stage": 0}}, "dtype float16 needs deepspeed.stage 1, 2 or 3"),
        ({"deepspeed": {"stage": 2, "offload_parameters": True}}, "offload_parameters needs stage 3"),
        ({"dtype": "auto", "deepspeed": {"stage": 0, "offload_optimizer": True}}, "offload_optimizer needs stage"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        TuneTeacherRecipe.parse({**RECIPE, **changes})
    assert said in str(refused.value)
