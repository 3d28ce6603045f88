"""Group of edges that train together: its members, their sessions, and the rounds of the group.

This module uses no link, file or clock. Round 0 is the beginning: each edge's bottleneck was fitted to its own texts,
and that of the first in the recipe's ``edges`` that contributed becomes everybody's, since a mean of bottlenecks with
different directions is no bottleneck. From round 1 on weights are aggregated, by default averaged by samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from raycloud.models.weights import Weights
from raycloud.rounds.aggregators import AGGREGATORS
from raycloud.rounds.contribution import Contribution, form_of
from raycloud.rounds.machine import RoundMachine
from raycloud.rounds.recipe import AggregatorName

MissReason = Literal["late", "absent"]
"""Reason for a missing contribution: ``late`` has a session and sent nothing in time, ``absent`` has no session."""
_CLOUD = "cloud/"
EDGE = "edge/"
"""Prefix of the names of the edges' weights among all that a group shares."""


@dataclass(frozen=True)
class GroupRoundOutcome:
    """Outcome of a round."""

    round: int
    members: tuple[str, ...]
    """Members whose contributions were aggregated."""
    missed: Mapping[str, MissReason]
    samples: int
    """Number of samples of their contributions together."""


class Group:
    """Members of a group by name, and the current round.

    A round waits for all members except those that left or were absent in an earlier round; these are waited for again
    once they arrive.

    Args:
        names: names of all members; sums are computed in their order.
        deadline_s: seconds from a round's first contribution until it ends without the missing ones.
        machine: rounds of the group, none of them open. Its version is the latest round that ended.
        aggregation: name of the aggregator.
        latest: outcome of the latest round, if there was one.
    """

    def __init__(
        self,
        names: Sequence[str],
        deadline_s: float,
        machine: RoundMachine,
        *,
        aggregation: AggregatorName = "mean",
        latest: GroupRoundOutcome | None = None,
    ) -> None:
        self.names, self.deadline_s, self.machine, self.latest = tuple(names), deadline_s, machine, latest
        self._aggregate = AGGREGATORS[aggregation]
        self._sessions: dict[str, bytes] = {}
        self._gone: set[str] = set()

    @property
    def ended(self) -> int:
        """Latest round that ended; -1 before the beginning."""
        return self.machine.version

    @property
    def cloud(self) -> dict[str, Tensor]:
        """The cloud's weights after the latest round."""
        return _with_prefix(self.machine.weights, _CLOUD)

    @property
    def edge(self) -> dict[str, Tensor]:
        """The edges' weights after the latest round; empty if these are private."""
        return _with_prefix(self.machine.weights, EDGE)

    @property
    def shared(self) -> dict[str, Tensor]:
        """All weights after the latest round; the edges' have the prefix ``edge/``."""
        return {name.removeprefix(_CLOUD): tensor for name, tensor in self.machine.weights.items()}

    def register(self, name: str, session: bytes) -> None:
        """Register a member's session, which replaces an older one of the same name."""
        self._sessions[name] = session
        self._gone.discard(name)
        self.machine.readmit(name)

    def unregister(self, name: str, session: bytes) -> None:
        """Unregister a member's ended session; unless it has a newer one, no round waits for it."""
        if self.is_current_session(name, session):
            del self._sessions[name]
            self._gone.add(name)
            self.machine.remove(name)

    def is_current_session(self, name: str, session: bytes) -> bool:
        """Return whether this is the member's latest session."""
        return self._sessions.get(name) == session

    def has_contributed(self, name: str) -> bool:
        """Return whether the member has contributed to the current round."""
        return self.machine.contributed(name)

    def add_contribution(self, name: str, cloud: Weights, edge: Weights, samples: int, now: float) -> None:
        """Add a member's contribution to the current round; an earlier one of the same round stays.

        Args:
            name: name of the member.
            cloud: weights of its copy of the cloud's part.
            edge: weights of its own part; empty if that is private.
            samples: number of samples that they were trained on.
            now: current time in seconds.

        Raises:
            ValueError: the contribution has other tensors than the others', or holds a non-finite number.
        """
        number = self.ended + 1
        if self.machine.number is None:
            # In rounds 0 and 1 only the contributions say which tensors are trained.
            form = form_of(self.machine.weights) if self.ended > 0 else None
            self.machine.open(number, self.names, deadline=now + self.deadline_s, form=form)
            for gone in self._gone:
                self.machine.remove(gone)
        refusal = self.machine.accept(name, number, Contribution(_joined(cloud, edge), samples))
        if refusal is not None and refusal.reason != "repeated":
            raise ValueError(refusal.detail)

    def close_if_due(self, now: float) -> GroupRoundOutcome | None:
        """End the round if all contributions have arrived or the deadline has passed; None if it continues."""
        closed = self.machine.close(now, _first if self.ended < 0 else self._aggregate)
        if closed is None or closed.result == "no_quorum":
            return None
        missed: dict[str, MissReason] = {name: "late" if name in self._sessions else "absent" for name in closed.missed}
        self._gone |= {name for name, why in missed.items() if why == "absent"}
        self.latest = GroupRoundOutcome(closed.number, closed.members, missed, closed.samples)
        return self.latest


def _first(contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    return dict(contributions[0].weights)


def _joined(cloud: Weights, edge: Weights) -> dict[str, Tensor]:
    return {
        **{_CLOUD + name: tensor for name, tensor in cloud.items()},
        **{EDGE + name: tensor for name, tensor in edge.items()},
    }


def _with_prefix(tensors: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
