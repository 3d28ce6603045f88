"""Rounds of a group of edges at the cloud: the members' common configuration, and rounds saved in a folder.

A restarted cloud, or another replica, continues from the saved rounds. Contributions to a round that has not ended are
only in memory: their edges continue from their own checkpoints and send them again. If the latest round is damaged, the
group continues from the round before, and its members from a checkpoint that fits it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raycloud.errors import TrainingError
from raycloud.link.server import RequestRefused
from raycloud.models.weights import Weights
from raycloud.rounds.machine import RoundMachine
from raycloud.rounds.versions import VersionStore
from raycloud.split.finetune.checkpoints import (
    CheckpointStore,
    bottleneck_tensors,
    latest_usable,
    state_of,
    trainable_parameters,
)
from raycloud.split.finetune.cloud import CloudTrainer
from raycloud.split.finetune.group import Group, GroupRoundOutcome
from raycloud.split.finetune.messages import GroupConfig, OpenTuning, PushReply, PushRequest, RoundReply

_METADATA_KEY = "group"
"""Key under which a saved round's metadata is kept beside its tensors."""


class GroupRounds:
    """Server of a group's rounds. Not thread-safe.

    Args:
        path: folder of its rounds; the server continues from the latest that is not damaged.
        opening: OPEN message of the first member.
        history: history to which every round adds a version of its number; None for none.

    Raises:
        TrainingError: all of its rounds are damaged.
    """

    def __init__(self, path: Path, opening: OpenTuning, history: VersionStore | None = None) -> None:
        config = _group_config(opening)
        self._rounds, self._agreed = CheckpointStore(path), _shared_config(opening)
        self._steps, self._averaged = config.steps, config.averaged
        self._runs: dict[str, str] = {}
        if (found := _latest_readable(self._rounds)) is not None:
            self._agreed, self._runs, self.group = found
        else:
            machine = RoundMachine({}, -1 if config.averaged else 0)
            self.group = Group(config.edges, config.deadline_s, machine, aggregation=config.aggregation)
        self.stale = False
        """True if another host has taken over the group, so that no member may use this server any more."""
        self._packed: tuple[int, bytes] | None = None
        self._history = history
        if history is not None:
            history.forget_after(self.group.ended)
            if self.group.ended == 0 and history.current < 0:  # the edges' own parts are private
                history.add({}, note="start")

    def check(self, opening: OpenTuning) -> None:
        """Check that a member's configuration equals the others', and that its checkpoint depends on no lost round.

        Raises:
            RequestRefused: the configuration differs, or the checkpoint is later than the group's rounds.
        """
        config, mine = _group_config(opening), _shared_config(opening)
        if config.name not in config.edges:
            raise RequestRefused("group", f"edge '{config.name}' is none of the group's: {', '.join(config.edges)}")
        if differ := [name for name in mine if mine[name] != self._agreed.get(name)]:
            raise RequestRefused(
                "group", f"the group '{config.group}' was begun with another {', another '.join(differ)}"
            )
        if opening.restore is None and self._runs.get(config.name, opening.run) != opening.run:
            raise RequestRefused(
                "group",
                f"edge '{config.name}' has trained in group '{config.group}' in another run; allowed: that run "
                "resumed, or another group",
            )
        last = (self.group.ended + 1) * self._steps
        if opening.restore is not None and opening.restore > last:
            # The edge treats this like a damaged checkpoint, and tries the one before.
            raise RequestRefused(
                "checkpoint",
                f"the checkpoint of step {opening.restore} is of a round after the group's, "
                f"which ends with step {last}",
            )

    def overtaken(self) -> bool:
        """Return whether another host has ended a round that this one has not."""
        self.stale = self.stale or max(self._rounds.steps(), default=-1) > self.group.ended
        return self.stale

    def contribute(
        self, name: str, session: bytes, run: str, request: PushRequest, weights: bytes, trainer: CloudTrainer
    ) -> PushReply:
        """Accept a member's contribution, once for each round; one to a round that has ended is not accepted.

        Args:
            name: name of the member.
            session: id of the member's session.
            run: id of the member's run, under which its checkpoints are kept.
            request: see :class:`PushRequest`.
            weights: the member's own weights, as safetensors.
            trainer: the member's copy of the cloud's part.

        Raises:
            RequestRefused: the member has a newer session, or the round is not the current one.
            ValueError: the contribution is invalid.
        """
        self._heed(name, session)
        group, number = self.group, request.round
        if number > group.ended + 1:
            raise RequestRefused("group", f"work for round {number} came in round {group.ended + 1}")
        if number <= group.ended:
            return PushReply(accepted=False)
        if not group.has_contributed(name):
            group.add_contribution(name, self._of(trainer, number), _loaded(weights), request.samples, time.monotonic())
            self._runs[name] = run
        self._close_if_due()
        return PushReply(accepted=True)

    def state(self, name: str, session: bytes) -> RoundReply:
        """State of the group, after its round has ended if it can.

        Raises:
            RequestRefused: the member has a newer session.
        """
        self._heed(name, session)
        self._close_if_due()
        latest = self.group.latest
        return RoundReply(
            ended=self.group.ended,
            members=[] if latest is None else list(latest.members),
            missed={} if latest is None else dict(latest.missed),
        )

    def pull(self, name: str, session: bytes, trainer: CloudTrainer) -> tuple[int, bytes]:
        """Load the group's weights into a member's copy of the cloud's part; return the round and the edges' weights.

        The edges' weights are safetensors, no bytes if they are private.

        Raises:
            RequestRefused: the member has a newer session, or the group has not begun.
        """
        self._heed(name, session)
        if (ended := self.group.ended) < 0:
            raise RequestRefused("group", "the group has not begun")
        trainer.load_round(ended * self._steps, self.group.cloud)
        if self._packed is None or self._packed[0] != ended:
            self._packed = (ended, save(self.group.edge) if self.group.edge else b"")
        return self._packed

    @property
    def ended(self) -> int:
        """Latest round that ended, at least 0, as sent with OPT_OK; the next one still accepts contributions."""
        return max(0, self.group.ended)

    def _heed(self, name: str, session: bytes) -> None:
        if self.stale:
            raise _moved_elsewhere()
        if not self.group.is_current_session(name, session):
            raise RequestRefused("superseded", f"another session speaks for edge '{name}'")

    def _of(self, trainer: CloudTrainer, number: int) -> Weights:
        """Copy of the averaged weights of a member's cloud part, without bottlenecks if edges' parts are private."""
        if number == 0:
            found: Mapping[str, Tensor] = bottleneck_tensors(trainer.modules)
        elif self._averaged:
            found = state_of(trainer.modules, None)
        else:
            found = {name: tensor.detach() for name, tensor in trainable_parameters({"middle": trainer.middle}).items()}
        return {name: tensor.to("cpu", copy=True) for name, tensor in found.items()}

    def _close_if_due(self) -> None:
        """End the round, and save it, if all contributions have arrived or its deadline has passed."""
        group = self.group
        if (outcome := group.close_if_due(time.monotonic())) is None:
            return
        # If a router sends members of one group to several hosts, each host must not average only its own members.
        if max(self._rounds.steps(), default=-1) >= group.ended:
            self.stale = True
            raise _moved_elsewhere()
        if self._history is not None:
            self._history.add(
                group.shared,
                version=outcome.round,
                round=outcome.round or None,
                members=outcome.members,
                samples=outcome.samples,
                note="" if outcome.round else "start",
            )
        tensors, rounds = group.machine.state()
        about = {
            "agreed": self._agreed,
            "runs": self._runs,
            "rounds": rounds,
            "latest": None if group.latest is None else asdict(group.latest),
        }
        self._rounds.save(group.ended, tensors, {_METADATA_KEY: json.dumps(about)})


