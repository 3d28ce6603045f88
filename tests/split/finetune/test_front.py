"""What is on its way between edge and cloud at a time."""

from __future__ import annotations

from collections import deque
from typing import Any

from raycloud.link.frames import Frame, Kind, split_off
from raycloud.split.finetune.front import Learning
from raycloud.split.finetune.messages import Backward, Forward
from tests.split.finetune.wiring import batches, model_of, split

MICROS = 9


class Watched:
    """A cloud of which every request is noted as it is sent, as ``(kind, micro-batch)``, and every answer as None."""

    def __init__(self, cloud: Any) -> None:
        self._cloud = cloud
        self.seen: list[tuple[Kind, int] | None] = []

    def send(self, request: Frame) -> None:
        if request.kind is Kind.FWD:
            self.seen.append((Kind.FWD, split_off(request, Forward)[0].micro))
        if request.kind is Kind.BWD:
            self.seen.append((Kind.BWD, split_off(request, Backward)[0].micro))
        self._cloud.send(request)

    def receive(self) -> Frame:
        self.seen.append(None)
        answer: Frame = self._cloud.receive()
        return answer


def seen(depth: int, learning: Learning | None = None) -> list[tuple[Kind, int] | None]:
    """What passes in a step."""
    edge = split(model_of("gpt2-untied"), 2, 4, depth=depth)
    edge.learning = learning or edge.learning
    edge.cloud = watched = Watched(edge.cloud)  # type: ignore[assignment]
    edge.step(batches(0, MICROS, language=True))
    return watched.seen


def test_a_gradient_waits_behind_half_of_the_micro_batches_at_most() -> None:
    for depth, half in ((1, 1), (2, 1), (3, 2), (6, 3)):
        passed = seen(depth)
        for micro in range(MICROS - half):
            gradient = passed.index((Kind.BWD, micro))
            assert passed.index((Kind.FWD, micro + half - 1)) < gradient < passed.index((Kind.FWD, micro + half)), depth


def test_as_many_micro_batches_are_away_as_the_depth_says() -> None:
    for depth in (1, 2, 5):
        unanswered: deque[tuple[Kind, int]] = deque()
        away, most, ended = 0, 0, 0
        for event in seen(depth):
            if event is not None:
                unanswered.append(event)
                away += event[0] is Kind.FWD
            elif unanswered.popleft()[0] is Kind.BWD:
                away, ended = away - 1, ended + 1
            most = max(most, away)
        assert (most, away, ended) == (depth, 0, MICROS)


def test_micro_batches_that_go_out_once_are_away_together() -> None:
    passed = seen(4, Learning(ahead=False, cloud=False))
    assert passed[:5] == [*((Kind.FWD, micro) for micro in range(4)), None]
    assert not any(event and event[0] is Kind.BWD for event in passed)
