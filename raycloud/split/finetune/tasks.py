"""Tasks of split fine-tuning: a head on the model's final hidden states, and its loss."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from raycloud.data.batches import IGNORE, Batch
from raycloud.link.frames import Body
from raycloud.models.segments import Segment
from raycloud.training.loop import Loss
from raycloud.training.seeding import derive_seed, seeded

Pooling = Literal["none", "mean", "first"]
"""Pooling of a text's hidden states: every one (``none``), their mean, or the first one."""


class Task(Protocol):
    """Task: a head and its loss."""

    pooling: Pooling
    head: nn.Module
    """Head that the task adds to the model's last part."""

    def outputs(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Outputs of the head for the model's final hidden states: (B, T, d), or (B, d) if they are pooled."""
        ...

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Loss summed over the labels."""
        ...


def pooled(hidden: Tensor, valid: Tensor, pooling: Pooling) -> Tensor:
    """Pool hidden states (B, T, d) with the mask ``valid`` (B, T) to one vector per text (B, d)."""
    if pooling == "first":
        return hidden[:, 0]
    weights = valid.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def head_outputs(task: Task, last: Segment, hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    """Outputs of a task's head for a batch.

    Args:
        task: task with the head.
        last: the model's last part, before the head.
        hidden: hidden states at the second cut: (n, d) of the valid tokens, or (B, d) if they are pooled there.
        batch: batch with the valid and the labelled tokens.
        pooling: pooling of ``hidden``.
    """
    if pooling != "none":
        return task.outputs(last.hidden(hidden[:, None])[:, 0], batch)
    padded = hidden.new_zeros(*batch.valid.shape, hidden.shape[-1])
    padded[batch.valid] = hidden
    padded = last.hidden(padded, valid=None if bool(batch.valid.all()) else batch.valid)
    if task.pooling != "none":
        padded = pooled(padded, batch.valid, task.pooling)
    return task.outputs(padded, batch)


class TextHead(nn.Module):
    """Head of the model family's own pooler (optional), dropout, and a linear map.

    Args:
        width: width of hidden states.
        outputs: number of outputs per hidden state.
        dropout: dropout rate before the linear map.
        seed: seed of its weights, which have a standard deviation of 0.02 as BERT's.
        pooler: pooler of a pretrained model; None for none.
    """

    def __init__(
        self, width: int, outputs: int, *, dropout: float = 0.1, seed: int = 0, pooler: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.pooler = pooler
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, outputs)
        with seeded({}, derive_seed(seed, "head")), torch.no_grad():
            self.classifier.weight.normal_(std=0.02)
            self.classifier.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., d) to (..., outputs)."""
        # The pooler of a transformers model takes all hidden states and selects the first itself.
        hidden = hidden if self.pooler is None else self.pooler(hidden[:, None])
        return self.classifier(self.dropout(hidden))


class Classification:
    """Task of predicting one of several classes for a text; labels (B,)."""

    def __init__(self, head: nn.Module, pooling: Pooling) -> None:
        self.head, self.pooling = head, pooling

    def outputs(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Logits (B, classes)."""
        return self.head(hidden)

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Cross-entropy."""
        total = F.cross_entropy(outputs.float(), batch.labels, reduction="sum")
        return Loss(total, batch.targets, {"cross_entropy": total})


class Regression:
    """Task of predicting one number for a text; labels (B,)."""

    def __init__(self, head: nn.Module, pooling: Pooling) -> None:
        self.head, self.pooling = head, pooling

    def outputs(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Predictions (B,)."""
        return self.head(hidden)[:, 0]

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Squared error, summed over the texts."""
        total = F.mse_loss(outputs.float(), batch.labels.float(), reduction="sum")
        return Loss(total, batch.targets, {"squared_error": total})


class SpanExtraction:
    """Task of predicting where an answer begins and ends in a text; labels (B, 2), two targets per text."""

    pooling: Pooling = "none"

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def outputs(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Logits (B, T, 2); padding is masked."""
        blocked = torch.finfo(torch.float32).min
        return self.head(hidden).float().masked_fill(~batch.valid[:, :, None], blocked)

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Cross-entropy of both ends."""
        total = F.cross_entropy(outputs, batch.labels, ignore_index=IGNORE, reduction="sum")
        return Loss(total, batch.targets, {"cross_entropy": total})


class LanguageModelling:
    """Task of predicting the next token, with the model's own head; labels (B, T)."""

    pooling: Pooling = "none"

    def __init__(self, last: Segment) -> None:
        self._last = last
        self.head: nn.Module = nn.Identity()  # the model's own belongs to its last part

    def outputs(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Logits (n, V) of the labelled tokens."""
        return self._last.logits(hidden[batch.labels != IGNORE])

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Cross-entropy."""
        total = F.cross_entropy(outputs.float(), batch.labels[batch.labels != IGNORE], reduction="sum")
        return Loss(total, batch.targets, {"cross_entropy": total})


class HeadConfig(Body):
    """Configuration of the head and loss of a task with labelled texts."""

    kind: Literal["classification", "regression", "span"]
    outputs: int = Field(ge=1, le=2**16)
    """Number of outputs of the head for a text, or for each of its tokens."""
    pooling: Pooling
    dropout: float = Field(ge=0, lt=1)

    @property
    def labels(self) -> int:
        """Number of labels per text."""
        return 2 if self.kind == "span" else 1

    def task(self, width: int, seed: int, pooler: nn.Module | None) -> Task:
        """Create the task with an untrained head.

        Args:
            width: width of hidden states.
            seed: seed of the head's weights.
            pooler: the model's own pooler, if it has one, for ``pooling: first``.
        """
        first = self.pooling == "first"
        head = TextHead(width, self.outputs, dropout=self.dropout, seed=seed, pooler=pooler if first else None)
        match self.kind:
            case "classification":
                return Classification(head, self.pooling)
            case "regression":
                return Regression(head, self.pooling)
            case "span":
                return SpanExtraction(head)
