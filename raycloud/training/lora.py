"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on the linear maps of a model's blocks, made by ``peft``.

Adapters are injected into the model itself, which stays a ``transformers`` model, so its blocks and head are found as
before. Adapters are saved as a PEFT directory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from raycloud.checksums import verify
from raycloud.errors import ModelError
from raycloud.models.checkpoint import ADAPTERS
from raycloud.models.configuration import json_object
from raycloud.models.loading import quiet_transformers
from raycloud.models.roles import ROLES, Role, role_paths, stacked_matrices
from raycloud.models.segments import Segment
from raycloud.models.structure import blocks_of
from raycloud.models.texts import save_end_ids
from raycloud.models.twin import auto_class
from raycloud.models.weights import Weights, copy_weights, weights_of
from raycloud.training.recipe import LoraRecipe
from raycloud.training.seeding import derive_seed

if TYPE_CHECKING:  # importing peft takes a second, and most recipes have no adapters
    from peft import LoraConfig

_EXPERT_ROLES: frozenset[Role] = frozenset(("ffn_gate", "ffn_up", "ffn_down"))
_NAME = "default"
_PREFIX = "base_model.model."
"""Prefix of the parameter names in PEFT's files."""


def linear_maps(blocks: Iterable[nn.Module]) -> dict[str, type[nn.Module]]:
    """Linear maps inside the blocks of a model without adapters: last part of the name -> module class."""
    return {name.rpartition(".")[2]: kind for block in blocks for name, kind in _paths(block).items()}


def _paths(block: nn.Module) -> dict[str, type[nn.Module]]:
    """Linear maps of a block by path, with their classes."""
    return {
        name: kind for name, module in block.named_modules() for kind in (nn.Linear, Conv1D) if isinstance(module, kind)
    }


def check_targets(config: PretrainedConfig, recipe: LoraRecipe) -> frozenset[str]:
    """Check that a causal LM has the linear maps that a recipe names.

    Returns:
        Paths below a block of the maps whose roles it names; see :func:`maps_of_roles`.

    Raises:
        ModelError: a named map is missing, or no map has a named role.
    """
    if recipe.target_modules is None:
        return frozenset()
    return maps_of_roles(config, recipe, _maps_of_model(config))


def _maps_of_model(config: PretrainedConfig) -> dict[str, type[nn.Module]]:
    """Linear maps inside the blocks of the models of a configuration."""
    return linear_maps(_blocks_of_model(config))


def _blocks_of_model(config: PretrainedConfig) -> nn.ModuleList:
    """Blocks of the models of a configuration, without memory."""
    with torch.device("meta"):
        return blocks_of(auto_class(config).from_config(config, trust_remote_code=False))


def experts_left_out(config: PretrainedConfig, recipe: LoraRecipe) -> str | None:
    """Sentence on the experts that a recipe's adapters would be expected on and are not: those in fused tensors.

    Adapters are added to linear maps, and a fused tensor holds the matrices of all experts of a block.

    Returns:
        One line; None if there are no such experts, or the recipe asks for neither all maps nor a role of theirs.
    """
    if recipe.target_modules is not None and not _EXPERT_ROLES.intersection(recipe.target_modules):
        return None
    fused = dict.fromkeys(path for block in _blocks_of_model(config) for path in stacked_matrices(block))
    if not fused:
        return None
    return (
        f"lora: the experts of a '{config.model_type}' model are not adapted: {', '.join(fused)} hold the matrices of "
        "all experts of a block in one tensor"
    )


def maps_of_roles(config: PretrainedConfig, recipe: LoraRecipe, maps: Collection[str]) -> frozenset[str]:
    """Paths below a block of the maps whose roles a recipe names; what is the name of a map is taken as such.

    Raises:
        ModelError: a name is neither a map's nor a role, or no map has the role.
    """
    roles = [name for name in recipe.target_modules or () if name not in maps]
    _check_names([name for name in roles if name not in ROLES], maps)
    if not roles:
        return frozenset()
    paths: dict[str, tuple[str, ...]] = {str(role): held for role, held in role_paths(config).items()}
    for name in roles:
        if not paths[name]:
            known = ", ".join(role for role in ROLES if paths[role]) or "none"
            left_out = experts_left_out(config, recipe)
            raise ModelError(
                f"lora.target_modules: no linear map of a '{config.model_type}' model has the role '{name}'; "
                f"allowed roles: {known}{f' ({left_out})' if left_out else ''}"
            )
    return frozenset(path for name in roles for path in paths[name])


def _check_names(names: Collection[str], maps: Collection[str]) -> None:
    for name in names:
        if name not in maps:
            raise ModelError(
                f"lora.target_modules: no linear map '{name}' in the blocks; allowed: {', '.join(maps)}, "
                f"or a role: {', '.join(ROLES)}"
            )


