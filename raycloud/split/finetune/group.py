"""Edges that train together: who is there, whose work a round waits for, and what becomes of it.

Nothing here knows a link, a file or a clock. Round 0 is the beginning: the edges' codes were each fitted to an edge's
own texts, and the first one's, by the order of names, becomes everybody's, since means of codes with different
directions are no code. From round 1 on weights are averaged, by the samples they were trained on (McMahan et al. 2017,
arXiv 1602.05629).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from raycloud.models.surgery.merging import weighted_average
from raycloud.models.weights import Weights

Why = Literal["late", "absent"]
"""``late`` has a session and brought nothing in time, ``absent`` has none."""


@dataclass(frozen=True)
class Work:
    """What an edge brings to a round."""

    cloud: Weights
    """Of its copy of the cloud's part."""
    edge: Weights
    """Of its own part; empty where that is private."""
    samples: int


@dataclass(frozen=True)
class Outcome:
    """How a round ended."""

    round: int
    members: tuple[str, ...]
    """Whose work is in it."""
    missed: Mapping[str, Why]


class Group:
    """The members of a group by name, and the round that they work for.

    A round waits for whoever is there and whoever was never expected in vain; those that left, or did not come to a
    round, are waited for again once they arrive.

    Args:
        names: of all members; sums are made in their order.
        deadline_s: how long the first work of a round waits for that of the others.
        ended: the latest round that ended; -1 before the beginning.
        cloud: the cloud's weights as that round left them.
        edge: the edges' likewise.
        latest: how that round ended, if there was one.
    """

    def __init__(
        self,
        names: Sequence[str],
        deadline_s: float,
        *,
        ended: int,
        cloud: Weights | None = None,
        edge: Weights | None = None,
        latest: Outcome | None = None,
    ) -> None:
        self.names, self.deadline_s, self.ended, self.latest = tuple(names), deadline_s, ended, latest
        self.cloud: dict[str, Tensor] = dict(cloud or {})
        self.edge: dict[str, Tensor] = dict(edge or {})
        self._sessions: dict[str, bytes] = {}
        self._gone: set[str] = set()
        self._works: dict[str, Work] = {}
        self._since = 0.0

    def arrive(self, name: str, session: bytes) -> None:
        """A member has a session; it takes the place of an older one of the same name."""
        self._sessions[name] = session
        self._gone.discard(name)

    def leave(self, name: str, session: bytes) -> None:
        """A member's session ended; unless it has a newer one, nobody waits for it."""
        if self.speaks(name, session):
            del self._sessions[name]
            self._gone.add(name)

    def speaks(self, name: str, session: bytes) -> bool:
        """Whether this is the member's latest session."""
        return self._sessions.get(name) == session

    def brought(self, name: str) -> bool:
        """Whether the member's work for the round under way is here."""
        return name in self._works

    def bring(self, name: str, work: Work, now: float) -> None:
        """A member's work for the round under way; what it brought before for the same round stays.

        Raises:
            ValueError: the work is not of the same tensors as the others', or holds what is no finite number.
        """
        others = list(self._works.values())[:1] + ([Work(self.cloud, self.edge, 1)] if self.ended > 0 else [])
        for other in others:
            _check_alike(work.cloud, other.cloud)
            _check_alike(work.edge, other.edge)
        if not all(bool(tensor.isfinite().all()) for tensor in (*work.cloud.values(), *work.edge.values())):
            raise ValueError("the weights are not all finite")
        if not self._works:
            self._since = now
        self._works.setdefault(name, work)

    def settle(self, now: float) -> Outcome | None:
        """End the round if everybody's work is here or the deadline has passed; None while it goes on."""
        if not self._works:
            return None
        waited_for = set(self.names) - self._works.keys() - self._gone
        if waited_for and now < self._since + self.deadline_s:
            return None
        members = tuple(name for name in self.names if name in self._works)
        works = [self._works[name] for name in members]
        number = self.ended + 1
        for mine, theirs in ((self.cloud, [one.cloud for one in works]), (self.edge, [one.edge for one in works])):
            mine.update(theirs[0] if number == 0 else average(theirs, [one.samples for one in works]))
        missed: dict[str, Why] = {
            name: "late" if name in self._sessions else "absent" for name in self.names if name not in members
        }
        self._gone |= {name for name, why in missed.items() if why == "absent"}
        self._works = {}
        self.ended, self.latest = number, Outcome(number, members, missed)
        return self.latest


def average(works: Sequence[Weights], samples: Sequence[int]) -> dict[str, Tensor]:
    """Σ samples · weights / Σ samples; numbers of coordinates, which all have alike, are the first one's."""
    floats = [{name: tensor for name, tensor in work.items() if tensor.is_floating_point()} for work in works]
    return {**works[0], **weighted_average(floats, samples)}


def _check_alike(mine: Weights, theirs: Weights) -> None:
    def odd(names: Iterable[str]) -> list[str]:
        return [n for n in names if mine[n].shape != theirs[n].shape or mine[n].dtype != theirs[n].dtype]

    if differ := sorted(mine.keys() ^ theirs.keys()) or odd(mine):
        raise ValueError(f"{len(differ)} tensors are not those of the other edges, the first is '{differ[0]}'")
