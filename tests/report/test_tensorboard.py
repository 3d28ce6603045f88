"""Scalars from records, and event files that hold each of them once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from raycloud.report.tensorboard import curve_of, scalars, tensorboard_events

STEP = {"kind": "step", "round": 0, "student": "store", "step": 4, "loss": 2.0, "terms": {"kl": 1.5}, "skipped": False}
ROUND = {"kind": "round", "round": 1, "students": ["store"], "loss": 3.0, "tokens_per_second": {"store": 7.0}}


@pytest.mark.parametrize(
    ("record", "line", "numbers"),
    [
        (STEP, ("store", 4), {"loss": 2.0, "terms/kl": 1.5}),
        (ROUND, ("round", 1), {"loss": 3.0, "tokens_per_second/store": 7.0}),
        ({"kind": "train", "step": 2, "lr": 0.1}, ("train", 2), {"lr": 0.1}),
        ({"kind": "diagnostics", "round": 0, "student": "store", "data": {"samples": 3}}, None, {"data/samples": 3.0}),
        ({"kind": "seed", "rougeL": 3.0}, None, {"rougeL": 3.0}),
        ({"kind": "step", "step": 0, "loss": math.nan, "note": "x"}, ("step", 0), {}),
    ],
)
def test_records_say_where_their_numbers_belong(record: dict[str, Any], line: Any, numbers: dict[str, float]) -> None:
    assert curve_of(record) == line
    assert dict(scalars(record)) == numbers


def test_writing_again_begins_anew(tmp_path: Path) -> None:
    for loss in (5.0, 2.0):
        with tensorboard_events(tmp_path) as add:
            add({**STEP, "loss": loss})
            add(ROUND)
    store = EventAccumulator(str(tmp_path / "tensorboard" / "store")).Reload()
    assert [(event.step, event.value) for event in store.Scalars("loss")] == [(4, 2.0)]


def test_a_run_without_scalars_leaves_no_folder(tmp_path: Path) -> None:
    with tensorboard_events(tmp_path) as add:
        add({"kind": "seed", "rougeL": 3.0})
    assert not list(tmp_path.iterdir())
