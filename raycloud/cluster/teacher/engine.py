"""Model in a DeepSpeed engine: its loading, loss and optimizer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from raycloud.cluster.teacher.config import autocast_type, deepspeed_config, weights_type
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.cluster.teacher.shards import ShardedCheckpoint
from raycloud.data.batches import IGNORE, Batch
from raycloud.models.checkpoint import Checkpoint
from raycloud.models.loading import check_model, load, pick_device, pick_dtype, quiet_transformers, resolve
from raycloud.models.segments import Segment
from raycloud.training.lora import add_adapters, check_targets
from raycloud.training.precision import autocast_to

LOGITS_CHUNK = 1024
"""Number of tokens whose logits are in memory at a time."""


def deepspeed() -> Any:
    """Import DeepSpeed and set its accelerator before it detects one itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed as library

    library.logger.setLevel("ERROR")
    # The first process that needs this inference op compiles it, which takes a minute. A worker killed meanwhile leaves
    # a lock for which all later ones wait forever.
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return library


class ResponseLoss(nn.Module):
    """Sum of −log p of the labelled tokens of a batch, in float32.

    The head gets the hidden states of labelled tokens only, at most ``LOGITS_CHUNK`` at a time.

    Args:
        model: causal language model with its head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.segment = Segment(model)

    def forward(self, ids: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of token ids (B, T), ``valid`` (B, T; False is padding) and next-token labels (B, T)."""
        wanted = labels != IGNORE
        hidden = self.segment.hidden(ids, valid=None if bool(valid.all()) else valid)[wanted]
        chunks = list(zip(hidden.split(LOGITS_CHUNK), labels[wanted].split(LOGITS_CHUNK), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.stack([self._nll(some, which) for some, which in chunks]).sum()
        return torch.stack([checkpoint(self._nll, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    def _nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.segment.logits(hidden).float(), labels, reduction="sum")


@dataclass(frozen=True)
class TeacherEngine:
    """Engine, trained parameters and device of one worker."""

    engine: Any
    """DeepSpeed engine."""
    named: dict[str, nn.Parameter]
    """Trained parameters by their name in the model."""
    device: torch.device
    autocast: torch.dtype | None
    """See :func:`~raycloud.cluster.teacher.config.autocast_type`."""

    @classmethod
    def of(cls, recipe: TuneTeacherRecipe, begun: ShardedCheckpoint | None) -> TeacherEngine:
        """Load the model and initialise the engine, from a checkpoint where there is one.

        Raises:
            RecipeError: a given DeepSpeed configuration contradicts the recipe.
            ResultError: the checkpoint cannot be read or is of another model.
        """
        library, device = deepspeed(), pick_device(recipe.device)
        # Partitioning needs the number of workers before anything else has set it in the library.
        library.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
        settings = deepspeed_config(recipe, device)
        # Roles are found in a small model of its own, which must not be partitioned.
        by_role = check_targets(check_model(resolve(recipe.model)), recipe.lora) if recipe.lora is not None else None
        with _partitioned(recipe, settings):
            model = (
                _load_partitioned(recipe.model)
                if recipe.deepspeed.stage == 3
                else load(recipe.model, device=recipe.device).model
            )
            model.to(weights_type(recipe, device))  # type: ignore[arg-type]
            if recipe.lora is not None:
                model = add_adapters(model, recipe.lora, recipe.seed, by_role)
        model.train()
        if recipe.training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        named = {name: one for name, one in model.named_parameters() if one.requires_grad}
        if begun is not None:
            _fill(library, named, begun)
        engine, *_ = library.initialize(
            model=ResponseLoss(model), optimizer=_optimizer(named, recipe), config=settings, dist_init_required=False
        )
        if begun is not None:
            begun.restore(engine, named)
        return cls(engine, named, device, autocast_type(recipe, device))

    def nll(self, batch: Batch) -> Tensor:
        """Return the sum of −log p over the batch's labelled tokens; see :class:`ResponseLoss`."""
        batch = batch.to(self.device)
        with autocast_to(self.autocast, self.device):
            total: Tensor = self.engine(batch.ids, batch.valid, batch.labels)
        return total

    def step(self) -> float | None:
        """Count a micro-batch; update the weights after the last one of an optimizer step.

        Returns:
            Norm of all gradients before clipping; None between updates and where an update was skipped.
        """
        engine, norm = self.engine, None
        boundary = engine.is_gradient_accumulation_boundary()
        if boundary and engine.zero_optimization_stage() == 0:
            # DeepSpeed clips plain float32 gradients and does not store their norm.
            norm = float(nn.utils.get_total_norm([one.grad for one in self.named.values() if one.grad is not None]))
        engine.step()
        if not boundary or not engine.was_step_applied():
            return None
        return norm if norm is not None else float(engine.get_global_grad_norm())

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr


def _optimizer(named: Mapping[str, nn.Parameter], recipe: TuneTeacherRecipe) -> torch.optim.AdamW:
    """Return AdamW as in :class:`~raycloud.training.loop.Trainer`: weight decay on matrices, not biases and norms."""
    training = recipe.training
    matrices = [one for one in named.values() if len(getattr(one, "ds_shape", one.shape)) > 1]
    known = {id(one) for one in matrices}
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": [one for one in named.values() if id(one) not in known], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, fused=True)


@contextlib.contextmanager
def _partitioned(recipe: TuneTeacherRecipe, settings: dict[str, Any]) -> Iterator[None]:
    """Partition the model while ``transformers`` reads it (stage 3 only): no worker ever holds all of it."""
    if recipe.deepspeed.stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def _load_partitioned(source: str) -> PreTrainedModel:
    """Load a model whose tensors are spread over the workers while they are read; our own loader cannot do that."""
    where = resolve(source)
    Checkpoint(where)  # compares the files with their checksums
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            where, dtype=pick_dtype("auto", torch.device("cpu")), use_safetensors=True, trust_remote_code=False
        )
    return model


def _fill(library: Any, named: Mapping[str, nn.Parameter], begun: ShardedCheckpoint) -> None:
    """Copy the checkpoint's weights into the parameters, in the dtype of the model."""
    for name, parameter in named.items():
        gathered = (
            library.zero.GatheredParameters([parameter], modifier_rank=0) if hasattr(parameter, "ds_id") else None
        )
        with gathered or contextlib.nullcontext(), torch.no_grad():
            if gathered is None or torch.distributed.get_rank() == 0:
                parameter.copy_(begun.weight(name))
