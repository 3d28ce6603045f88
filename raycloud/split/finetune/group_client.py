"""Round client of an edge that trains with others: it sends its contribution and receives the aggregated weights.

A round is ``steps`` optimiser steps. An edge that is late or was absent continues from the group's latest round; its
own steps since then are discarded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raycloud.errors import LinkError
from raycloud.link.frames import Frame, parse_body
from raycloud.split.finetune.checkpoints import bottleneck_tensors
from raycloud.split.finetune.client import CloudClient
from raycloud.split.finetune.edge_trainer import EdgeTrainer
from raycloud.split.finetune.messages import (
    GroupConfig,
    GroupWeightsReply,
    PushRequest,
    RoundReply,
    RoundRequest,
    TuneKind,
)


@dataclass(frozen=True)
class RoundResult:
    """Result of a round for one edge."""

    round: int
    """Latest round of the group, from which the edge continues; 0 is the beginning."""
    counted: bool
    """True if this edge's contribution was aggregated."""
    members: tuple[str, ...]
    """Edges whose contributions were aggregated."""
    missed: Mapping[str, str]
    """Edges whose contributions were not, with the reasons."""
    waited_s: float
    """Seconds spent waiting for the others."""
    sent: int
    """Bytes of this edge's own weights; 0 if they are private."""
    received: int


class GroupClient:
    """Client of an edge's group.

    Args:
        config: configuration of the group.
        samples_of: returns the number of samples of a step.
        on_round: called with the result of every round that the edge continues from.
    """

    def __init__(
        self,
        config: GroupConfig,
        samples_of: Callable[[int], int],
        on_round: Callable[[RoundResult], None] = lambda result: None,
    ) -> None:
        self._config, self._samples_of, self._on_round = config, samples_of, on_round

    def sync_due(self, edge: EdgeTrainer) -> bool:
        """Return whether :meth:`sync` is due before the next step: the round is done, or ended without this edge."""
        done, within = divmod(edge.trainer.step_index, self._config.steps)
        return not within or (edge.ended or 0) > done

    def sync(self, edge: EdgeTrainer) -> None:
        """Send the contribution and load the group's weights, as far as this is due.

        Repeating this after a lost session has the same result: a contribution is accepted once, and the group's
        weights stay until its next round ends.

        Raises:
            SessionLost: both sides must continue from their last common checkpoint, and call this again.
            LinkError: the cloud cannot be reached, refuses, or has lost the group's rounds.
        """
        edge.wait_for_optimiser()
        done, within = divmod(edge.trainer.step_index, self._config.steps)
        state, sent, waited = self._state(edge.cloud), 0, 0.0
        if not within and state.ended == done - 1:
            sent = self._push(edge, done)
            began = time.perf_counter()
            while (state := self._state(edge.cloud, done)).ended < done:
                pass
            waited = time.perf_counter() - began
        if state.ended < done:
            raise LinkError(f"the cloud's group is in round {state.ended + 1}, this edge in round {done + 1}")
        if state.ended > done or not within:
            ended, received = self._pull(edge)
            if ended != state.ended:  # another round has ended meanwhile
                state = self._state(edge.cloud)
            counted = ended == state.ended and self._config.name in state.members
            self._on_round(RoundResult(ended, counted, tuple(state.members), state.missed, waited, sent, received))

    def _samples(self, number: int) -> int:
        """Number of samples that the edge has trained on in a round."""
        steps = self._config.steps
        return max(1, sum(self._samples_of(step) for step in range((number - 1) * steps, number * steps) if step >= 0))

    def _state(self, cloud: CloudClient, awaited: int | None = None) -> RoundReply:
        """State of the group; with the number of an awaited round, once it has ended or some seconds have passed."""
        cloud.send(Frame.of(TuneKind.ROUND, RoundRequest(round=awaited)))
        return parse_body(cloud.receive(), RoundReply)

    def _push(self, edge: EdgeTrainer, number: int) -> int:
        """Send the contribution to a round; return the bytes of this edge's own weights, 0 if they are private."""
        packed = b""
        if self._config.averaged:
            weights = edge.trained_weights() if number else bottleneck_tensors(edge.modules)
            packed = save({name: tensor.contiguous() for name, tensor in weights.items()})
        edge.cloud.send(Frame.of(TuneKind.PUSH, PushRequest(round=number, samples=self._samples(number)), packed))
        edge.cloud.receive()
        return len(packed)

    def _pull(self, edge: EdgeTrainer) -> tuple[int, int]:
        """Load the group's weights for the next round; return the round that ended and the bytes received."""
        edge.cloud.send(Frame(TuneKind.PULL))
        answer = edge.cloud.receive()
        ended = parse_body(answer, GroupWeightsReply).ended
        edge.load_round(ended * self._config.steps, _loaded(answer.raw))
        return ended, len(answer.raw)


def _loaded(packed: bytes) -> dict[str, Tensor]:
    try:
        return load(packed) if packed else {}
    except SafetensorError as error:
        raise LinkError(f"the group's weights cannot be read: {error}") from None
