"""State machine of rounds: opens a round, accepts contributions once, closes, aggregates, keeps versions.

It uses no link, file, clock or Ray. Its whole state can be written as plain data between any two calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from raycloud.models.weights import Weights, all_finite
from raycloud.rounds.aggregators import Aggregator
from raycloud.rounds.contribution import Contribution, WeightsForm, differing, form_of

RefusalReason = Literal[
    "unknown_member", "closed", "wrong_round", "repeated", "no_samples", "different_tensors", "not_finite"
]
Gate = Callable[[Weights], float]
"""Function that returns a held-out figure of weights; larger is better."""
_VERSION, _CONTRIBUTION, _INDEX = "version/", "contribution", "index"


@dataclass(frozen=True)
class Refusal:
    """Reason why a contribution was not accepted."""

    reason: RefusalReason
    detail: str


@dataclass(frozen=True)
class ClosedRound:
    """Result of a round that closed."""

    number: int
    members: tuple[str, ...]
    """Members whose contributions were accepted, in the order of the round's members."""
    missed: tuple[str, ...]
    """The other members."""
    result: Literal["new_version", "no_quorum", "gate_refused"]
    """``new_version``: the aggregate is the new version. ``no_quorum``: too few contributions, which are discarded; the
    former version stays. ``gate_refused``: the held-out figure fell; the former version stays."""
    samples: int
    """Number of samples or tokens of the contributions together."""


@dataclass
class _OpenRound:
    number: int
    members: tuple[str, ...]
    deadline: float
    quorum: int
    partial: bool
    form: WeightsForm | None
    removed: set[str] = field(default_factory=set)
    contributions: dict[str, Contribution] = field(default_factory=dict)


