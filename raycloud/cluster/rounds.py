"""Rounds on Ray: the students of a cohort train from the same weights; updates that arrive in time are aggregated.

Each cohort has a :class:`RoundMachine`, which accepts the updates and closes the round. A student is left out of the
round if its process dies, if it is late, or if its weights are not all finite. Ray restarts its actor if needed; the
student gets the newest weights and takes part in the next round. No failure of a student ends the run while another
student answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from raycloud.distill.learner import NOT_FINITE, Heartbeat, StudentUpdate
from raycloud.distill.recipe import DistillRoundsRecipe
from raycloud.errors import ClusterError, RaycloudError, TrainingError
from raycloud.rounds.aggregators import AGGREGATORS
from raycloud.rounds.contribution import Contribution
from raycloud.rounds.machine import ClosedRound, Gate, RoundMachine
from raycloud.rounds.service import DeviceGone

_POLL_S = 0.5


@dataclass
class StudentHandle:
    """Student actor as seen by the driver."""

    name: str
    cohort: str
    actor: Any
    ready: bool = False
    met: bool = False
    """True once the student has been ready; until then only the round's deadline limits the wait."""
    preparing: ray.ObjectRef | None = None
    pending_heartbeat: ray.ObjectRef | None = None

    def prepare(self) -> ray.ObjectRef:
        """Return the call that ends once the actor is up and has its data; it is made once."""
        if self.preparing is None:
            self.preparing = self.actor.prepare.remote()
        return self.preparing

    def leave(self, round_id: int) -> None:
        """Leave the student out of the round; it must complete ``prepare`` again before it can train again.

        The actor gets the new round id as well, since it may be alive but out of reach.
        """
        self.ready, self.preparing, self.pending_heartbeat = False, None, None
        self.actor.advance.remote(round_id + 1)
        self.prepare()


MissReason = Literal["died", "late", "failed", "absent", "diverged", "no_quorum"]


@dataclass(frozen=True)
class MissedStudent:
    """Student that a round left out, with the reason."""

    name: str
    why: MissReason
    detail: str = ""


@dataclass
class RoundOutcome:
    """Result of a round."""

    index: int
    answers: list[StudentUpdate] = field(default_factory=list)
    missed: list[MissedStudent] = field(default_factory=list)
    gate_refused: list[str] = field(default_factory=list)
    """Cohorts whose aggregate the gate refused, so that they keep their former weights."""
    seconds: float = 0.0


OnProgress = Callable[[dict[str, Heartbeat]], None]
"""Callback that gets the latest heartbeat of every student, about twice a second."""


