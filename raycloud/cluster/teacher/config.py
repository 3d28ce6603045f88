"""DeepSpeed configuration made from a recipe, and the check that a given JSON agrees with the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.errors import RecipeError
from raycloud.training.precision import compute_dtype

_AUTO = "auto"
_OPTIMIZERS = ("Adam", "AdamW")


def weights_type(recipe: TuneTeacherRecipe, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights used in computation; stage 0 has only one copy of them, in float32."""
    if recipe.deepspeed.stage == 0:
        return torch.float32
    return compute_dtype(recipe.dtype, device) or torch.float32


def autocast_type(recipe: TuneTeacherRecipe, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of stage 0, which has float32 weights but multiplies in the recipe's dtype.

    None where products are computed in the weights' own dtype.
    """
    return compute_dtype(recipe.dtype, device) if recipe.deepspeed.stage == 0 else None


def deepspeed_config(recipe: TuneTeacherRecipe, device: torch.device) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``.

    Raises:
        RecipeError: the JSON that the recipe names cannot be read or contradicts the recipe.
    """
    kind, zero = weights_type(recipe, device), recipe.deepspeed
    settings: dict[str, Any] = {
        "train_batch_size": recipe.training.batch_size * recipe.training.gradient_accumulation_steps,
        "train_micro_batch_size_per_gpu": recipe.training.batch_size // recipe.workers.count,
        "gradient_accumulation_steps": recipe.training.gradient_accumulation_steps,
        "gradient_clipping": recipe.training.max_grad_norm,
        "bf16": {"enabled": kind == torch.bfloat16},
        "fp16": {"enabled": kind == torch.float16},
        "zero_optimization": {
            "stage": zero.stage,
            "offload_optimizer": {"device": "cpu" if zero.offload_optimizer else "none"},
            "offload_param": {"device": "cpu" if zero.offload_parameters else "none"},
        },
    }
    given = {} if zero.config is None else read_json(zero.config)
    source = f"deepspeed.config '{zero.config}'"
    _check_optimizer(given.pop("optimizer", {}), recipe, source)
    _check_scheduler(given.pop("scheduler", {}), source)
    merged = _merged(given, settings, source)
    # The optimizer is torch's own fused AdamW for every stage and device.
    merged |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if kind == torch.bfloat16:
        merged.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    merged.setdefault("steps_per_print", 1 << 30)
    return merged


def read_json(path: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        RecipeError: the file cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"deepspeed.config '{path}': {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"deepspeed.config '{path}' is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"deepspeed.config '{path}' must be an object, it is a {type(found).__name__}")
    return found


def _merged(given: dict[str, Any], ours: dict[str, Any], source: str, under: str = "") -> dict[str, Any]:
    """Merge a given configuration with that of the recipe.

    Equal values may be in both, and "auto" leaves the value to the recipe or to DeepSpeed.
    """
    merged = {
        key: _merged(value, {}, source, f"{under}{key}.") if isinstance(value, dict) else value
        for key, value in given.items()
        if value != _AUTO
    }
    for key, wanted in ours.items():
        if isinstance(wanted, dict):
            below = merged.get(key, {})
            if not isinstance(below, dict):
                raise RecipeError(f"{source}: {under}{key} is {below!r}; allowed: an object")
            merged[key] = _merged(below, wanted, source, f"{under}{key}.")
        elif merged.setdefault(key, wanted) != wanted:
            raise RecipeError(
                f'{source}: {under}{key} is {merged[key]!r}; allowed: the value of the recipe, {wanted!r}, or "auto"'
            )
    return merged


def _check_optimizer(given: dict[str, Any], recipe: TuneTeacherRecipe, source: str) -> None:
    if not given:
        return
    if given.get("type") not in _OPTIMIZERS:
        raise RecipeError(f"{source}: optimizer.type is {given.get('type')!r}; allowed: {', '.join(_OPTIMIZERS)}")
    training = recipe.training
    wanted = {
        "lr": training.lr,
        "betas": list(training.betas),
        "eps": 1e-8,
        "weight_decay": training.weight_decay,
        "torch_adam": True,
        "adam_w_mode": True,
    }
    for key, value in given.get("params", {}).items():
        if key not in wanted:
            raise RecipeError(f"{source}: unknown optimizer.params.{key}; allowed: {', '.join(wanted)}")
        if value not in (_AUTO, wanted[key]):
            raise RecipeError(
                f"{source}: optimizer.params.{key} is {value!r}; allowed: the value of the recipe, {wanted[key]!r}, "
                'or "auto"'
            )


def _check_scheduler(given: dict[str, Any], source: str) -> None:
    said = [key for key, value in given.get("params", {}).items() if value != _AUTO]
    if said:
        raise RecipeError(
            f'{source}: scheduler.params.{said[0]} is {given["params"][said[0]]!r}; allowed: no scheduler or "auto", '
            "training.schedule sets it"
        )
