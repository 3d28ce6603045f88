"""Engine: the numbers of the middle for coded steps, and a thread that survives every error of a step."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from raycloud.split.inference.blocks import CloudStage
from raycloud.split.inference.engine import DeadlineExceeded, EngineRequest, InferenceEngine, NonFiniteHidden
from raycloud.split.plan import SplitPlan
from tests.split.inference.peers import (
    CODE,
    FIRST,
    MODEL,
    NARROW,
    PART,
    PLANS,
    SECOND,
    WIDTH,
    Near,
    coded,
    expected,
    gated,
    text,
)

NEVER = float("inf")


class Seen:
    """Metrics sink that records values."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.steps: list[float] = []

    def count(self, name: str, value: float = 1) -> None:
        self.counts[name] += int(value)

    def level(self, name: str, value: float) -> None:
        assert name == "queue"
        assert value >= 0

    def observe(self, name: str, seconds: float) -> None:
        assert name == "step_seconds"
        self.steps.append(seconds)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def engine(seen: Seen) -> Iterator[InferenceEngine]:
    made = InferenceEngine(PART, seen)
    yield made
    made.close()


def job(state: CloudStage, rows: torch.Tensor, pos: int, **changes: Any) -> EngineRequest:
    numbers: dict[str, Any] = {
        "plan": SplitPlan(FIRST, SECOND),
        "start": pos,
        "tokens": len(rows),
        "wanted": len(rows),
        "keep": pos,
        "payload": coded(rows, pos),
        "uplink": CODE,
        "downlink": CODE,
        "deadline": NEVER,
    }
    return EngineRequest(state, **{**numbers, **changes})


def test_steps_give_what_the_middle_gives(engine: InferenceEngine, seen: Seen) -> None:
    rows, state = text(12), engine.open(PLANS)
    futures = [engine.submit(job(state, rows[at : at + 4], at)) for at in (0, 4, 8)]
    assert [future.result(120) for future in futures] == expected(rows, [4, 4, 4])
    assert seen.counts == {"tokens": 12}
    assert len(seen.steps) == 3


def test_only_the_rows_asked_for_come_back(engine: InferenceEngine) -> None:
    rows, state = text(7), engine.open(PLANS)
    [right] = expected(rows, [7])
    assert engine.submit(job(state, rows, 0, wanted=2)).result(120) == Near(right[-2 * WIDTH * 4 :])
    assert engine.submit(job(state, rows[:1], 7, wanted=0)).result(120) == b""


def test_sessions_do_not_see_each_other(engine: InferenceEngine) -> None:
    texts = [text(8, seed) for seed in range(3)]
    states = [engine.open(PLANS) for _ in texts]
    futures = {
        (index, at): engine.submit(job(states[index], rows[at : at + 4], at))
        for at in (0, 4)
        for index, rows in enumerate(texts)
    }
    for index, rows in enumerate(texts):
        assert [futures[index, at].result(120) for at in (0, 4)] == expected(rows, [4, 4])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_no_numbers_are_refused_and_change_nothing(engine: InferenceEngine, value: float) -> None:
    rows, state = text(8), engine.open(PLANS)
    poisoned = rows[4:].clone()
    poisoned[-1, -1] = value
    first = engine.submit(job(state, rows[:4], 0)).result(120)
    with pytest.raises(NonFiniteHidden):
        engine.submit(job(state, poisoned, 4)).result(120)
    assert [first, engine.submit(job(state, rows[4:], 4)).result(120)] == expected(rows, [4, 4])


def test_rows_that_do_not_follow_are_refused_and_change_nothing(engine: InferenceEngine) -> None:
    rows, state = text(8), engine.open(PLANS)
    first = engine.submit(job(state, rows[:4], 0)).result(120)
    with pytest.raises(ValueError, match="do not follow"):
        engine.submit(job(state, rows[4:], 5)).result(120)
    with pytest.raises(ValueError, match="must be"):
        engine.submit(job(state, rows[4:], 4, payload=b"short")).result(120)
    assert [first, engine.submit(job(state, rows[4:], 4)).result(120)] == expected(rows, [4, 4])


def test_forgotten_tokens_are_computed_anew(engine: InferenceEngine) -> None:
    rows, other = text(8), text(8, seed=1)
    state = engine.open(PLANS)
    engine.submit(job(state, torch.cat([rows[:4], other[4:]]), 0)).result(120)
    again = engine.submit(job(state, rows[4:], 4)).result(120)
    assert again == expected(rows, [4, 4])[1]


def test_nobody_waits_for_expired_steps(engine: InferenceEngine) -> None:
    rows, state = text(4), engine.open(PLANS)
    with gated() as gate:
        with pytest.raises(DeadlineExceeded):
            engine.submit(job(state, rows, 0, deadline=time.monotonic() - 0.01)).result(120)
        assert gate.steps == 0


def test_cancelled_steps_are_not_computed(engine: InferenceEngine) -> None:
    rows, states = text(4), [engine.open(PLANS) for _ in range(2)]
    with gated() as gate:
        gate.shut()
        first = engine.submit(job(states[0], rows, 0))
        second = engine.submit(job(states[1], rows, 0))
        assert gate.reached.wait(120)
        assert engine.waiting == 1
        assert second.cancel()
        gate.open()
        assert first.result(120) == expected(rows, [4])[0]
        third = engine.submit(job(states[1], rows, 0)).result(120)
        assert third == expected(rows, [4])[0]


def test_whatever_a_step_meets_the_engine_goes_on(engine: InferenceEngine) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    rows = text(4)
    hook = PART.middle.blocks[FIRST].register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryError):
            engine.submit(job(engine.open(PLANS), rows, 0)).result(120)
    finally:
        hook.remove()
    assert engine.submit(job(engine.open(PLANS), rows, 0)).result(120) == expected(rows, [4])[0]


def test_freed_sessions_are_wiped_behind_their_steps(engine: InferenceEngine) -> None:
    rows, state, empty = text(8), engine.open(PLANS), torch.empty(1, 2, 0, 8)
    engine.submit(job(state, rows[:4], 0)).result(120)
    with torch.inference_mode():
        kept = [tensor for block in (FIRST, FIRST + 1) for tensor in state.cache.update(empty, empty, block)]
    assert all(bool(tensor.any()) and tensor.shape[2] == 4 for tensor in kept)
    last = engine.submit(job(state, rows[4:], 4))
    engine.free(state)
    engine.submit(job(engine.open(PLANS), rows, 0)).result(120)
    assert last.result(0) == expected(rows, [4, 4])[1]
    assert not any(bool(tensor.any()) for tensor in kept)
    assert state.tokens == state.cache.nbytes == 0


@pytest.mark.parametrize("part", [PART, NARROW])
def test_keys_and_values_take_what_is_said(part: Any) -> None:
    engine = InferenceEngine(part)
    state = engine.open(part.plans)
    rows, [lo], [hi] = text(64), part.plans.start_blocks, part.plans.end_blocks
    engine.submit(job(state, rows, 0, plan=SplitPlan(lo, hi))).result(120)
    assert state.cache.nbytes == engine.cache_bytes(1, 64)
    assert MODEL.config.num_key_value_heads == 2
    engine.close()


def test_closing_waits_for_what_was_asked_before() -> None:
    before = set(threading.enumerate())
    engine, rows = InferenceEngine(PART), text(4)
    futures = [engine.submit(job(engine.open(PLANS), rows, 0)) for _ in range(5)]
    engine.close()
    assert all(future.done() for future in futures)
    assert set(threading.enumerate()) <= before