def lora_config(
    root: nn.Module, blocks: Mapping[str, nn.Module], recipe: LoraRecipe, by_role: Collection[str] = ()
) -> LoraConfig | None:
    """PEFT configuration of a recipe for the blocks of a model.

    Args:
        root: module that PEFT adds adapters to.
        blocks: blocks by their paths below ``root``; the path of ``root`` itself is empty.
        recipe: settings of the adapters.
        by_role: result of :func:`maps_of_roles`.

    Returns:
        The configuration; None if the recipe names only roles that other blocks of the model have.

    Raises:
        ModelError: the blocks have no linear map of a name in ``recipe.target_modules``.
    """
    from peft import LoraConfig

    maps = linear_maps(blocks.values())
    names = [name for name in recipe.target_modules or maps if not (by_role and name in ROLES and name not in maps)]
    _check_names(names, maps)
    targets: list[str] | str = names
    adapted = [maps[name] for name in names]
    if by_role:
        found = {_join(path, name): kind for path, block in blocks.items() for name, kind in _paths(block).items()}
        chosen = {_join(path, name) for path in blocks for name in by_role} & found.keys()
        chosen |= _named(root, names)
        if not chosen:
            return None
        adapted = [found[path] for path in chosen if path in found]
        targets = [name for name in maps if any(_ends(path, name) for path in chosen)]
        if _named(root, targets) != chosen:  # names such as BERT's ``dense`` are of maps with several roles
            targets = "|".join(re.escape(path) for path in sorted(chosen))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT's hint is narrower than what it takes
        lora_dropout=recipe.dropout,
        target_modules=targets,
        fan_in_fan_out=all(kind is Conv1D for kind in adapted),
    )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _ends(path: str, name: str) -> bool:
    """Tell whether PEFT takes a path for one of a name."""
    return path == name or path.endswith(f".{name}")


def _named(root: nn.Module, names: Collection[str]) -> set[str]:
    """Paths of the modules to which PEFT would add adapters for some names."""
    return {path for path, _ in root.named_modules() if any(_ends(path, name) for name in names)}


def add_adapters(
    model: PreTrainedModel, recipe: LoraRecipe, seed: int, by_role: Collection[str] | None = None
) -> PreTrainedModel:
    """Add new adapters to a model and make only them trainable; the model's outputs are unchanged.

    The randomly initialised matrices are a function of the seed and of the model's shapes.

    Args:
        model: the model.
        recipe: settings of the adapters.
        seed: seed of the adapters.
        by_role: result of :func:`check_targets`, where roles cannot be found here: in a process in which new models are
            partitioned.

    Raises:
        ModelError: see :func:`lora_config` and :func:`maps_of_roles`.
    """
    from peft import get_peft_model

    chain = blocks_of(model)
    prefix = next(name for name, module in model.named_modules() if module is chain)
    blocks = {f"{prefix}.{index}": block for index, block in enumerate(chain)}
    if by_role is None:
        by_role = maps_of_roles(model.config, recipe, linear_maps(chain))
    config = lora_config(model, blocks, recipe, by_role)
    assert config is not None  # a role that no block has is an error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: PreTrainedModel = get_peft_model(model, config, adapter_name=_NAME).get_base_model()  # type: ignore[assignment]
    return adapted


def add_segment_adapters(segment: Segment, recipe: LoraRecipe, seed: int) -> None:
    """Add new adapters to a segment of a model and make only them trainable.

    The randomly initialised matrices are a function of the seed and of the block's number, so segments in different
    processes have the same adapters as one process that holds the whole model. A block without a named map, such as one
    with a recurrent state among blocks with attention, has none.

    Raises:
        ModelError: see :func:`lora_config`.
    """
    from peft import inject_adapter_in_model

    segment.requires_grad_(False)
    wanted, maps = recipe.target_modules or [], linear_maps(segment.blocks)
    if any(name not in maps and name not in ROLES for name in wanted):  # other blocks may have it
        maps = _maps_of_model(segment.config)
    by_role = maps_of_roles(segment.config, recipe, maps)
    for number, block in enumerate(segment.blocks, segment.lo):
        held = linear_maps([block])
        names = [name for name in wanted if name in held or name not in maps]
        if wanted and not names:
            continue
        here = recipe.model_copy(update={"target_modules": names or None})
        config = lora_config(block, {"": block}, here, by_role)
        if config is None:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, f"adapters of block {number}"))
            inject_adapter_in_model(config, block, adapter_name=_NAME)


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


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Save a model with merged adapters, and of one for texts its tokenizer and the ids that end its texts."""
    model = merge_adapters(model)
    if tokenizer is not None:
        save_end_ids(model, tokenizer)
    with quiet_transformers():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
