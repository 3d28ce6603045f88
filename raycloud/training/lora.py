"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the linear maps of a model's blocks, made by ``peft``.

Adapters are injected into the model itself, which stays a ``transformers`` model: everything that looks for its blocks
and head finds them. What is saved is a PEFT directory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from raycloud.errors import ModelError
from raycloud.models.anatomy import blocks_of
from raycloud.models.segments import Segment
from raycloud.models.weights import Weights, fill, weights_of
from raycloud.recipe import Recipe
from raycloud.training.draws import seed_of

if TYPE_CHECKING:  # takes a second to import, and most recipes have no adapters
    from peft import LoraConfig

_NAME = "default"
_PREFIX = "base_model.model."
"""What PEFT's files put before a parameter's name in the model."""


class LoraRecipe(Recipe):
    """Train low-rank adapters and leave the model's own weights as they are."""

    r: int = Field(16, gt=0)
    """Rank."""
    alpha: float = Field(64.0, gt=0)
    """An adapter's output is multiplied by ``alpha / r``."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """On an adapter's input."""
    targets: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    """Names of the linear maps inside a block, such as ``q_proj``; None for all of them."""


def linear_maps(blocks: Iterable[nn.Module]) -> dict[str, type[nn.Module]]:
    """The linear maps inside a plain model's blocks, by the last part of their name, and their kind."""
    return {
        name.rpartition(".")[2]: kind
        for block in blocks
        for name, module in block.named_modules()
        for kind in (nn.Linear, Conv1D)
        if isinstance(module, kind)
    }


def check_targets(config: PretrainedConfig, recipe: LoraRecipe) -> None:
    """Whether a causal LM has the maps that a recipe names.

    Raises:
        ModelError: it has not.
    """
    if recipe.targets is None:
        return
    with torch.device("meta"):
        maps = linear_maps(blocks_of(AutoModelForCausalLM.from_config(config)))
    _chosen(recipe, maps)


def _chosen(recipe: LoraRecipe, maps: Collection[str]) -> list[str]:
    for name in recipe.targets or ():
        if name not in maps:
            raise ModelError(f"lora.targets: no linear map '{name}' in the blocks; allowed: {', '.join(maps)}")
    return recipe.targets or list(maps)


def lora_config(blocks: Iterable[nn.Module], recipe: LoraRecipe) -> LoraConfig:
    """The recipe as PEFT has it, for these blocks.

    Raises:
        ModelError: they have no map of a name that the recipe gives.
    """
    from peft import LoraConfig

    maps = linear_maps(blocks)
    targets = _chosen(recipe, maps)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT's hint is narrower than what it takes
        lora_dropout=recipe.dropout,
        target_modules=targets,
        fan_in_fan_out=all(maps[name] is Conv1D for name in targets),
    )


def attach(model: PreTrainedModel, recipe: LoraRecipe, seed: int) -> PreTrainedModel:
    """Put fresh adapters into a model, which computes what it did before, and leave only them to train.

    Their random halves are a function of the seed and of the model's shapes.

    Raises:
        ModelError: see :func:`lora_config`.
    """
    from peft import get_peft_model

    config = lora_config(blocks_of(model), recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: PreTrainedModel = get_peft_model(model, config, adapter_name=_NAME).get_base_model()  # type: ignore[assignment]
    return adapted


def adapt(segment: Segment, recipe: LoraRecipe, seed: int) -> None:
    """Likewise for a part of a model, wherever the other parts are.

    The random halves are a function of the seed and of a block's number, so that parts in different places have the
    adapters of the whole model.

    Raises:
        ModelError: see :func:`lora_config`.
    """
    from peft import inject_adapter_in_model

    segment.requires_grad_(False)
    for number, block in enumerate(segment.blocks, segment.lo):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, f"adapters of block {number}"))
            inject_adapter_in_model(lora_config([block], recipe), block, adapter_name=_NAME)


def adapter_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' parameters by name, detached, not copied; none in a plain model."""
    return {name: tensor for name, tensor in weights_of(model).items() if f".{_NAME}." in name and ".lora_" in name}


def learnt_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """What training changes: the adapters where there are any, everything otherwise."""
    return adapter_of(model) or weights_of(model)


def load_learnt(model: PreTrainedModel, weights: Weights) -> None:
    """Copy what :func:`learnt_weights` gave into a model.

    Raises:
        ModelError: they are not exactly this model's.
    """
    fill(learnt_weights(model), weights)


def save_adapter(model: PreTrainedModel, folder: Path, base: str | None = None) -> None:
    """Write a model's adapters as ``peft.PeftModel.from_pretrained`` reads them.

    Args:
        model: with adapters.
        folder: exists already.
        base: the name of the model that they belong to, where it has one.
    """
    config: LoraConfig = model.peft_config[_NAME]  # type: ignore[assignment]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    weights = {
        _PREFIX + name.replace(f".{_NAME}.", "."): tensor.contiguous() for name, tensor in adapter_of(model).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PreTrainedModel:
    """Put saved adapters into a model.

    Raises:
        ModelError: they are not there, cannot be read or belong to another model.
    """
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):  # PEFT would go on to a pickle, and to the hub
        if not (folder / name).is_file():
            raise ModelError(f"adapter directory '{folder}' holds no {name}")
    try:
        loaded = PeftModel.from_pretrained(model, folder, adapter_name=_NAME, is_trainable=trainable)
    except Exception as error:  # the formats and PEFT's own checks raise many kinds
        raise ModelError(f"cannot load the adapter '{folder}': {str(error).strip().splitlines()[0]}") from error
    adapted: PreTrainedModel = loaded.get_base_model()  # type: ignore[assignment]
    return adapted


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Add the adapters to the weights that they belong to, in place; the model is a plain one again, or still is."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)