def latest_group(path: Path) -> Group:
    """Read a group as of its latest round.

    Raises:
        TrainingError: no round has ended, or the latest is damaged.
    """
    rounds = CheckpointStore(path)
    if not (ended := rounds.steps()):
        raise TrainingError(f"no round of the group '{path.name}' has ended")
    return _read_round(rounds, ended[-1])[2]


_Read = tuple[dict[str, Any], dict[str, str], Group]
"""Common configuration of a group's members, the runs of their contributions, and the group after a round."""


def _latest_readable(rounds: CheckpointStore) -> _Read | None:
    """Latest round that can be read; None if none has ended. Damaged rounds are reported and removed.

    Raises:
        TrainingError: all rounds are damaged.
    """
    return latest_usable(
        rounds, lambda ended: _read_round(rounds, ended), "going on from the round before it", "a group's round: "
    )


def _read_round(rounds: CheckpointStore, ended: int) -> _Read:
    tensors = rounds.load(ended)
    try:
        about = json.loads(rounds.about(ended)[_METADATA_KEY])
        agreed, runs, outcome = about["agreed"], about["runs"], about["latest"]
        group = Group(
            agreed["edges"],
            agreed["deadline_s"],
            RoundMachine.from_state(tensors, about["rounds"]),
            aggregation=agreed["aggregation"],
            latest=outcome
            and GroupRoundOutcome(
                outcome["round"], tuple(outcome["members"]), outcome["missed"], outcome.get("samples", 0)
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"cannot read round {ended} of a group: {error!r}") from None
    return agreed, runs, group


def _moved_elsewhere() -> RequestRefused:
    return RequestRefused("gone", "the group goes on at another replica")


def _group_config(opening: OpenTuning) -> GroupConfig:
    assert opening.group is not None
    return opening.group


def _shared_config(opening: OpenTuning) -> dict[str, Any]:
    """Configuration that must be equal for all members, as plain JSON."""
    alike = opening.model_dump(mode="json", exclude={"run", "restore", "group"})
    return {**alike, **_group_config(opening).model_dump(mode="json", exclude={"group", "name"})}


def _loaded(weights: bytes) -> dict[str, Tensor]:
    try:
        return load(weights) if weights else {}
    except SafetensorError as error:
        raise ValueError(f"the edge's weights cannot be read: {error}") from None
