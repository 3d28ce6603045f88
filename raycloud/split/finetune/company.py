"""What an edge does between rounds of steps, where several train together: bring its work, take what became of all.

A round is ``steps`` optimiser steps. Whoever is late, or was away, goes on from where the others are; its own work
since then is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raycloud.errors import LinkError
from raycloud.link.frames import Kind, split_off, with_bytes
from raycloud.split.finetune.front import Cloud, Front
from raycloud.split.finetune.messages import PIECE_BYTES, Given, Meet, Met, Take, Taken, Together
from raycloud.split.finetune.state import codes


@dataclass(frozen=True)
class Meeting:
    """How one went."""

    round: int
    """The group's latest, which the edge goes on from; 0 is the beginning."""
    counted: bool
    """Whether this edge's work is in it."""
    members: tuple[str, ...]
    """Whose is."""
    missed: Mapping[str, str]
    """Whose is not, and why."""
    waited_s: float
    """For the others."""
    sent: int
    """Bytes of this edge's own weights; 0 where they are private."""
    received: int


class Company:
    """The group of an edge.

    Args:
        asked: what its members agreed on.
        samples_of: how many samples a step trains on.
        told: of every meeting that the edge goes on from.
    """

    def __init__(
        self,
        asked: Together,
        samples_of: Callable[[int], int],
        told: Callable[[Meeting], None] = lambda meeting: None,
    ) -> None:
        self._asked, self._samples_of, self._told = asked, samples_of, told

    def due(self, edge: Front) -> bool:
        """Whether the edge has to meet the others before its next step: its round is done, or over without it."""
        done, within = divmod(edge.trainer.step_index, self._asked.steps)
        return not within or (edge.ended or 0) > done

    def meet(self, edge: Front) -> None:
        """Do what is due, if anything is.

        Meeting again after a lost session comes to the same: work is taken in once, and what the group has made of it
        stays until its next round ends.

        Raises:
            SessionLost: both sides must go on from their last common checkpoint, and meet again.
            LinkError: the cloud cannot be reached, refuses, or has lost the group's rounds.
        """
        edge.settle()
        done, within = divmod(edge.trainer.step_index, self._asked.steps)
        met, sent, waited = self._ask(edge.cloud, Meet()), 0, 0.0
        if not within and met.ended == done - 1:
            sent = self._give(edge, done)
            began = time.perf_counter()
            work = Meet(round=done, samples=self._samples(done))
            while (met := self._ask(edge.cloud, work)).ended < done:
                pass
            waited = time.perf_counter() - began
        if met.ended < done:
            raise LinkError(f"the cloud's group is in round {met.ended + 1}, this edge in round {done + 1}")
        if met.ended > done or not within:
            ended, received = self._take(edge)
            if ended != met.ended:  # another round has ended meanwhile
                met = self._ask(edge.cloud, Meet())
            mine = ended == met.ended and self._asked.name in met.members
            self._told(Meeting(ended, mine, tuple(met.members), met.missed, waited, sent, received))

    def _samples(self, number: int) -> int:
        """That the edge has trained on in a round."""
        steps = self._asked.steps
        return max(1, sum(self._samples_of(step) for step in range((number - 1) * steps, number * steps) if step >= 0))

    def _ask(self, cloud: Cloud, asked: Meet) -> Met:
        cloud.send(with_bytes(Kind.ROUND, asked))
        return split_off(cloud.receive(), Met)[0]

    def _give(self, edge: Front, number: int) -> int:
        """Bring what of this edge's own part is averaged; how many bytes."""
        if not self._asked.averaged:
            return 0
        weights = edge.learnt() if number else codes(edge.modules)
        packed = save({name: tensor.contiguous() for name, tensor in weights.items()})
        for at in range(0, len(packed), PIECE_BYTES):
            edge.cloud.send(with_bytes(Kind.GIVE, Given(at=at), packed[at : at + PIECE_BYTES]))
            edge.cloud.receive()
        return len(packed)

    def _take(self, edge: Front) -> tuple[int, int]:
        """Begin the next round where the group is; the round that ended, and how many bytes came."""
        packed = bytearray()
        while True:
            edge.cloud.send(with_bytes(Kind.TAKE, Take(at=len(packed))))
            told, some = split_off(edge.cloud.receive(), Taken)
            packed += some
            if len(packed) >= told.size:
                break
            if not some:
                raise LinkError("the cloud's answer to TAKE has no bytes")
        edge.join(told.ended * self._asked.steps, _loaded(bytes(packed)))
        return told.ended, len(packed)


def _loaded(packed: bytes) -> dict[str, Tensor]:
    try:
        return load(packed) if packed else {}
    except SafetensorError as error:
        raise LinkError(f"the group's weights cannot be read: {error}") from None
