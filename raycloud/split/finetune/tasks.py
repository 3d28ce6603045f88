"""What is learned from a batch: a head on the rows that come back to the edge, and its loss. Both stay there."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from raycloud.data.batches import IGNORE, Batch
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
