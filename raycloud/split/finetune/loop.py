"""The steps of a run, with checkpoints of both sides, and how it goes on when the cloud has lost its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from raycloud.data.batches import Batch
from raycloud.link.caller import SessionLost
from raycloud.split.finetune.company import Company
from raycloud.split.finetune.front import Cloud, Front
from raycloud.split.finetune.state import Checkpoints
from raycloud.training.loop import Step

log = logging.getLogger(__name__)

LOSSES = 5
"""So many times in a row the cloud may lose a session without a checkpoint in between."""


def train(
    edge: Front,
    batches_of: Callable[[int], Sequence[Batch]],
    *,
    steps: int,
    every: int,
    kept: Checkpoints,
    cloud_at: Callable[[int], Cloud],
    told: Callable[[Step], None] = lambda step: None,
    company: Company | None = None,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Train to the last step, from the latest checkpoint if there is one.

    A checkpoint counts once the edge has written its own, which it does after the cloud's. A cloud that lost its
    session goes on from the latest, and so does the edge: steps are a function of (seed, step), so both end with the
    weights of an undisturbed run.

    Args:
        edge: as it begins, with a cloud as it was at the latest checkpoint, or as it begins if there is none.
        batches_of: the micro-batches of a step.
        steps: how many in all.
        every: so many steps there is a checkpoint.
        kept: the edge's.
        cloud_at: opens the other side again, as it was at a checkpoint.
        told: of every step, again if it is made again.
        company: the group that the edge trains with, met between rounds of steps; a round that ended without this edge
            is left between two steps. There is a checkpoint ahead of each meeting, and what the group has made of
            everybody's weights is the group's to keep.
        then: what is to be done behind the last step, and needs the cloud as it is then.

    Raises:
        LinkError: the cloud cannot be reached, or refuses.
        TrainingError: gradients stay non-finite, or a checkpoint cannot be read.
    """
    if latest := kept.steps()[-1:]:
        edge.load(kept.load(*latest))
    else:
        keep(edge, kept)

    def go() -> None:
        meets = company is not None
        while True:
            if meets and company is not None:
                company.meet(edge)
            step = edge.trainer.step_index
            if step >= steps:
                return then()
            told(edge.step(batches_of(step)))
            meets = company is not None and company.due(edge)
            if (step + 1) % every == 0 or step + 1 == steps or meets:
                keep(edge, kept)

    lasting(go, edge, kept, cloud_at)


def keep(edge: Front, kept: Checkpoints) -> None:
    """A checkpoint of both sides."""
    step = edge.trainer.step_index
    edge.settle()
    edge.cloud.save(step)
    kept.save(step, edge.state())


T = TypeVar("T")


def lasting(work: Callable[[], T], edge: Front, kept: Checkpoints, cloud_at: Callable[[int], Cloud]) -> T:
    """What comes of something that needs the cloud, begun anew from the latest checkpoint if it loses its session.

    Raises:
        SessionLost: there is no checkpoint, or the session was lost too many times without a newer one.
    """
    lost, at = 0, -1
    while True:
        try:
            return work()
        except SessionLost as error:
            steps = kept.steps()
            if not steps:
                raise
            lost, at = (lost + 1 if steps[-1] == at else 1), steps[-1]
            if lost > LOSSES:
                raise SessionLost(f"{error} ({lost} times after step {at})") from None
            log.info("going back to step %d: %s", at, error)
            edge.cloud.close()
            edge.load(kept.load(at))
            edge.cloud = cloud_at(at)
