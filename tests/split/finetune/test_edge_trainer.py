"""Number of micro-batches in flight between edge and cloud."""

from __future__ import annotations

from collections import deque
from typing import Any

from raycloud.link.frames import Frame, parse_body
from raycloud.split.finetune.edge_trainer import TrainableParts
from raycloud.split.finetune.messages import BackwardRequest, ForwardRequest, TuneKind
from tests.split.finetune.wiring import batches, model_of, split

MICROS = 9


class Watched:
    """Cloud that records every request as ``(kind, micro-batch)`` when it is sent, and every answer as None."""

    def __init__(self, cloud: Any) -> None:
        self._cloud = cloud
        self.seen: list[tuple[TuneKind, int] | None] = []

    def send(self, request: Frame) -> None:
        if request.kind is TuneKind.FWD:
            self.seen.append((TuneKind.FWD, parse_body(request, ForwardRequest).micro_batch))
        if request.kind is TuneKind.BWD:
            self.seen.append((TuneKind.BWD, parse_body(request, BackwardRequest).micro_batch))
        self._cloud.send(request)

    def receive(self) -> Frame:
        self.seen.append(None)
        answer: Frame = self._cloud.receive()
        return answer


def seen(depth: int, learning: TrainableParts | None = None) -> list[tuple[TuneKind, int] | None]:
    """Record the messages of a step."""
    edge = split(model_of("gpt2-untied"), 2, 4, max_in_flight=depth)
    edge.trainable = learning or edge.trainable
    edge.cloud = watched = Watched(edge.cloud)  # type: ignore[assignment]
    edge.step(batches(0, MICROS, language=True))
    return watched.seen


def test_a_gradient_waits_behind_half_of_the_micro_batches_at_most() -> None:
    for depth, half in ((1, 1), (2, 1), (3, 2), (6, 3)):
        passed = seen(depth)
        for micro in range(MICROS - half):
            gradient = passed.index((TuneKind.BWD, micro))
            assert (
                passed.index((TuneKind.FWD, micro + half - 1)) < gradient < passed.index((TuneKind.FWD, micro + half))
            ), depth


def test_as_many_micro_batches_are_away_as_the_depth_says() -> None:
    for depth in (1, 2, 5):
        unanswered: deque[tuple[TuneKind, int]] = deque()
        away, most, ended = 0, 0, 0
        for event in seen(depth):
            if event is not None:
                unanswered.append(event)
                away += event[0] is TuneKind.FWD
            elif unanswered.popleft()[0] is TuneKind.BWD:
                away, ended = away - 1, ended + 1
            most = max(most, away)
        assert (most, away, ended) == (depth, 0, MICROS)


def test_micro_batches_that_go_out_once_are_away_together() -> None:
    passed = seen(4, TrainableParts(first_part=False, cloud=False))
    assert passed[:5] == [*((TuneKind.FWD, micro) for micro in range(4)), None]
    assert not any(event and event[0] is TuneKind.BWD for event in passed)
