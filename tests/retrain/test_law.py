"""Law of retraining: monotone curves, their formula and their derivatives."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.errors import TrainingError
from raycloud.retrain.law import Law
from raycloud.retrain.pilots import Pilot, PilotTable
from raycloud.retrain.rival_laws import PowerLaw
from tests.retrain.laws import BLOCKS, TRUE, positive, trained


@st.composite
def laws(draw: st.DrawFn) -> Law:
    start = draw(st.floats(0, 8))
    blocks = draw(st.integers(1, 5))
    numbers = [tuple(draw(positive) for _ in range(blocks)) for _ in range(3)]
    floor = start * draw(st.floats(0, 1))
    return Law(
        start,
        floor,
        draw(positive),
        draw(positive),
        *numbers,
        gamma=draw(st.floats(0, 3)),
        beta=draw(st.floats(0.1, 1)),
    )


@settings(deadline=None)
@given(law=laws(), seed=st.integers(0, 1000), steps=st.integers(0, 500), samples=st.integers(1, 500))
def test_the_error_falls_with_steps_samples_widths_and_blocks(law: Law, seed: int, steps: int, samples: int) -> None:
    source = random.Random(seed)
    chosen = trained(source, law)
    error = law.error(chosen, steps, samples)
    assert law.floor <= error <= law.start_error
    assert law.error(chosen, steps + 7, samples) <= error
    assert law.error(chosen, steps, samples + 7) <= error
    for block in range(len(law.omega)):
        wider = min(1.0, chosen.get(block, 0.25) + 0.25)
        assert law.error({**chosen, block: wider}, steps, samples) <= error + 1e-12
    assert law.error(chosen, 0, samples) == law.start_error


def test_the_law_is_the_formula() -> None:
    value = 1.8 * 0.25**0.5 * (1 - math.exp(-60 / 150)) * (1 - math.exp(-100 / 150))
    value += 0.7 * (1 - math.exp(-60 / 12)) * (1 - math.exp(-100 / 25))
    value += 0.4 * (1 - math.exp(-60 / 20))
    assert TRUE.error({0: 0.25, 5: 1.0}, 60, 100) == pytest.approx(0.1 + 0.65 * math.exp(-value))
    assert dataclasses.replace(TRUE, beta=0.6).error({0: 0.25, 5: 1.0}, 60, 100) == pytest.approx(
        0.1 + 0.65 * math.exp(-(value**0.6))
    )
    table = TRUE.value(np.arange(BLOCKS)[:, None], 1.0, np.asarray([[10, 60]]), 100)
    assert table.shape == (BLOCKS, 2)
    assert table[5, 1] == pytest.approx(0.7 * (1 - math.exp(-5)) * (1 - math.exp(-4)))


@pytest.mark.parametrize(
    "law",
    [
        TRUE,
        dataclasses.replace(TRUE, beta=0.6),
        PowerLaw(0.75, 0.1, 0.4, (0.5, 0.4, 0.3, 0.3, 0.2, 0.2), 0.6, 40.0, 0.5),
    ],
)
def test_derivatives_are_those_of_the_values(law: Law | PowerLaw) -> None:
    source = random.Random(3)
    some = [
        Pilot(tuple(chosen), source.randint(1, 90), source.randint(1, 200), 0.5, tuple(chosen.values()))
        for chosen in (trained(source, TRUE) for _ in range(12))
    ]
    table = PilotTable.of(some, BLOCKS)
    logs = law.logs()
    values, slopes = law.total_values(logs, table)
    for pilot, value in zip(some, values, strict=True):
        left = law.floor + (law.start_error - law.floor) * math.exp(-value)
        assert left == pytest.approx(law.error(pilot.trained, pilot.steps, pilot.samples))
    for index in range(len(logs)):
        if isinstance(law, PowerLaw) and index == len(logs) - 1:
            continue  # the unit of steps is not fitted
        step = np.zeros(len(logs))
        step[index] = 1e-6
        numeric = (law.total_values(logs + step, table)[0] - law.total_values(logs - step, table)[0]) / 2e-6
        assert slopes[:, index] == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    assert law.with_logs(logs).logs() == pytest.approx(logs)


def test_wrong_numbers_are_refused_in_one_line() -> None:
    with pytest.raises(TrainingError, match="start_error must be finite and at least floor"):
        Law(0.5, 0.6, 1, 1, (1.0,), (1.0,), (1.0,))
    with pytest.raises(TrainingError, match="tau must be finite and above 0, got inf"):
        Law(0.5, 0.1, 1, 1, (1.0,), (math.inf,), (1.0,))
    with pytest.raises(TrainingError, match="omega, tau and nu must have one number per block, got 1, 2 and 1"):
        Law(0.5, 0.1, 1, 1, (1.0,), (1.0, 1.0), (1.0,))
    with pytest.raises(TrainingError, match="beta must be above 0 and at most 1, got 2"):
        Law(0.5, 0.1, 1, 1, (1.0,), (1.0,), (1.0,), beta=2)
