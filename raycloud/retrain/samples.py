"""Samples of a window: the arguments of a model's forward, and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not predicted."""


@dataclass(frozen=True)
class Samples:
    """Samples of one length; texts are padded to it."""

    inputs: Mapping[str, Tensor]
    """Arguments of the model's forward by name, each (n, ...)."""
    labels: Tensor
    """Classes (n,), classes of tokens (n, T), or for language models the next tokens (n, T); :data:`IGNORE` where
    nothing is predicted."""

    def __post_init__(self) -> None:
        sizes = {name: len(one) for name, one in self.inputs.items()} | {"labels": len(self.labels)}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"samples have parts of different sizes: {sizes}")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor | slice) -> Samples:
        """Samples with some of the numbers."""
        return Samples({name: one[rows] for name, one in self.inputs.items()}, self.labels[rows])

    def at_most(self, count: int) -> Samples:
        """At most so many of the samples in a random order, since files are often sorted by class.

        Which ones is a function of the numbers alone.
        """
        return self.select(torch.randperm(len(self), generator=torch.Generator().manual_seed(len(self)))[:count])

    def to(self, device: torch.device) -> Samples:
        """Copy on a device."""
        return Samples({name: one.to(device) for name, one in self.inputs.items()}, self.labels.to(device))

    def batches(self, size: int) -> Iterator[Samples]:
        """Split into batches, in order."""
        for at in range(0, len(self), size):
            yield self.select(slice(at, at + size))

    @staticmethod
    def cat(parts: Sequence[Samples]) -> Samples:
        """Samples of several, one after another."""
        first = parts[0]
        inputs = {name: torch.cat([one.inputs[name] for one in parts]) for name in first.inputs}
        return Samples(inputs, torch.cat([one.labels for one in parts]))
