"""Merging of parts trained in different places into one model, as of the end of a run or of an earlier round."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from raycloud.durable import write_atomically, write_folder
from raycloud.errors import ResultError
from raycloud.models.loading import load
from raycloud.models.segments import cut_segments
from raycloud.models.structure import pooler_of
from raycloud.models.weights import Weights
from raycloud.results import RECIPE
from raycloud.split.finetune.assembly import plan_of
from raycloud.split.finetune.group import EDGE
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.training.lora import save_model


def save_merged_model(recipe: SplitTuneRecipe, weights: Weights, folder: Path) -> None:
    """Save the recipe's model with the trained weights of its parts, in a folder that ``transformers`` loads.

    Args:
        recipe: recipe with the model and its cuts.
        weights: weights of ``first``, ``middle`` and ``last``; those of bottlenecks and heads are ignored.
        folder: folder to write to.

    Raises:
        ModelError: the model cannot be loaded.
    """
    pretrained = load(recipe.model, device="cpu", dtype="float32")
    model = pretrained.model
    plan = plan_of(recipe, model.config)
    first, middle, last = cut_segments(model, plan.start_block, plan.end_block)
    parts: dict[str, nn.Module] = {"first": first, "middle": middle, "last": last}
    if recipe.uses_pooler and (pooler := pooler_of(model)) is not None:
        parts["head.pooler"] = pooler
    with torch.no_grad():
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                if (learned := weights.get(f"{part}.{name}")) is not None:
                    parameter.copy_(learned)
    save_model(model, pretrained.tokenizer, folder)


def save_group(recipe: SplitTuneRecipe, shared: Weights, results: Path) -> None:
    """Save what edges that trained together share, and the model if that is all of it.

    Args:
        recipe: recipe of the edges.
        shared: weights of their group; those of the edges have the prefix ``edge/``.
        results: result directory, which gets ``group.safetensors`` and, unless parts are private, ``model/``.

    Raises:
        ModelError: the model cannot be loaded.
    """
    if recipe.rounds.parts == "averaged":
        learned = {name.removeprefix(EDGE): tensor for name, tensor in shared.items()}
        write_folder(results / "model", lambda folder: save_merged_model(recipe, learned, folder))
    plain = {name: tensor.contiguous() for name, tensor in shared.items()}
    write_atomically(results / "group.safetensors", save(plain), checksum=True)


def restore_group(results: Path, name: str, shared: Weights) -> None:
    """Write the model of a finished run again, from the weights of one of its versions.

    Args:
        results: result directory.
        name: name of the history; there is only one, without a name.
        shared: see :func:`save_group`.

    Raises:
        ResultError: the edges' parts are private, so that the model as a whole is nowhere.
        ModelError: the model that was fine-tuned cannot be loaded.
    """
    recipe = SplitTuneRecipe.load(results / RECIPE)
    if recipe.rounds.parts == "private":
        raise ResultError(
            f"rounds.parts=private in '{results}': the versions are of the cloud's blocks alone, and the edges keep no "
            "parts that fit earlier ones; allowed: averaged"
        )
    save_group(recipe, shared, results)