def run_round(
    round_id: int,
    index: int,
    members: Sequence[StudentHandle],
    rounds: Mapping[str, RoundMachine],
    recipe: DistillRoundsRecipe,
    on_progress: OnProgress,
    gates: Mapping[str, Gate] | None = None,
) -> RoundOutcome:
    """Train one round and aggregate the updates; a cohort with fewer updates than the quorum keeps its weights.

    Args:
        round_id: id larger than that of every earlier call, including earlier attempts at the same round.
        index: index of the round, counted from 0.
        members: students of the run.
        rounds: rounds by cohort, none of them open; they hold the initial weights, and then the new ones.
        recipe: recipe of the rounds, with ``deadline_s``, ``rejoin_s`` and ``quorum``.
        on_progress: see :data:`OnProgress`.
        gates: held-out figures by cohort; a cohort whose figure would fall keeps its weights. None for no gates.

    Raises:
        RaycloudError: a student's own data or recipe is wrong, which a restart would not fix.
    """
    begun = time.monotonic()
    patience = begun + recipe.rejoin_s
    current = {}
    for cohort, machine in rounds.items():
        # Sums depend on the order, and the order of arrival is random.
        names = sorted(member.name for member in members if member.cohort == cohort)
        machine.open(index, names, deadline=begun + recipe.deadline_s, quorum=recipe.quorum)
        current[cohort] = ray.put(machine.weights)
    training: dict[ray.ObjectRef, StudentHandle] = {}
    preparing: dict[ray.ObjectRef, StudentHandle] = {}
    heartbeats: dict[str, Heartbeat] = {}
    done = RoundOutcome(index)

    def train(member: StudentHandle) -> None:
        training[member.actor.train.remote(round_id, index, current[member.cohort])] = member

    def leave_out(member: StudentHandle, why: MissReason, detail: str) -> None:
        done.missed.append(MissedStudent(member.name, why, detail))
        rounds[member.cohort].remove(member.name)
        member.leave(round_id)

    for member in members:
        if member.ready:
            train(member)
        else:
            preparing[member.prepare()] = member
    while any(machine.number is not None for machine in rounds.values()):
        finished, _ = ray.wait([*training, *preparing], num_returns=1, timeout=_POLL_S)
        for ref in finished:
            was_training = ref in training
            member = training.pop(ref) if was_training else preparing.pop(ref)
            try:
                outcome = ray.get(ref)
            except RayTaskError as error:
                _reraise(error)
                leave_out(member, _why(error), _last_line(error))
            except RayError as error:
                leave_out(member, "died", _last_line(error))
            else:
                if not was_training:
                    member.ready, member.met, member.preparing = True, True, None
                    train(member)
                elif outcome is None:
                    rounds[member.cohort].remove(member.name)
                else:
                    work = Contribution(outcome.weights, outcome.tokens)
                    refusal = rounds[member.cohort].accept(member.name, index, work)
                    if refusal is None:
                        done.answers.append(outcome)
                    elif refusal.reason == "not_finite":
                        leave_out(member, "diverged", NOT_FINITE)
                    else:
                        leave_out(member, "failed", refusal.detail)
        _poll_heartbeats(members, heartbeats, index)
        on_progress(heartbeats)
        if not training and not _should_wait(preparing.values(), patience):
            for member in preparing.values():
                rounds[member.cohort].remove(member.name)
        now = time.monotonic()
        for cohort, machine in rounds.items():
            closed = machine.close(now, AGGREGATORS[recipe.aggregation], (gates or {}).get(cohort))
            if closed is not None and closed.result == "no_quorum":
                _discard(done, closed, recipe.quorum)
            if closed is not None and closed.result == "gate_refused":
                done.gate_refused.append(cohort)
    for member in training.values():
        done.missed.append(MissedStudent(member.name, "late", f"no answer in {recipe.deadline_s:g} s"))
        member.leave(round_id)
    done.missed.extend(MissedStudent(member.name, "absent", "not started") for member in preparing.values())
    done.seconds = time.monotonic() - begun
    done.answers.sort(key=lambda answer: answer.name)
    return done


def _discard(done: RoundOutcome, closed: ClosedRound, quorum: int) -> None:
    """Move the updates of a cohort without a quorum to the missed ones."""
    detail = f"{len(closed.members)} of at least {quorum} updates"
    done.answers = [answer for answer in done.answers if answer.name not in closed.members]
    done.missed.extend(MissedStudent(name, "no_quorum", detail) for name in closed.members)


def _should_wait(preparing: Iterable[StudentHandle], patience: float) -> bool:
    return any(not member.met or time.monotonic() < patience for member in preparing)


def _poll_heartbeats(members: Sequence[StudentHandle], heartbeats: dict[str, Heartbeat], index: int) -> None:
    """Collect the heartbeats that have arrived and request the next ones; never wait."""
    for member in members:
        if not member.ready:
            continue
        if member.pending_heartbeat is None:
            member.pending_heartbeat = member.actor.heartbeat.remote()
        elif ray.wait([member.pending_heartbeat], timeout=0)[0]:
            try:
                heartbeat = ray.get(member.pending_heartbeat, timeout=0)
            except (RayError, GetTimeoutError):
                heartbeat = None
            member.pending_heartbeat = None
            if heartbeat is not None and heartbeat.round == index:
                heartbeats[member.name] = heartbeat


def _reraise(error: RayTaskError) -> None:
    """Raise an error that the user must fix, without the remote traceback: it would occur again after a restart."""
    cause = error.cause
    if isinstance(cause, RaycloudError) and not isinstance(cause, ClusterError | TrainingError | DeviceGone):
        raise cause from None


def _why(error: RayTaskError) -> MissReason:
    if isinstance(error.cause, DeviceGone):
        return "died"
    return "diverged" if isinstance(error.cause, TrainingError) else "failed"


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]
