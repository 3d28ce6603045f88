"""A model in one piece from what its parts have learned in different places."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raycloud.models.anatomy import pooler_of
from raycloud.models.loading import load, quiet_transformers
from raycloud.models.segments import Segment
from raycloud.models.weights import Weights
from raycloud.split.finetune.assembly import plan_of
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.training.lora import merge


def save_whole(recipe: SplitTuneRecipe, weights: Weights, folder: Path) -> None:
    """Save the recipe's model, for ``transformers`` to load, with the weights that its parts have learned.

    Args:
        recipe: says which model it is and where it was cut.
        weights: of ``first``, ``middle`` and ``last``; those of codes and heads are left out.
        folder: to fill.

    Raises:
        ModelError: the model cannot be loaded.
    """
    pretrained = load(recipe.model, device="cpu", dtype="float32")
    model = pretrained.model
    plan = plan_of(recipe, model.config)
    parts: dict[str, nn.Module] = {
        "first": Segment(model, 0, plan.first, embed=True, head=False),
        "middle": Segment(model, plan.first, plan.second, embed=False, head=False),
        "last": Segment(model, plan.second, embed=False),
    }
    if recipe.first_rows and (pooler := pooler_of(model)) is not None:
        parts["head.pooler"] = pooler
    with torch.no_grad():
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                if (learned := weights.get(f"{part}.{name}")) is not None:
                    parameter.copy_(learned)
    save_model(model, pretrained.tokenizer, folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model, its adapters merged, with its tokenizer."""
    with quiet_transformers():
        merge(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
