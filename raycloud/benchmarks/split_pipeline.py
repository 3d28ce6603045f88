"""Duration of a split fine-tuning step over a slow link, with one micro-batch in flight or several.

The edge trains three blocks of MiniLM and the head in this process; the cloud trains three blocks in a replica of Ray
Serve; each uses one thread. The WebSocket between them is slowed to 10 Mbit/s and a round trip of 50 ms.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from raycloud.benchmarks.local_cloud import scratch, served
from raycloud.benchmarks.measure import Measured
from raycloud.benchmarks.split_tune import CLASSES, MODEL, PLAIN, Sentences, recipe_of
from raycloud.data.batches import Batch
from raycloud.edge.endpoint import CloudEndpoint
from raycloud.link.meter import Meter
from raycloud.link.network import Network
from raycloud.models.loading import load
from raycloud.report.console import console, timed
from raycloud.serving.split_tune import SplitTuneSettings, app
from raycloud.split.finetune.assembly import build_edge_setup
from raycloud.split.finetune.client import RemoteCloudClient
from raycloud.split.finetune.edge_trainer import StepTimes
from raycloud.split.finetune.traffic import bytes_by_direction
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet, SplitPlan

FIRST, SECOND = 3, 6
NETWORK = Network(mbit_s=10.0, rtt_ms=50.0)
BATCH, MICROS, STEPS = 12, 32, 2
MAX_IN_FLIGHT = 8
"""Maximum number of micro-batches in flight."""
QUICK = {"micros": 4, "made": 1}
CUTS: dict[str, dict[str, Any]] = {
    "ours, 36 bytes": {"kind": "low_rank", "rank": 34, "dtype": "int8"},
    "plain, 1536 bytes": PLAIN,
}
_TOKEN = "benchmark"


@dataclass(frozen=True)
class StepDurations:
    """Seconds of a step, in total and by component."""

    step: float
    edge: float
    """Seconds in which the edge computed."""
    link: float
    """Seconds in which the busier direction of the link was busy."""
    cloud: float
    """Seconds in which the cloud computed."""

    @property
    def ratio(self) -> float:
        """Ratio of the step to its slowest component; 1 if all other work overlaps with it."""
        return self.step / max(self.edge, self.link, self.cloud)


def measure(
    cloud: CloudEndpoint, cut: Mapping[str, Any], depth: int, steps: Sequence[Sequence[Batch]]
) -> StepDurations:
    """Measure the mean over all steps except the first."""
    recipe = recipe_of(FIRST, cut, seed=10)
    part = load_edge(MODEL, PlanSet.of(SplitPlan(FIRST, SECOND)), device="cpu", dtype="float32", training=True)
    setup = build_edge_setup(recipe, part.first, part.last, steps[0], classes=len(CLASSES), total_steps=len(steps))
    begin = setup.begin(part.fingerprint, f"{depth:08x}")
    edge = setup.edge(RemoteCloudClient(partial(cloud.channel, Meter()), begin, setup.uplink_bottleneck.decoder), depth)
    try:
        edge.step(steps[0])
        edge.wait_for_optimiser()
        edge.clock, started = StepTimes(), time.perf_counter()
        for batches in steps[1:]:
            edge.step(batches)
        edge.wait_for_optimiser()
        taken = time.perf_counter() - started
    finally:
        edge.cloud.close()
    made, link = len(steps) - 1, 0.0
    for step, batches in enumerate(steps[1:], start=1):
        lengths = [batch.valid.sum(dim=1).tolist() for batch in batches]
        sizes = edge.traffic(step, lengths)
        link += NETWORK.seconds(max(bytes_by_direction(sizes)))
    return StepDurations(taken / made, edge.clock.edge / made, link / made, edge.clock.cloud / made)


def run(*, micros: int = MICROS, made: int = STEPS) -> Measured:
    """Measure ``made`` steps of ``micros`` micro-batches each, after one step that is not measured."""
    torch.set_num_threads(1)
    sentences = Sentences(load(MODEL, device="cpu", dtype="float32", notify=console.print))
    chosen = [sentences.train[index % len(sentences.train)] for index in range(BATCH * micros * (made + 1))]
    batches = [sentences.batch(chosen[at : at + BATCH]) for at in range(0, len(chosen), BATCH)]
    steps = [batches[at : at + micros] for at in range(0, len(batches), micros)]
    found: dict[tuple[str, int], StepDurations] = {}
    with scratch() as folder:
        settings = SplitTuneSettings(
            model=MODEL, start_block=FIRST, end_block=SECOND, checkpoints=str(folder), token=_TOKEN, threads=1
        )
        with served(app(settings)) as running:
            cloud = CloudEndpoint(f"{running.url}/v1/split-tune", _TOKEN, network=NETWORK)
            for name, cut in CUTS.items():
                for depth in (1, MAX_IN_FLIGHT):
                    with timed(f"{name}, {depth} at a time"):
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
    title = f"MiniLM, {micros} micro-batches of {BATCH} sentences, {NETWORK.mbit_s:g} Mbit/s and {NETWORK.rtt_ms:g} ms"
    header = ["cut", "in flight", "step, s", "edge", "link", "cloud", "step / slowest"]
    return Measured(title, header, table, result)
