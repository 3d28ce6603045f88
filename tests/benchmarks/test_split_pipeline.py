"""Figures of the pipeline benchmark, with few sentences and a cloud in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from raycloud.benchmarks.split_pipeline import FIRST, NETWORK, SECOND, StepDurations, measure
from raycloud.benchmarks.split_tune import MODEL, PLAIN, Sentences
from raycloud.link.channel import Channel, Loopback
from raycloud.link.meter import Meter
from raycloud.link.network import EmulatedChannel
from raycloud.models.loading import load
from raycloud.split.finetune.server import TuneServer
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet


class Nearby:
    """Stand-in for a cloud endpoint: opens channels."""

    def __init__(self, folder: Path) -> None:
        part = load_cloud(MODEL, PlanSet((FIRST,), (SECOND,)), device="cpu", dtype="float32", training=True)
        self.host = TuneServer(part, folder, threads=1)
        self.loopback = Loopback(lambda connection: self.host.serve(connection, "me"))

    def channel(self, meter: Meter, session: str) -> Channel:
        return EmulatedChannel(self.loopback.connect(), NETWORK)

    def close(self) -> None:
        self.loopback.close()
        self.host.close()


@pytest.mark.waits
def test_a_step_takes_no_less_than_the_network_makes_it(tmp_path: Path) -> None:
    sentences = Sentences(load(MODEL, device="cpu", dtype="float32"))
    batches = [sentences.batch(sentences.train[at : at + 4]) for at in range(0, 24, 4)]
    near = Nearby(tmp_path)
    try:
        taken = [measure(cast(Any, near), PLAIN, depth, [batches[:3], batches[3:]]) for depth in (1, 3)]
    finally:
        near.close()
    alone, together = taken
    assert min(alone.edge, alone.link, alone.cloud, together.edge, together.cloud) > 0
    assert alone.link == together.link
    # Rows and gradients of three micro-batches, one after the other or all at once.
    assert alone.step > 6 * NETWORK.rtt_ms / 1e3
    assert together.step > 2 * NETWORK.rtt_ms / 1e3


def test_the_ratio_is_to_the_longest() -> None:
    assert StepDurations(step=3.0, edge=1.0, link=2.0, cloud=1.5).ratio == 1.5
