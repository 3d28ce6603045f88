"""Tasks of retraining: losses of a model's outputs, with labels or without, and the error that is to fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from raycloud.errors import RecipeError
from raycloud.retrain.recipe import Supervision, TaskName
from raycloud.retrain.samples import IGNORE
from raycloud.training.loop import Loss

LossOf = Callable[[Tensor, Tensor], Loss]
"""Loss of logits (B, C) or (B, T, C) with labels (B,) or (B, T)."""


@dataclass(frozen=True)
class RetrainTask:
    """Task of a model."""

    name: TaskName
    loss: LossOf
    """Loss with labels."""
    unlabelled: LossOf | None
    """Loss that needs no annotation; of language modelling the labels are the text's own next tokens. None if the task
    has none."""
    error: LossOf
    """Error that decides: the share of wrong predictions, or the mean negative log likelihood of a token in nats."""

    def loss_of(self, supervision: Supervision) -> LossOf:
        """Return the loss of a supervision.

        Raises:
            RecipeError: the task has no loss without labels.
        """
        if supervision == "labels":
            return self.loss
        if self.unlabelled is None:
            raise RecipeError(f"supervision is none; allowed for {self.name}: labels")
        return self.unlabelled


def cross_entropy(logits: Tensor, labels: Tensor) -> Loss:
    """Cross entropy of labelled positions, summed."""
    flat, known = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    kept = known != IGNORE
    count = int(kept.sum())
    if count < len(known):
        flat, known = flat[kept], known[kept]
    total = functional.cross_entropy(_wide(flat), known, reduction="sum")
    return Loss(total, count, {})


def wrong(logits: Tensor, labels: Tensor) -> Loss:
    """Number of labelled positions whose likeliest class is another one."""
    kept = labels != IGNORE
    misses = (logits.argmax(-1) != labels) & kept
    return Loss(misses.sum().float(), int(kept.sum()), {})


def entropy(logits: Tensor, labels: Tensor, most: float = 0.4) -> Loss:
    """Entropy of predictions that are sure enough, without labels (EATA, Niu et al. 2022, arXiv 2204.02610, eq. 2).

    A prediction counts if its entropy is below ``most`` · ln(classes), with weight exp(most · ln(classes) − entropy).
    """
    log = functional.log_softmax(_wide(logits), -1)
    each = -(log.exp() * log).sum(-1)
    bound = most * math.log(logits.shape[-1])
    weight = ((bound - each).exp() * (each < bound)).detach()
    return Loss((weight * each).sum(), each.numel(), {})


TASKS: Mapping[TaskName, RetrainTask] = {
    "classification": RetrainTask("classification", cross_entropy, entropy, wrong),
    "token_tagging": RetrainTask("token_tagging", cross_entropy, entropy, wrong),
    # Text is its own label: without labels the input's own perplexity falls (TLM, Hu et al. 2025, arXiv 2505.20633).
    "language_modelling": RetrainTask("language_modelling", cross_entropy, cross_entropy, cross_entropy),
}
"""Tasks by name. The labels of ``language_modelling`` are the next tokens."""


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
