"""Recipes of training: the optimiser, the schedule and LoRA."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from raycloud.recipe import Recipe
from raycloud.training.schedule import Schedule


class TrainingRecipe(Recipe):
    """Settings of the optimiser, the schedule and the batches."""

    renamed: ClassVar[dict[str, str]] = {"clip": "max_grad_norm", "accumulate": "gradient_accumulation_steps"}

    lr: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    lr_floor: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the schedule, as a share of the peak."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up: ``constant``, ``linear`` or ``cosine``."""
    warmup_steps: int = Field(0, ge=0)
    """Number of first optimiser steps in which the learning rate rises to its peak."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices; biases and norms have none."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    batch_size: int = Field(32, gt=0)
    """Number of samples in a micro-batch."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Number of micro-batches in an optimiser step."""
    gradient_checkpointing: bool = False


class LoraRecipe(Recipe):
    """Settings of low-rank adapters; the model's own weights are not trained."""

    renamed: ClassVar[dict[str, str]] = {"targets": "target_modules"}

    r: int = Field(16, gt=0)
    """Rank of an adapter."""
    alpha: float = Field(64.0, gt=0)
    """Scale: an adapter's output is multiplied by ``alpha / r``."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability of an adapter's input."""
    target_modules: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    """Linear maps inside a block, by name, such as ``q_proj``, or by role in any model: ``query``, ``key``, ``value``,
    ``attention_output``, ``ffn_gate``, ``ffn_up``, ``ffn_down``; None for all of them. A map's name comes first."""
