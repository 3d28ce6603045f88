"""A group of edges at the cloud: what its members agreed on, and its rounds, kept in a file.

The file is what a cloud that was killed, or another replica, goes on from. Work for a round that has not ended is in
memory alone: whoever brought it trains on from its own checkpoint, and brings it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from raycloud.errors import TrainingError
from raycloud.link.hosting import Refused
from raycloud.models.weights import Weights
from raycloud.results import write_atomically
from raycloud.split.finetune.cloud import CloudSide
from raycloud.split.finetune.group import Group, Outcome, Work
from raycloud.split.finetune.messages import Begin, Meet, Met, Together
from raycloud.split.finetune.state import codes, learnt, state_of

_CLOUD, _EDGE = "cloud/", "edge/"


class Meeting:
    """A group, for one thread.

    Args:
        path: of its file; read if it is there.
        asked: what the first member to come asks for.

    Raises:
        TrainingError: the file cannot be read.
    """

    def __init__(self, path: Path, asked: Begin) -> None:
        terms = _together(asked)
        self._path, self._agreed = path, _terms(asked)
        self._steps, self._averaged = terms.steps, terms.averaged
        self._runs: dict[str, str] = {}
        if path.is_file():
            self._agreed, self._runs, self.group = read(path)
        else:
            self.group = Group(terms.edges, terms.deadline_s, ended=-1 if terms.averaged else 0)
        self.stale = False
        """Whether another host has taken the group on, so that nobody must meet here any more."""
        self._packed: tuple[int, bytes] | None = None

    def check(self, asked: Begin) -> None:
        """Whether a member asks for what the others do.

        Raises:
            Refused: it does not.
        """
        terms, mine = _together(asked), _terms(asked)
        if terms.name not in terms.edges:
            raise Refused("group", f"edge '{terms.name}' is none of the group's: {', '.join(terms.edges)}")
        if differ := [name for name in mine if mine[name] != self._agreed.get(name)]:
            raise Refused("group", f"the group '{terms.group}' was begun with another {', another '.join(differ)}")
        if asked.restore is None and self._runs.get(terms.name, asked.run) != asked.run:
            raise Refused(
                "group",
                f"edge '{terms.name}' has trained in group '{terms.group}' in another run; allowed: that run resumed, "
                "or another group",
            )

    def meet(
        self, name: str, session: bytes, run: str, asked: Meet, given: bytearray, side: CloudSide
    ) -> tuple[bool, Met]:
        """Take in a member's work; whether its round has ended, and where the group stands.

        Args:
            name: the member's.
            session: who speaks for it.
            run: the member's, whose checkpoints it goes on from.
            asked: see :class:`Meet`.
            given: the weights of its own, as safetensors.
            side: its copy of the cloud's part.

        Raises:
            Refused: another session speaks for it by now.
            ValueError: the work cannot be used.
        """
        self._heed(name, session)
        group = self.group
        if asked.round is not None and asked.round > group.ended + 1:
            raise Refused("group", f"work for round {asked.round} came in round {group.ended + 1}")
        if asked.round == group.ended + 1 and not group.brought(name):
            group.bring(name, Work(self._of(side, asked.round), _loaded(bytes(given)), asked.samples), time.monotonic())
            self._runs[name] = run
        if group.settle(time.monotonic()) is not None:
            self._keep()
        latest = group.latest
        told = Met(
            ended=group.ended,
            members=[] if latest is None else list(latest.members),
            missed={} if latest is None else dict(latest.missed),
        )
        return asked.round is None or asked.round <= group.ended, told

    def take(self, name: str, session: bytes, side: CloudSide) -> tuple[int, bytes]:
        """Put the group's weights into a member's copy of the cloud's part; the round, and the edges' as safetensors.

        Raises:
            Refused: another session speaks for it by now, or the group has not begun.
        """
        self._heed(name, session)
        if (ended := self.group.ended) < 0:
            raise Refused("group", "the group has not begun")
        side.join(ended * self._steps, self.group.cloud)
        if self._packed is None or self._packed[0] != ended:
            self._packed = (ended, save(self.group.edge) if self.group.edge else b"")
        return self._packed

    @property
    def ended(self) -> int:
        """The latest round that ended, as steps are told of it; work for the one after it is still of use."""
        return max(0, self.group.ended)

    def _heed(self, name: str, session: bytes) -> None:
        if self.stale:
            raise _gone()
        if not self.group.speaks(name, session):
            raise Refused("superseded", f"another session speaks for edge '{name}'")

    def _of(self, side: CloudSide, number: int) -> Weights:
        """A copy of what is averaged of a member's part here; where edges' parts are private, their codes are, too."""
        if number == 0:
            found: Mapping[str, Tensor] = codes(side.modules)
        elif self._averaged:
            found = state_of(side.modules, None)
        else:
            found = {name: tensor.detach() for name, tensor in learnt({"middle": side.middle}).items()}
        return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}

    def _keep(self) -> None:
        group = self.group
        # Where a router sends members of one group to several hosts, each must not average its own part of them.
        if self._path.is_file() and _about(self._path)["ended"] >= group.ended:
            self.stale = True
            raise _gone()
        tensors = {_CLOUD + name: tensor for name, tensor in group.cloud.items()}
        tensors |= {_EDGE + name: tensor for name, tensor in group.edge.items()}
        about = {
            "agreed": self._agreed,
            "runs": self._runs,
            "ended": group.ended,
            "latest": None if group.latest is None else asdict(group.latest),
        }
        write_atomically(self._path, save(tensors, {"group": json.dumps(about)}))


def read(path: Path) -> tuple[dict[str, Any], dict[str, str], Group]:
    """What the members of a group agreed on, the runs whose work they have brought, and the group after its round.

    Raises:
        TrainingError: the file cannot be read.
    """
    try:
        about = _about(path)
        agreed, runs = about["agreed"], about["runs"]
        tensors = load(path.read_bytes())
        latest = about["latest"]
        group = Group(
            agreed["edges"],
            agreed["deadline_s"],
            ended=about["ended"],
            cloud=_named(tensors, _CLOUD),
            edge=_named(tensors, _EDGE),
            latest=latest and Outcome(latest["round"], tuple(latest["members"]), latest["missed"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"cannot read the group's file '{path}': {error}") from None
    return agreed, runs, group


def _about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["group"])
    return about


def _gone() -> Refused:
    return Refused("gone", "the group goes on at another replica")


def _together(asked: Begin) -> Together:
    assert asked.together is not None
    return asked.together


def _terms(asked: Begin) -> dict[str, Any]:
    """All that members must ask for alike, as plain JSON."""
    alike = asked.model_dump(mode="json", exclude={"run", "restore", "together"})
    return {**alike, **_together(asked).model_dump(mode="json", exclude={"group", "name"})}


def _named(tensors: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _loaded(given: bytes) -> dict[str, Tensor]:
    try:
        return load(given) if given else {}
    except SafetensorError as error:
        raise ValueError(f"the edge's weights cannot be read: {error}") from None
