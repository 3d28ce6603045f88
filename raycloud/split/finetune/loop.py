"""The steps of a run, with checkpoints of both sides, and how it goes on when the cloud has lost its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from raycloud.data.batches import Batch
from raycloud.split.finetune.edge import Cloud, EdgeSide
from raycloud.split.finetune.remote import SessionLost
from raycloud.split.finetune.state import Checkpoints
from raycloud.training.loop import Step

log = logging.getLogger(__name__)


def train(
    edge: EdgeSide,
    batches_of: Callable[[int], Sequence[Batch]],
    *,
    steps: int,
    every: int,
    kept: Checkpoints,
    cloud_at: Callable[[int], Cloud],
    told: Callable[[Step], None] = lambda step: None,
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

    Raises:
        LinkError: the cloud cannot be reached, or refuses.
        TrainingError: gradients stay non-finite, or a checkpoint cannot be read.
    """
    if latest := kept.steps()[-1:]:
        edge.load(kept.load(*latest))
    else:
        _save(edge, kept)
    while (step := edge.trainer.step_index) < steps:
        try:
            told(edge.step(batches_of(step)))
            if (step + 1) % every == 0 or step + 1 == steps:
                _save(edge, kept)
        except SessionLost as error:
            log.info("going back to step %d: %s", kept.steps()[-1], error)
            edge.cloud.close()
            _go_on(edge, kept, cloud_at)


def _save(edge: EdgeSide, kept: Checkpoints) -> None:
    step = edge.trainer.step_index
    edge.settle()
    edge.cloud.save(step)
    kept.save(step, edge.state())


def _go_on(edge: EdgeSide, kept: Checkpoints, cloud_at: Callable[[int], Cloud]) -> None:
    step = kept.steps()[-1]
    edge.load(kept.load(step))
    edge.cloud = cloud_at(step)
