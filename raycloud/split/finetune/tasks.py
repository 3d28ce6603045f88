"""What is learned from a batch: a head on the model's final rows, and its loss."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from raycloud.data.batches import IGNORE, Batch
from raycloud.link.frames import Body
from raycloud.models.segments import Segment
from raycloud.training.draws import drawing, seed_of
from raycloud.training.loop import Loss

Pooling = Literal["rows", "mean", "first"]
"""What of a text the head reads: every row, their mean, or the first one."""


class Task(Protocol):
    """A head and its loss."""

    pooling: Pooling
    head: nn.Module
    """What it adds to the model's last part."""

    def outputs(self, rows: Tensor, batch: Batch) -> Tensor:
        """What the head says of the model's final rows: (B, T, d), or (B, d) where they are pooled."""
        ...

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Summed over the labels."""
        ...


def pooled(rows: Tensor, valid: Tensor, pooling: Pooling) -> Tensor:
    """One row (B, d) for each text, from rows (B, T, d) of which some (B, T) are valid."""
    if pooling == "first":
        return rows[:, 0]
    weights = valid.to(rows.dtype)[:, :, None]
    return (rows * weights).sum(dim=1) / weights.sum(dim=1)


def outputs_of(task: Task, last: Segment, rows: Tensor, batch: Batch, back: Pooling) -> Tensor:
    """What a task's head says of a batch.

    Args:
        task: the head.
        last: the model's last part, which comes ahead of it.
        rows: at the second cut: (n, d) of the valid tokens, or (B, d) where they are pooled there.
        batch: which tokens are valid, and which are labelled.
        back: what of a text the rows are.
    """
    if back != "rows":
        return task.outputs(last.rows(rows[:, None])[:, 0], batch)
    padded = rows.new_zeros(*batch.valid.shape, rows.shape[-1])
    padded[batch.valid] = rows
    padded = last.rows(padded, valid=None if bool(batch.valid.all()) else batch.valid)
    if task.pooling != "rows":
        padded = pooled(padded, batch.valid, task.pooling)
    return task.outputs(padded, batch)


class TextHead(nn.Module):
    """A family's own pooler, if it has one and it is wanted, dropout, and a linear map.

    Args:
        width: of rows.
        outputs: numbers for each row.
        dropout: before the linear map.
        seed: of its weights, which are drawn with a deviation of 0.02 as BERT's are.
        pooler: taken over from a pretrained model.
    """

    def __init__(
        self, width: int, outputs: int, *, dropout: float = 0.1, seed: int = 0, pooler: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.pooler = pooler
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, outputs)
        with drawing({}, seed_of(seed, "head")), torch.no_grad():
            self.classifier.weight.normal_(std=0.02)
            self.classifier.bias.zero_()

    def forward(self, rows: Tensor) -> Tensor:
        """(..., d) to (..., outputs)."""
        # The pooler of a stock model takes all rows and picks the first itself.
        rows = rows if self.pooler is None else self.pooler(rows[:, None])
        return self.classifier(self.dropout(rows))


class Classification:
    """One of several classes for a text; labels (B,)."""

    def __init__(self, head: nn.Module, pooling: Pooling) -> None:
        self.head, self.pooling = head, pooling

    def outputs(self, rows: Tensor, batch: Batch) -> Tensor:
        """Logits (B, classes)."""
        return self.head(rows)

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Cross-entropy."""
        total = F.cross_entropy(outputs.float(), batch.labels, reduction="sum")
        return Loss(total, batch.targets, {"cross_entropy": total})


class Regression:
    """One number for a text; labels (B,)."""

    def __init__(self, head: nn.Module, pooling: Pooling) -> None:
        self.head, self.pooling = head, pooling

    def outputs(self, rows: Tensor, batch: Batch) -> Tensor:
        """(B,)."""
        return self.head(rows)[:, 0]

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Squared error."""
        total = F.mse_loss(outputs.float(), batch.labels.float(), reduction="sum")
        return Loss(total, batch.targets, {"squared_error": total})


class Span:
    """Where an answer begins and ends in a text; labels (B, 2), two targets a text."""

    pooling: Pooling = "rows"

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def outputs(self, rows: Tensor, batch: Batch) -> Tensor:
        """Logits (B, T, 2); padding is no place to begin or end."""
        blocked = torch.finfo(torch.float32).min
        return self.head(rows).float().masked_fill(~batch.valid[:, :, None], blocked)

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Cross-entropy of both ends."""
        total = F.cross_entropy(outputs, batch.labels, ignore_index=IGNORE, reduction="sum")
        return Loss(total, batch.targets, {"cross_entropy": total})


class Language:
    """The next token, by the model's own head; labels (B, T)."""

    pooling: Pooling = "rows"

    def __init__(self, last: Segment) -> None:
        self._last = last
        self.head: nn.Module = nn.Identity()  # the model's own belongs to its last part

    def outputs(self, rows: Tensor, batch: Batch) -> Tensor:
        """Logits (n, V) of the labelled tokens."""
        return self._last.logits(rows[batch.labels != IGNORE])

    def loss(self, outputs: Tensor, batch: Batch) -> Loss:
        """Cross-entropy."""
        total = F.cross_entropy(outputs.float(), batch.labels[batch.labels != IGNORE], reduction="sum")
        return Loss(total, batch.targets, {"cross_entropy": total})


class TaskTerms(Body):
    """What the head of a task of labelled texts is, and its loss."""

    kind: Literal["classification", "regression", "span"]
    outputs: int = Field(ge=1, le=2**16)
    """Numbers that the head says of a text, or of each of its tokens."""
    pooling: Pooling
    dropout: float = Field(ge=0, lt=1)

    @property
    def labels(self) -> int:
        """Of each text."""
        return 2 if self.kind == "span" else 1

    def task(self, width: int, seed: int, pooler: nn.Module | None) -> Task:
        """The head, as it begins, and its loss.

        Args:
            width: of rows.
            seed: of its weights.
            pooler: the model's own, if it has one, for ``pooling: first``.
        """
        first = self.pooling == "first"
        head = TextHead(width, self.outputs, dropout=self.dropout, seed=seed, pooler=pooler if first else None)
        match self.kind:
            case "classification":
                return Classification(head, self.pooling)
            case "regression":
                return Regression(head, self.pooling)
            case "span":
                return Span(head)
