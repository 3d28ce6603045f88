"""Recipe of a teacher's supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from raycloud.data.recipe import DataRecipe
from raycloud.models.devices import Device, DType
from raycloud.recipe import Bundle, Placement, Recipe
from raycloud.training.recipe import LoraRecipe, TrainingRecipe


class DeepSpeedRecipe(Recipe):
    """DeepSpeed settings: state that is spread over the workers (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054), and
    state that is moved to the host's memory."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 spreads nothing, 1 the optimizer state, 2 also gradients, 3 also weights."""
    offload_optimizer: bool = False
    """Keep and update the optimizer state in the host's memory; stage 1, 2 or 3."""
    offload_parameters: bool = False
    """Keep weights in the host's memory until they are used; stage 3 only."""
    config: str | None = None
    """Path of a DeepSpeed JSON for all other settings; settings that the recipe has as well must agree with it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, stage is {self.stage}")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, stage is 0")
        return self


class WorkersRecipe(Recipe):
    """Processes that train together; each takes one ``cloud`` resource of its node."""

    count: int = Field(1, gt=0)
    placement: Placement = Placement()
    failures: int = Field(3, ge=0)
    """Number of restarts from the last checkpoint after a worker dies."""


class CheckpointsRecipe(Recipe):
    """Checkpoints from which a run resumes."""

    every: int = Field(50, gt=0)
    """Optimizer steps between checkpoints; the held-out loss is measured with each."""
    keep: int = Field(2, gt=0)
    """Number of best checkpoints by held-out loss to keep, in addition to the latest."""


class TuneTeacherEvaluationRecipe(Recipe):
    """Text that is never used for training."""

    renamed: ClassVar[dict[str, str]] = {"samples": "held_out_samples"}

    split: Literal["valid", "test"] = "valid"
    held_out_samples: int = Field(256, gt=0)
    """Number of samples, evenly spread over the split."""


class TuneTeacherRecipe(Recipe):
    """Fine-tune a causal language model on responses, fully or with low-rank adapters."""

    renamed: ClassVar[dict[str, str]] = {"held_out": "evaluation"}
    may_change: ClassVar[frozenset[str]] = Recipe.may_change | {"deepspeed", "workers", "threads"}

    job: Literal["tune_teacher"] = "tune_teacher"
    output: str = "results/teacher"
    """Result directory; on several nodes a folder that all of them share."""
    seed: int = Field(10, ge=0)
    device: Device = "auto"
    dtype: DType = "auto"
    """Dtype of the weights used in computation; the optimizer keeps float32 ones. ``auto`` is bfloat16 where the device
    multiplies it natively. Stage 0 keeps float32 weights only and multiplies them in this dtype."""
    threads: int = Field(0, ge=0)
    """CPU threads of each worker; 0 divides the node's cores among the workers."""
    model: str = "builtin:smollm2-135m-instruct"
    """Hub id, directory, GGUF file or built-in name of the model."""
    lora: LoraRecipe | None = None
    """Low-rank adapters to train; None trains all weights."""
    data: DataRecipe = DataRecipe(source="builtin:instruct", format="alpaca")
    training: TrainingRecipe = TrainingRecipe(lr=2e-5)
    """Training settings. ``batch_size`` is that of all workers together, so their number changes only the time."""
    epochs: int = Field(1, gt=0)
    steps: int | None = Field(None, gt=0)
    """Optimizer steps in total; None for whole epochs."""
    deepspeed: DeepSpeedRecipe = DeepSpeedRecipe()
    workers: WorkersRecipe = WorkersRecipe()
    checkpoints: CheckpointsRecipe = CheckpointsRecipe()
    evaluation: TuneTeacherEvaluationRecipe = TuneTeacherEvaluationRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        batch, workers = self.training.batch_size, self.workers.count
        if batch % workers:
            raise ValueError(f"training.batch_size is {batch}; allowed: a multiple of workers.count, {workers}")
        if self.dtype == "float16" and self.deepspeed.stage == 0:
            raise ValueError("dtype float16 needs deepspeed.stage 1, 2 or 3, which scale the loss; it is 0")
        return self


def bundles(recipe: TuneTeacherRecipe) -> list[Bundle]:
    """Return the resources of each worker."""
    return [recipe.workers.placement.bundle("cloud")] * recipe.workers.count
