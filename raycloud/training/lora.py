"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the linear maps of a model's blocks, made by ``peft``.

Adapters are injected into the model itself, which stays a ``transformers`` model, so its blocks and head are found as
before. Adapters are saved as a PEFT directory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from raycloud.checksums import verify
from raycloud.errors import ModelError
from raycloud.models.checkpoint import ADAPTERS
from raycloud.models.configuration import json_object
from raycloud.models.loading import quiet_transformers
from raycloud.models.segments import Segment
from raycloud.models.structure import blocks_of
from raycloud.models.texts import save_end_ids
from raycloud.models.weights import Weights, copy_weights, weights_of
from raycloud.training.recipe import LoraRecipe
from raycloud.training.seeding import derive_seed

if TYPE_CHECKING:  # importing peft takes a second, and most recipes have no adapters
    from peft import LoraConfig

_NAME = "default"
_PREFIX = "base_model.model."
"""Prefix of the parameter names in PEFT's files."""


def linear_maps(blocks: Iterable[nn.Module]) -> dict[str, type[nn.Module]]:
    """Linear maps inside the blocks of a model without adapters: last part of the name -> module class."""
    return {
        name.rpartition(".")[2]: kind
        for block in blocks
        for name, module in block.named_modules()
        for kind in (nn.Linear, Conv1D)
        if isinstance(module, kind)
    }


def check_targets(config: PretrainedConfig, recipe: LoraRecipe) -> None:
    """Check that a causal LM has the linear maps that a recipe names.

    Raises:
        ModelError: a named map is missing.
    """
    if recipe.target_modules is None:
        return
    with torch.device("meta"):
        maps = linear_maps(blocks_of(AutoModelForCausalLM.from_config(config, trust_remote_code=False)))
    _target_modules(recipe, maps)


def _target_modules(recipe: LoraRecipe, maps: Collection[str]) -> list[str]:
    for name in recipe.target_modules or ():
        if name not in maps:
            raise ModelError(f"lora.target_modules: no linear map '{name}' in the blocks; allowed: {', '.join(maps)}")
    return recipe.target_modules or list(maps)


def lora_config(blocks: Iterable[nn.Module], recipe: LoraRecipe) -> LoraConfig:
    """PEFT configuration of a recipe for these blocks.

    Raises:
        ModelError: the blocks have no linear map of a name in ``recipe.target_modules``.
    """
    from peft import LoraConfig

    maps = linear_maps(blocks)
    targets = _target_modules(recipe, maps)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT's hint is narrower than what it takes
        lora_dropout=recipe.dropout,
        target_modules=targets,
        fan_in_fan_out=all(maps[name] is Conv1D for name in targets),
    )


def add_adapters(model: PreTrainedModel, recipe: LoraRecipe, seed: int) -> PreTrainedModel:
    """Add new adapters to a model and make only them trainable; the model's outputs are unchanged.

    The randomly initialised matrices are a function of the seed and of the model's shapes.

    Raises:
        ModelError: see :func:`lora_config`.
    """
    from peft import get_peft_model

    config = lora_config(blocks_of(model), recipe)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: PreTrainedModel = get_peft_model(model, config, adapter_name=_NAME).get_base_model()  # type: ignore[assignment]
    return adapted


def add_segment_adapters(segment: Segment, recipe: LoraRecipe, seed: int) -> None:
    """Add new adapters to a segment of a model and make only them trainable.

    The randomly initialised matrices are a function of the seed and of the block's number, so segments in different
    processes have the same adapters as one process that holds the whole model.

    Raises:
        ModelError: see :func:`lora_config`.
    """
    from peft import inject_adapter_in_model

    segment.requires_grad_(False)
    for number, block in enumerate(segment.blocks, segment.lo):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, f"adapters of block {number}"))
            inject_adapter_in_model(lora_config([block], recipe), block, adapter_name=_NAME)


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters of the adapters by name, detached, not copied; empty for a model without adapters."""
    return {name: tensor for name, tensor in weights_of(model).items() if f".{_NAME}." in name and ".lora_" in name}


def trainable_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights that training changes: the adapters if there are any, all weights otherwise."""
    return adapter_weights(model) or weights_of(model)


def load_trainable_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Copy a result of :func:`trainable_weights` into a model.

    Raises:
        ModelError: the names or shapes are not exactly this model's.
    """
    copy_weights(trainable_weights(model), weights)


def save_adapter(model: PreTrainedModel, folder: Path, base: str | None = None) -> None:
    """Save a model's adapters in the format that ``peft.PeftModel.from_pretrained`` reads.

    Args:
        model: a model with adapters.
        folder: an existing directory.
        base: name of the model that the adapters belong to; None if it has none.
    """
    config: LoraConfig = model.peft_config[_NAME]  # type: ignore[assignment]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    weights = {
        _PREFIX + name.replace(f".{_NAME}.", "."): tensor.contiguous()
        for name, tensor in adapter_weights(model).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PreTrainedModel:
    """Load saved adapters into a model.

    Raises:
        ModelError: the adapters are missing, cannot be read or belong to another model.
        ChecksumError: a file is not what the folder's ``checksums.json`` says.
    """
    from peft import PeftModel

    for name in ADAPTERS:  # PEFT would try a pickle file next, and then the hub
        if not (folder / name).is_file():
            raise ModelError(f"adapter directory '{folder}' holds no {name}")
    verify(folder)
    _check_adapter(json_object(folder / ADAPTERS[0], str(folder)), folder)
    try:
        loaded = PeftModel.from_pretrained(model, folder, adapter_name=_NAME, is_trainable=trainable)
    except Exception as error:  # the formats and PEFT's own checks raise many kinds
        raise ModelError(f"cannot load the adapter '{folder}': {str(error).strip().splitlines()[0]}") from error
    adapted: PreTrainedModel = loaded.get_base_model()  # type: ignore[assignment]
    return adapted


def _check_adapter(config: Mapping[str, Any], folder: Path) -> None:
    """Check that an adapter's configuration is plain LoRA and makes PEFT import or run nothing that the folder names.

    PEFT imports the module that ``megatron_core`` names where ``megatron_config`` is set, and that of ``auto_mapping``
    in its ``Auto`` classes; other kinds of adapters load the tokenizers and models that they name.

    Raises:
        ModelError: the check fails; the message names the field, the value and what is allowed.
    """
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    kind, core, parallel = (config.get(name) for name in ("peft_type", "megatron_core", "megatron_config"))
    theirs = library is None or (isinstance(library, str) and library.split(".")[0] == "transformers")
    for name, value, allowed, holds in (
        ("peft_type", kind, "LORA", kind == "LORA"),
        ("megatron_core", core, "null, megatron.core", core in (None, "megatron.core")),  # written where it is not used
        ("megatron_config", parallel, "null", parallel is None),
        ("auto_mapping", library, "null, a parent_library of transformers", theirs),
    ):
        if not holds:
            raise ModelError(
                f"'{folder}': {name} is {str(value)[:60]!r} in its {ADAPTERS[0]}; allowed: {allowed} "
                "(nothing that a model folder names is imported or run)"
            )


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Merge the adapters into the weights in place; return the model without adapters, unchanged if it had none."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model with merged adapters, its tokenizer and the ids that end its texts."""
    model = merge_adapters(model)
    save_end_ids(model, tokenizer)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
