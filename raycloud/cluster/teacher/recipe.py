"""The recipe of a teacher's supervised fine-tuning."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from raycloud.data.recipe import DataRecipe
from raycloud.models.loading import Device, DType
from raycloud.recipe import Placement, Recipe
from raycloud.training.loop import TrainingRecipe
from raycloud.training.lora import LoraRecipe


class DeepSpeedRecipe(Recipe):
    """What DeepSpeed spreads over the workers (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054), and what it moves to
    the host's memory."""

    stage: Literal[0, 1, 2, 3] = 2
    """0 spreads nothing, 1 the optimiser's state, 2 gradients too, 3 also the weights."""
    offload_optimizer: bool = False
    """The optimiser's state lives and is updated in the host's memory."""
    offload_parameters: bool = False
    """Weights wait in the host's memory until they are computed with; stage 3 only."""
    config: str | None = None
    """A DeepSpeed JSON for everything else; where it speaks of what the recipe says, both must agree."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, stage is {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, stage is 0")
        return self


class WorkersRecipe(Recipe):
    """Processes that train together; each takes one ``cloud`` of its node."""

    count: int = Field(1, gt=0)
    placement: Placement = Placement()
    failures: int = Field(3, ge=0)
    """So many times they are started again from the last checkpoint when one of them dies."""


class CheckpointsRecipe(Recipe):
    """What a run goes on from."""

    every: int = Field(50, gt=0)
    """Optimiser steps; the held-out loss is measured with each."""
    keep: int = Field(2, gt=0)
    """The best ones by held-out loss, beside the latest."""


class HeldOutRecipe(Recipe):
    """Text that is never trained on."""

    split: Literal["valid", "test"] = "valid"
    samples: int = Field(256, gt=0)
    """Evenly spread over the split."""


class TuneTeacherRecipe(Recipe):
    """Fine-tune a causal language model on responses, all of it or low-rank adapters."""

    job: Literal["tune_teacher"] = "tune_teacher"
    output: str = "results/teacher"
    """The result directory; on several nodes a folder that all of them share."""
    seed: int = Field(10, ge=0)
    device: Device = "auto"
    dtype: DType = "auto"
    """Of the weights that are computed with; the optimiser keeps float32 ones. ``auto`` is bfloat16 where the device
    multiplies it natively."""
    threads: int = Field(0, ge=0)
    """CPU threads of each worker; 0 divides the node's cores among them."""
    model: str = "builtin:smollm2-135m-instruct"
    """A hub id, a directory, a GGUF file or a built-in name."""
    lora: LoraRecipe | None = None
    """Train adapters only; None trains everything."""
    data: DataRecipe = DataRecipe(source="builtin:instruct", format="alpaca")
    training: TrainingRecipe = TrainingRecipe(lr=2e-5)
    """``batch_size`` is that of all workers together: how many there are changes nothing but the time."""
    epochs: int = Field(1, gt=0)
    steps: int | None = Field(None, gt=0)
    """Optimiser steps in all; None for whole epochs."""
    deepspeed: DeepSpeedRecipe = DeepSpeedRecipe()
    workers: WorkersRecipe = WorkersRecipe()
    checkpoints: CheckpointsRecipe = CheckpointsRecipe()
    held_out: HeldOutRecipe = HeldOutRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        batch, workers = self.training.batch_size, self.workers.count
        if batch % workers:
            raise ValueError(f"training.batch_size is {batch}; allowed: a multiple of workers.count, {workers}")
        if self.dtype in ("bfloat16", "float16") and self.deepspeed.stage == 0:
            raise ValueError(f"dtype {self.dtype} needs deepspeed.stage 1, 2 or 3; stage 0 computes in float32")
        return self
