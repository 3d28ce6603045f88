"""Rounds: the students of a cohort train from the same weights, those that answer in time are averaged by tokens.

A student whose process dies, or that is late, is left out of the round; Ray starts it again, it is given the newest
weights and takes part in the next round. No failure of a student ends the run while another one answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from torch import Tensor

from raycloud.cluster.edge_student import Answer, Beat
from raycloud.distill.recipe import RoundsRecipe
from raycloud.errors import ClusterError, RaycloudError, TrainingError
from raycloud.models.surgery.merging import weighted_average
from raycloud.models.weights import Weights

_POLL_S = 0.5


@dataclass
class Member:
    """A student actor as the driver sees it."""

    name: str
    cohort: str
    actor: Any
    ready: bool = False
    met: bool = False
    """Whether it has ever been ready; until then a round's deadline is the only limit."""
    preparing: ray.ObjectRef | None = None
    beating: ray.ObjectRef | None = None

    def prepare(self) -> ray.ObjectRef:
        """The call that returns once the actor is up and has its data; made once."""
        if self.preparing is None:
            self.preparing = self.actor.prepare.remote()
        return self.preparing

    def leave(self, round_id: int) -> None:
        """The round goes on without it; it has to answer again before it can train again.

        It is told, since it may be alive and only out of reach.
        """
        self.ready, self.preparing, self.beating = False, None, None
        self.actor.advance.remote(round_id + 1)
        self.prepare()


@dataclass(frozen=True)
class Missed:
    """A student that a round went on without."""

    name: str
    why: Literal["died", "late", "failed", "absent"]
    detail: str = ""


@dataclass
class Round:
    """What a round brought."""

    index: int
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Averages by cohort, of those in which a student answered."""
    answers: list[Answer] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    seconds: float = 0.0


Watch = Callable[[dict[str, Beat]], None]
"""Told where every student is, about twice a second."""


def run_round(
    round_id: int,
    index: int,
    members: Sequence[Member],
    weights: Mapping[str, Weights],
    recipe: RoundsRecipe,
    watch: Watch,
) -> Round:
    """Train one round and average it; without any answer the result has no weights.

    Args:
        round_id: larger than that of every earlier call, also where a round is tried again.
        index: the round, counted from 0.
        members: the students.
        weights: what they start from, by cohort.
        recipe: deadline and patience.
        watch: see :data:`Watch`.

    Raises:
        RaycloudError: a student's own data or recipe is at fault, which starting again would not mend.
    """
    begun = time.monotonic()
    deadline, patience = begun + recipe.deadline_s, begun + recipe.rejoin_s
    current = {cohort: ray.put(dict(some)) for cohort, some in weights.items()}
    training: dict[ray.ObjectRef, Member] = {}
    preparing: dict[ray.ObjectRef, Member] = {}
    beats: dict[str, Beat] = {}
    done = Round(index)

    def train(member: Member) -> None:
        training[member.actor.train.remote(round_id, index, current[member.cohort])] = member

    for member in members:
        if member.ready:
            train(member)
        else:
            preparing[member.prepare()] = member
    while training or _worth_waiting(preparing.values(), patience):
        if time.monotonic() >= deadline:
            break
        finished, _ = ray.wait([*training, *preparing], num_returns=1, timeout=_POLL_S)
        for ref in finished:
            was_training = ref in training
            member = training.pop(ref) if was_training else preparing.pop(ref)
            try:
                outcome = ray.get(ref)
            except RayTaskError as error:
                _reraise(error)
                done.missed.append(Missed(member.name, "failed", _last_line(error)))
                member.leave(round_id)
            except RayError as error:
                done.missed.append(Missed(member.name, "died", _last_line(error)))
                member.leave(round_id)
            else:
                if not was_training:
                    member.ready, member.met, member.preparing = True, True, None
                    train(member)
                elif outcome is not None:
                    done.answers.append(outcome)
        _listen(members, beats, index)
        watch(beats)
    for member in training.values():
        done.missed.append(Missed(member.name, "late", f"no answer in {recipe.deadline_s:g} s"))
        member.leave(round_id)
    done.missed.extend(Missed(member.name, "absent", "not started") for member in preparing.values())
    done.seconds = time.monotonic() - begun
    done.answers.sort(key=lambda answer: answer.name)  # sums depend on their order, and arrival is chance
    for cohort in weights:
        names = {member.name for member in members if member.cohort == cohort}
        if mine := [one for one in done.answers if one.name in names]:
            done.weights[cohort] = weighted_average([one.weights for one in mine], [one.tokens for one in mine])
    return done


def _worth_waiting(preparing: Iterable[Member], patience: float) -> bool:
    return any(not member.met or time.monotonic() < patience for member in preparing)


def _listen(members: Sequence[Member], beats: dict[str, Beat], index: int) -> None:
    """Collect the signs of life that have come in and ask for the next ones; never waits."""
    for member in members:
        if not member.ready:
            continue
        if member.beating is None:
            member.beating = member.actor.beat.remote()
        elif ray.wait([member.beating], timeout=0)[0]:
            try:
                beat = ray.get(member.beating, timeout=0)
            except (RayError, GetTimeoutError):
                beat = None
            member.beating = None
            if beat is not None and beat.round == index:
                beats[member.name] = beat


def _reraise(error: RayTaskError) -> None:
    """An error the user can mend, which would come again, ends the run as itself, without the remote traceback."""
    cause = error.cause
    if isinstance(cause, RaycloudError) and not isinstance(cause, ClusterError | TrainingError):
        raise cause from None


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]
