"""What a step of split fine-tuning takes over a slow link, micro-batches one after the other and many on their way.

The edge trains three blocks of MiniLM and the head in this process, the cloud three blocks in a replica of Ray Serve,
each on one thread; the WebSocket between them is slowed to 10 Mbit/s and a round trip of 50 ms.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from raycloud.benchmarks.local_cloud import scratch, served
from raycloud.benchmarks.measure import show
from raycloud.benchmarks.split_tune import CLASSES, MODEL, PLAIN, Sentences, recipe_of
from raycloud.data.batches import Batch
from raycloud.edge.cloud import Cloud
from raycloud.link.meter import Meter
from raycloud.link.network import Network
from raycloud.models.loading import load
from raycloud.report.console import console, working
from raycloud.serving.split_tune import SplitTuneSettings, app
from raycloud.split.finetune.assembly import ends_of
from raycloud.split.finetune.crossing import per_direction
from raycloud.split.finetune.front import Clock
from raycloud.split.finetune.remote import RemoteCloud
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet, SplitPlan

FIRST, SECOND = 3, 6
NETWORK = Network(mbit_s=10.0, rtt_ms=50.0)
BATCH, MICROS, STEPS = 12, 32, 2
DEPTH = 8
"""Micro-batches on their way."""
CUTS: dict[str, dict[str, Any]] = {
    "ours, 36 bytes": {"kind": "narrow", "rank": 34, "form": "int8"},
    "plain, 1536 bytes": PLAIN,
}
_TOKEN = "benchmark"


@dataclass(frozen=True)
class Taken:
    """Seconds of a step."""

    step: float
    edge: float
    """The edge computed."""
    link: float
    """The busier direction of the link was busy."""
    cloud: float
    """The cloud computed."""

    @property
    def ratio(self) -> float:
        """To what takes longest by itself: 1 where all else is hidden behind it."""
        return self.step / max(self.edge, self.link, self.cloud)


def measure(cloud: Cloud, cut: Mapping[str, Any], depth: int, steps: Sequence[Sequence[Batch]]) -> Taken:
    """Mean over the steps but for the first."""
    recipe = recipe_of(FIRST, cut, seed=10)
    part = load_edge(MODEL, PlanSet.of(SplitPlan(FIRST, SECOND)), device="cpu", dtype="float32", training=True)
    ends = ends_of(recipe, part.first, part.last, steps[0], classes=len(CLASSES), total_steps=len(steps))
    begin = ends.begin(part.fingerprint, f"{depth:08x}")
    edge = ends.edge(RemoteCloud(partial(cloud.channel, Meter()), begin, ends.code.decoder), depth)
    try:
        edge.step(steps[0])
        edge.settle()
        edge.clock, started = Clock(), time.perf_counter()
        for batches in steps[1:]:
            edge.step(batches)
        edge.settle()
        taken = time.perf_counter() - started
    finally:
        edge.cloud.close()
    made, link = len(steps) - 1, 0.0
    for step, batches in enumerate(steps[1:], start=1):
        lengths = [batch.valid.sum(dim=1).tolist() for batch in batches]
        sizes = edge.crossing(step, lengths)
        link += NETWORK.seconds(max(per_direction(sizes)))
    return Taken(taken / made, edge.clock.edge / made, link / made, edge.clock.cloud / made)


def run(as_json: bool = False) -> dict[str, Any]:
    """Print the table and return the figures."""
    torch.set_num_threads(1)
    sentences = Sentences(load(MODEL, device="cpu", dtype="float32", notify=console.print))
    chosen = [sentences.train[place % len(sentences.train)] for place in range(BATCH * MICROS * (STEPS + 1))]
    batches = [sentences.batch(chosen[at : at + BATCH]) for at in range(0, len(chosen), BATCH)]
    steps = [batches[at : at + MICROS] for at in range(0, len(batches), MICROS)]
    found: dict[tuple[str, int], Taken] = {}
    with scratch() as folder:
        settings = SplitTuneSettings(
            model=MODEL, first=FIRST, second=SECOND, checkpoints=str(folder), token=_TOKEN, threads=1
        )
        with served(app(settings)) as url:
            cloud = Cloud(f"{url}/v1/split-tune", _TOKEN, network=NETWORK)
            for name, cut in CUTS.items():
                for depth in (1, DEPTH):
                    with working(f"{name}, {depth} at a time"):
                        found[name, depth] = measure(cloud, cut, depth, steps)
    result = {
        "rows": [
            {
                "cut": name,
                "depth": depth,
                "step_s": one.step,
                "edge_s": one.edge,
                "link_s": one.link,
                "cloud_s": one.cloud,
                "ratio": one.ratio,
            }
            for (name, depth), one in found.items()
        ],
        "worst_ratio": max(one.ratio for (_, depth), one in found.items() if depth > 1),
    }
    table = [
        [name, str(depth), *(f"{seconds:.2f}" for seconds in (one.step, one.edge, one.link, one.cloud, one.ratio))]
        for (name, depth), one in found.items()
    ]
    title = f"MiniLM, {MICROS} micro-batches of {BATCH} sentences, {NETWORK.mbit_s:g} Mbit/s and {NETWORK.rtt_ms:g} ms"
    header = ["cut", "on their way", "step, s", "edge", "link", "cloud", "step / longest"]
    show(title, header, table, result, as_json)
    return result
