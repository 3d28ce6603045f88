"""Samples of the domains of a recipe's data, in parts of which none shares a text or an image with another."""

from __future__ import annotations

import hashlib
from typing import Literal, Protocol

import torch

from raycloud.data.splits import Row, split_of
from raycloud.errors import DataError
from raycloud.retrain.samples import Samples
from raycloud.training.seeding import derive_seed

DataPart = Literal["source", "window", "clean", "test"]
"""``source`` trains the source model, windows are drawn from ``window``, ``clean`` calibrates the detector of drift,
``test`` evaluates. Only the source domain has a part ``source``."""


class DomainData(Protocol):
    """Data of several domains for one model."""

    def samples(self, domain: str, part: DataPart) -> Samples:
        """Samples of a part of a domain.

        Raises:
            DataError: there is no such domain, or it has nothing in this part.
        """
        ...


class CachedDomains:
    """Domains whose samples are read and encoded once.

    Args:
        data: the domains.
    """

    def __init__(self, data: DomainData) -> None:
        self._data = data
        self._known: dict[tuple[str, DataPart], Samples] = {}

    def samples(self, domain: str, part: DataPart) -> Samples:
        """Samples of a part of a domain; see :class:`DomainData`."""
        if (domain, part) not in self._known:
            self._known[domain, part] = self._data.samples(domain, part)
        return self._known[domain, part]


def part_of(row: Row, source: bool) -> DataPart:
    """Part of a row: a function of its content; the source model gets half of what windows would."""
    split = split_of(row)
    if split == "train" and source:
        key = repr(sorted((name, str(value)) for name, value in row.items()))
        return "source" if hashlib.sha256(key.encode()).digest()[2] % 2 else "window"
    return {"train": "window", "valid": "clean", "test": "test"}[split]  # type: ignore[return-value]


def window_samples(data: DomainData, domain: str, occurrence: int, size: int, *seed: int | str) -> Samples:
    """Samples of an edge's window.

    Windows of one domain are disjoint until all of its samples have been used.

    Args:
        data: data of the edge.
        domain: domain of the window.
        occurrence: number of windows of this domain before it.
        size: number of samples.
        seed: key of the order, such as (seed, name of the edge).

    Raises:
        DataError: the domain has too few samples.
    """
    found = data.samples(domain, "window")
    if len(found) < size:
        raise DataError(f"domain '{domain}' has {len(found)} samples for windows; samples={size} must be at most these")
    each = len(found) // size
    lap, place = divmod(occurrence, each)
    generator = torch.Generator().manual_seed(derive_seed("window", domain, lap, *seed))
    order = torch.randperm(len(found), generator=generator)
    return found.select(order[place * size : (place + 1) * size])
