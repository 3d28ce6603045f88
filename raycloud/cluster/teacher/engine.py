"""A model in a DeepSpeed engine: loading, the loss it computes, the optimiser it steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from raycloud.cluster.teacher.config import deepspeed_config, weights_type
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.cluster.teacher.shards import Shards
from raycloud.data.batches import IGNORE, Batch
from raycloud.models.loading import load, pick_device
from raycloud.models.segments import Segment
from raycloud.training.lora import attach

LOGITS_CHUNK = 1024
"""Tokens whose logits exist at a time."""


def deepspeed() -> Any:
    """The library, told which accelerator there is before it looks for itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed as library

    library.logger.setLevel("ERROR")
    # An op for inference that whoever comes first compiles: a minute, and a worker that is killed meanwhile leaves a
    # lock that all later ones wait at for ever.
    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return library


class ResponseLoss(nn.Module):
    """−log p of the labelled tokens of a batch, as a sum in float32.

    The head sees the rows of labelled tokens only, and no more than a chunk of them at a time.

    Args:
        model: with its head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.segment = Segment(model)

    def forward(self, ids: Tensor, valid: Tensor, labels: Tensor) -> Tensor:
        """Of token ids (B, T), which of them are real (B, T), and the next-token labels (B, T)."""
        wanted = labels != IGNORE
        rows = self.segment.rows(ids, valid=None if bool(valid.all()) else valid)[wanted]
        chunks = list(zip(rows.split(LOGITS_CHUNK), labels[wanted].split(LOGITS_CHUNK), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.stack([self._nll(some, which) for some, which in chunks]).sum()
        return torch.stack([checkpoint(self._nll, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    def _nll(self, rows: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.segment.logits(rows).float(), labels, reduction="sum")


@dataclass(frozen=True)
class Engine:
    """What a worker trains with."""

    engine: Any
    """DeepSpeed's."""
    named: dict[str, nn.Parameter]
    """The trained parameters, by their name in the model."""
    device: torch.device

    @classmethod
    def of(cls, recipe: TuneTeacherRecipe, begun: Shards | None) -> Engine:
        """Load the model and initialise, from a checkpoint where there is one.

        Raises:
            RecipeError: a given DeepSpeed configuration contradicts the recipe.
            ResultError: the checkpoint cannot be read or is of another model.
        """
        library, device = deepspeed(), pick_device(recipe.device)
        # Partitioning asks how many workers there are before anything else would have told the library.
        library.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
        settings = deepspeed_config(recipe, device)
        with _partitioned(recipe, settings):
            model = load(recipe.model, device="cpu" if recipe.deepspeed.stage == 3 else recipe.device).model
            model.to(weights_type(recipe, device))  # type: ignore[arg-type]
            if recipe.lora is not None:
                model = attach(model, recipe.lora, recipe.seed)
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
        return cls(engine, named, device)

    def nll(self, batch: Batch) -> Tensor:
        """The sum over its labelled tokens; see :class:`ResponseLoss`."""
        batch = batch.to(self.device)
        total: Tensor = self.engine(batch.ids, batch.valid, batch.labels)
        return total

    def step(self) -> float | None:
        """Count a micro-batch and, at an optimiser step's last one, update.

        Returns:
            The norm of all gradients before they were clipped; None between updates and where one was skipped.
        """
        engine, norm = self.engine, None
        boundary = engine.is_gradient_accumulation_boundary()
        if boundary and engine.zero_optimization_stage() == 0:
            # DeepSpeed clips plain float32 gradients and forgets what their norm was.
            norm = float(nn.utils.get_total_norm([one.grad for one in self.named.values() if one.grad is not None]))
        engine.step()
        if not boundary or not engine.was_step_applied():
            return None
        return norm if norm is not None else float(engine.get_global_grad_norm())

    def set_lr(self, lr: float) -> None:
        """For the next step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr


def _optimizer(named: Mapping[str, nn.Parameter], recipe: TuneTeacherRecipe) -> torch.optim.AdamW:
    """As :class:`~raycloud.training.loop.Trainer` has it: matrices decay, biases and norms do not."""
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
    """Under stage 3 no worker ever holds the whole model: ``transformers`` spreads tensors as it reads them."""
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


def _fill(library: Any, named: Mapping[str, nn.Parameter], begun: Shards) -> None:
    """The checkpoint's weights, in whatever type the model computes in."""
    for name, parameter in named.items():
        gathered = (
            library.zero.GatheredParameters([parameter], modifier_rank=0) if hasattr(parameter, "ds_id") else None
        )
        with gathered or contextlib.nullcontext(), torch.no_grad():
            if gathered is None or torch.distributed.get_rank() == 0:
                parameter.copy_(begun.weight(name))