class RoundMachine:
    """Versions of a group's weights and the round that leads to the next one.

    Times are numbers of one clock that the caller chooses. If an open round is to be restored by another process, that
    clock must be one that both processes share.

    Args:
        weights: weights of the current version; empty if the first round makes them.
        version: number of the round that made them; -1 before the first round.
    """

    def __init__(self, weights: Weights, version: int = -1) -> None:
        self.weights: dict[str, Tensor] = dict(weights)
        """Weights of the current version."""
        self.version = version
        """Number of the round that made the weights."""
        self.ended = version
        """Latest round that closed, whether it made a version or not."""
        self._figure: float | None = None
        self._round: _OpenRound | None = None

    @property
    def figure(self) -> float | None:
        """Held-out figure of the weights, as the gate measured it; None without a gate."""
        return self._figure

    @property
    def number(self) -> int | None:
        """Number of the open round; None if no round is open."""
        return None if self._round is None else self._round.number

    def open(
        self,
        number: int,
        members: Iterable[str],
        *,
        deadline: float,
        quorum: int = 1,
        form: WeightsForm | None = None,
        partial: bool = False,
    ) -> None:
        """Open a round.

        Args:
            number: number of the round, larger than that of the current version. A round that made no version may be
                opened again.
            members: names of the members, in the order in which their contributions are aggregated.
            deadline: time at which the round closes without the missing members.
            quorum: least number of contributions that make a new version.
            form: form that contributions must have; None for that of the first contribution.
            partial: True if contributions may lack tensors or have parts of them, for coverage-weighted means.

        Raises:
            ValueError: a round is open, or an argument is invalid.
        """
        names = tuple(members)
        if self._round is not None:
            raise ValueError(f"round {self._round.number} is open")
        if number <= self.version:
            raise ValueError(f"round {number} is not after version {self.version}")
        if len(set(names)) < len(names) or not 1 <= quorum <= len(names):
            raise ValueError(f"quorum {quorum} of members {', '.join(names)}; allowed: 1 to all, each name once")
        if partial and form is None:
            raise ValueError("partial contributions need the form of the whole weights")
        self._round = _OpenRound(number, names, deadline, quorum, partial, form)

    def contributed(self, name: str) -> bool:
        """Return whether a contribution of the member to the open round was accepted."""
        return self._round is not None and name in self._round.contributions

    def accept(self, name: str, number: int, contribution: Contribution) -> Refusal | None:
        """Accept a member's contribution to a round, or return why it is refused.

        A member that was removed is not awaited, but its contribution counts if it arrives before the round closes.
        The tensors must not change afterwards.
        """
        current = self._round
        if current is None or number != current.number:
            if number <= self.ended:
                return Refusal("closed", f"round {number} is closed")
            where = "no round is open" if current is None else f"round {current.number} is open"
            return Refusal("wrong_round", f"the contribution is for round {number}, {where}")
        if name not in current.members:
            return Refusal("unknown_member", f"'{name}' is no member; members: {', '.join(current.members)}")
        if name in current.contributions:
            return Refusal("repeated", f"'{name}' has contributed to round {number}")
        if contribution.samples <= 0:
            return Refusal("no_samples", f"the contribution has {contribution.samples} samples; allowed: 1 or more")
        if current.form is not None and (odd := differing(contribution, current.form, partial=current.partial)):
            detail = f"{len(odd)} tensors are not those of the other edges, the first is '{odd[0]}'"
            return Refusal("different_tensors", detail)
        if not all_finite(contribution.weights):
            return Refusal("not_finite", "the weights are not all finite")
        if current.form is None:
            current.form = form_of(contribution.weights)
        current.contributions[name] = contribution
        return None

    def remove(self, name: str) -> None:
        """Stop waiting for a member in the open round; an accepted contribution stays."""
        if self._round is not None:
            self._round.removed.add(name)

    def readmit(self, name: str) -> None:
        """Wait again for a member that was removed from the open round."""
        if self._round is not None:
            self._round.removed.discard(name)

    def close(self, now: float, aggregate: Aggregator, gate: Gate | None = None) -> ClosedRound | None:
        """Close the open round if nobody is awaited or its deadline has passed; None if it goes on or none is open.

        Tensors that the aggregate lacks keep their values of the former version.

        Args:
            now: current time.
            aggregate: aggregator of the contributions.
            gate: held-out figure; the aggregate becomes the new version only if its figure is not below that of the
                former version. None for no gate.
        """
        current = self._round
        if current is None:
            return None
        awaited = set(current.members) - current.contributions.keys() - current.removed
        if awaited and now < current.deadline:
            return None
        members = tuple(name for name in current.members if name in current.contributions)
        missed = tuple(name for name in current.members if name not in current.contributions)
        samples = sum(one.samples for one in current.contributions.values())
        result: Literal["new_version", "no_quorum", "gate_refused"] = "no_quorum"
        if len(members) >= current.quorum:
            candidate = {**self.weights, **aggregate([current.contributions[name] for name in members])}
            result = "new_version" if self._passes(candidate, gate) else "gate_refused"
            if result == "new_version":
                self.weights, self.version = candidate, current.number
        self.ended, self._round = max(self.ended, current.number), None
        return ClosedRound(current.number, members, missed, result, samples)

    def _passes(self, candidate: Weights, gate: Gate | None) -> bool:
        """Return whether the candidate's figure does not fall; keep the figure of what becomes the version."""
        if gate is None:
            self._figure = None
            return True
        if self._figure is None and self.weights:
            self._figure = gate(self.weights)
        figure = gate(candidate)
        if math.isnan(figure) or (self._figure is not None and figure < self._figure):
            return False
        self._figure = figure
        return True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the whole state as tensors by name, for safetensors, and a JSON object. Tensors are not copied."""
        tensors = {_VERSION + name: tensor for name, tensor in self.weights.items()}
        about: dict[str, Any] = {"version": self.version, "ended": self.ended, "figure": self._figure, "round": None}
        if (current := self._round) is not None:
            for member, one in current.contributions.items():
                tensors |= {f"{_CONTRIBUTION}/{member}/{name}": tensor for name, tensor in one.weights.items()}
                for name, index in one.index.items():
                    tensors |= {f"{_INDEX}/{member}/{dimension}/{name}": at for dimension, at in index.items()}
            about["round"] = {
                "number": current.number,
                "members": list(current.members),
                "deadline": current.deadline,
                "quorum": current.quorum,
                "partial": current.partial,
                "form": current.form and {name: [dtype, list(shape)] for name, (dtype, shape) in current.form.items()},
                "removed": sorted(current.removed),
                "samples": {name: one.samples for name, one in current.contributions.items()},
            }
        return tensors, about

    @classmethod
    def from_state(cls, tensors: Weights, about: Mapping[str, Any]) -> RoundMachine:
        """Return the machine of a result of :meth:`state`.

        Raises:
            KeyError, TypeError, ValueError: it is no such result.
        """
        machine = cls(_with_prefix(tensors, _VERSION), about["version"])
        machine.ended, machine._figure = about["ended"], about["figure"]
        if (saved := about["round"]) is not None:
            form = saved["form"] and {name: (dtype, tuple(shape)) for name, (dtype, shape) in saved["form"].items()}
            machine._round = _OpenRound(
                saved["number"],
                tuple(saved["members"]),
                saved["deadline"],
                saved["quorum"],
                saved["partial"],
                form,
                set(saved["removed"]),
                {name: _restored(name, samples, tensors) for name, samples in saved["samples"].items()},
            )
        return machine


def _restored(member: str, samples: int, tensors: Weights) -> Contribution:
    index: dict[str, dict[int, Tensor]] = {}
    for key, at in _with_prefix(tensors, f"{_INDEX}/{member}/").items():
        dimension, name = key.split("/", 1)
        index.setdefault(name, {})[int(dimension)] = at
    return Contribution(_with_prefix(tensors, f"{_CONTRIBUTION}/{member}/"), samples, index)


def _with_prefix(tensors: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
