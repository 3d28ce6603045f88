"""Merging of parts trained in different places into one model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from raycloud.models.loading import load
from raycloud.models.segments import cut_segments
from raycloud.models.structure import pooler_of
from raycloud.models.weights import Weights
from raycloud.split.finetune.assembly import plan_of
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
