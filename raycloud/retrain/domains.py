"""Domains that were met before: their signatures and changes, and changes of two domains that point apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.retrain.drift import DomainSignature, TapStatistics
from raycloud.retrain.update import BlockUpdate

_DISTANCES, _MEANS, _DELTA = "distances", "means/", "delta/"


@dataclass(frozen=True)
class StoredDomain:
    """Domain that was met, and the changes against the source model that fitted it."""

    signature: DomainSignature
    deltas: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Return the domain as tensors by name, for safetensors."""
        found = {_DISTANCES: self.signature.distances}
        found |= {f"{_MEANS}{tap}": one for tap, one in enumerate(self.signature.means or ())}
        return found | {_DELTA + name: one for name, one in self.deltas.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> StoredDomain:
        """Return the domain of a result of :meth:`tensors`.

        Raises:
            KeyError: it is none.
        """
        taps = sum(name.startswith(_MEANS) for name in tensors)
        means = tuple(tensors[f"{_MEANS}{tap}"] for tap in range(taps)) or None
        deltas = {name.removeprefix(_DELTA): one for name, one in tensors.items() if name.startswith(_DELTA)}
        return StoredDomain(DomainSignature(tensors[_DISTANCES], means), deltas)


class DomainMemory:
    """Domains that were met, one for each place in the space of signatures.

    Args:
        source: statistics of the source, which measure how far signatures are apart.
        radius: largest distance of a signature to be taken for that of a known domain.
        domains: domains that are known already.
    """

    def __init__(self, source: TapStatistics, radius: float, domains: Iterable[StoredDomain] = ()) -> None:
        self._source, self._radius, self.domains = source, radius, list(domains)

    def nearest(self, signature: DomainSignature, count: int) -> list[StoredDomain]:
        """Return up to so many domains within twice the radius, nearest first: an edge tells which one fits it.

        Signatures are measured with the weights that an edge has, which change; one domain may look like two.
        """
        apart = [(signature.distance(one.signature, self._source), number) for number, one in enumerate(self.domains)]
        return [self.domains[number] for distance, number in sorted(apart)[:count] if distance <= 2 * self._radius]

    def store(self, signature: DomainSignature, deltas: Mapping[str, Tensor]) -> None:
        """Remember a domain; it takes the place of the one that it was recognised as."""
        number, met = self._nearest(signature), StoredDomain(signature, dict(deltas))
        if number is None:
            self.domains.append(met)
        else:
            self.domains[number] = met

    def _nearest(self, signature: DomainSignature) -> int | None:
        distances = [signature.distance(one.signature, self._source) for one in self.domains]
        if not distances or min(distances) > self._radius:
            return None
        return distances.index(min(distances))


def agreement(one: BlockUpdate, other: BlockUpdate, shapes: Mapping[str, torch.Size], prefix: str) -> float | None:
    """Cosine of two updates' changes of a block, over the entries that both have; None if they have none in common.

    Below 0 the two domains pull the block apart: their mean would help neither.

    Args:
        one: update of an edge.
        other: update of another edge.
        shapes: shapes of the whole parameters by name.
        prefix: path of the block, with a dot at its end.
    """
    dot, squares = 0.0, [0.0, 0.0]
    for name in one.deltas.keys() & other.deltas.keys():
        if name.startswith(prefix):
            left, right = (
                _common(update, against, name, shapes[name]) for update, against in ((one, other), (other, one))
            )
            dot += float((left * right).sum())
            squares = [squares[0] + float(left.square().sum()), squares[1] + float(right.square().sum())]
    return dot / (squares[0] * squares[1]) ** 0.5 if all(squares) else None


def _common(update: BlockUpdate, other: BlockUpdate, name: str, shape: torch.Size) -> Tensor:
    """Changes of a parameter at the entries that another update has too, in the order of the whole parameter."""
    found = update.deltas[name].double()
    for dim, size in enumerate(shape):
        mine, theirs = (one.index.get(name, {}).get(dim) for one in (update, other))
        have = torch.arange(size) if mine is None else mine
        kept = torch.isin(have, torch.arange(size) if theirs is None else theirs)
        found = found.index_select(dim, have.argsort()[kept[have.argsort()]])
    return found
