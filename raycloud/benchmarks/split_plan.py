"""Predictions of ``raycloud split plan`` against measured times of SmolLM2, and the planning of a model of 70B."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig

from raycloud.benchmarks.local_cloud import served
from raycloud.benchmarks.measure import SMOLLM2, Measured, in_subprocess, peak_growth_mb
from raycloud.edge.endpoint import CloudEndpoint
from raycloud.link.channel import Channel, Loopback
from raycloud.link.codecs.sizes import widest_codec
from raycloud.link.meter import Meter
from raycloud.link.network import EmulatedChannel, Network
from raycloud.models.threads import torch_threads
from raycloud.models.verdict import structure_of
from raycloud.report.console import console, timed
from raycloud.results import plain_json
from raycloud.serving.split import SplitSettings, app
from raycloud.split.cost import PlanCost, Workload, plan_costs, recommend
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.device_measure import measure_device, measure_link_step_us
from raycloud.split.device_profile import DeviceProfile, LinkProfile, SplitProfile
from raycloud.split.inference.blocks import CloudBlocks, LocalBlocks, cloud_stage
from raycloud.split.inference.client import RemoteBlocks, SessionConfig
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.generation import SplitTokenSource, local_split_model
from raycloud.split.inference.pipeline import SplitPipeline
from raycloud.split.inference.server import InferenceServer
from raycloud.split.model_sizes import sizes_of
from raycloud.split.parts import SplittableModel, edge_bytes, load_splittable
from raycloud.split.plan import PlanSet, SplitPlan

CODEC = "bfloat16"
EDGE_THREADS, CLOUD_THREADS = 1, 2
NETWORK = Network(10, 50)
CUTS = ((0, 30), (4, 26), (10, 20), (15, 30))
ROUNDS, TOKENS, PROMPT = 24, 4, 32
QUICK = {"rounds": 2, "tokens": 1}
_IN_PROCESS, _SERVE, _EMULATED = "one process", "Serve", f"{NETWORK.mbit_s:g} Mbit/s, {NETWORK.rtt_ms:g} ms"
_TOKEN = "benchmark"
_ROUNDS_PER_PROFILE = 4
LARGE: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
"""Sizes of Llama 3 70B."""
_FREE = {"mbit_s": 1e9, "rtt_ms": 0.0}


@dataclass(frozen=True)
class Condition:
    """Link between edge and cloud of a part of the measurements, and how a session of a plan is opened."""

    name: str
    network: Mapping[str, float]
    cloud_threads: int
    connect: Callable[[SplitPlan], CloudBlocks]


class TimedSession:
    """Text that goes on token by token in turn with others."""

    def __init__(self, pipeline: SplitPipeline) -> None:
        self.rounds: list[float] = []
        """Median milliseconds of a token, by round."""
        self._pipeline = pipeline
        self._advance(torch.arange(100, 100 + PROMPT)[None])

    def step(self, tokens: int) -> None:
        """Advance by a token that is not timed, as other sessions have emptied the caches, and by some that are."""
        taken = []
        for index in range(1 + tokens):
            start = time.perf_counter()
            self._advance(torch.tensor([[100 + index]]))
            taken.append(1e3 * (time.perf_counter() - start))
        self.rounds.append(statistics.median(taken[1:]))

    def _advance(self, ids: torch.Tensor) -> None:
        int(self._pipeline.advance(ids)[0, -1].argmax())  # a continuation needs the token

    def close(self) -> None:
        """End the session."""
        self._pipeline.close()


def open_session(whole: SplittableModel, plan: SplitPlan, connect: Callable[[SplitPlan], CloudBlocks]) -> TimedSession:
    """Open a session of a plan and read its prompt."""
    plans = PlanSet.of(plan)
    edge = whole.edge(plans)
    if plan.start_block == plan.end_block:
        return TimedSession(local_split_model(edge).open())
    return TimedSession(SplitTokenSource(edge.first, edge.last, lambda: connect(plan), plans).open())


@contextmanager
def conditions(whole: SplittableModel) -> Iterator[list[Condition]]:
    """Open the clouds of all conditions: in this process, on Ray Serve, and behind an emulated network.

    The edge has one thread and the clouds but the first have two, so that the two sides are not equally fast.
    """
    codecs = CutCodecs(whole.model.config.hidden_size)
    everything = PlanSet.of(SplitPlan(0, whole.blocks))

    def local(plan: SplitPlan) -> CloudBlocks:
        plans = PlanSet.of(plan)
        return LocalBlocks(cloud_stage(whole.cloud(plans).middle, plans, whole.blocks))

    def remote(channel: Callable[[str], Channel], plan: SplitPlan) -> CloudBlocks:
        config = SessionConfig(whole.fingerprint, PlanSet.of(plan), codecs, CODEC, 1024)
        return RemoteBlocks(channel, config)

    settings = SplitSettings(
        model=SMOLLM2, start_block=0, end_block=whole.blocks, token=_TOKEN, threads=CLOUD_THREADS, device="cpu"
    )
    with ExitStack() as stack:
        engine = stack.enter_context(closing(InferenceEngine(whole.cloud(everything), threads=CLOUD_THREADS)))
        server = InferenceServer(engine, codecs)
        loopback = stack.enter_context(closing(Loopback(lambda connection: server.serve(connection, "benchmark"))))
        running = stack.enter_context(served(app(settings)))
        endpoint = CloudEndpoint(f"{running.url}/v1/split", _TOKEN)
        on_serve = partial(remote, lambda session: endpoint.channel(Meter(), session))
        emulated = partial(remote, lambda _: EmulatedChannel(loopback.connect(), NETWORK))
        yield [
            Condition(_IN_PROCESS, {**_FREE, "step_us": 0}, EDGE_THREADS, local),
            Condition(_SERVE, _FREE, CLOUD_THREADS, on_serve),
            Condition(_EMULATED, {"mbit_s": NETWORK.mbit_s, "rtt_ms": NETWORK.rtt_ms}, CLOUD_THREADS, emulated),
        ]


class ProfileSamples:
    """Measurements of this device, taken between those of the plans; their medians are the profiles of both sides."""

    def __init__(self) -> None:
        self._devices: dict[int, list[DeviceProfile]] = {EDGE_THREADS: [], CLOUD_THREADS: []}
        self._links: list[float] = []

    def take(self) -> None:
        """Measure once."""
        for threads, found in self._devices.items():
            with torch_threads(threads):
                found.append(measure_device("cpu", "float32", repeats=1))
        self._links.append(measure_link_step_us("cpu", CODEC, repeats=1))

    def profile(self, network: Mapping[str, float], cloud_threads: int) -> SplitProfile:
        """Profile of a condition: its link, and this device with the threads of the two sides."""
        link = LinkProfile(**{"step_us": statistics.median(self._links), **network})
        return SplitProfile(edge=self._device(EDGE_THREADS), cloud=self._device(cloud_threads), network=link)

    def _device(self, threads: int) -> DeviceProfile:
        found = self._devices[threads]
        speeds = ("memory_gb_s", "gflop_s", "block_us", "step_us")
        medians = {name: statistics.median(getattr(one, name) for one in found) for name in speeds}
        return found[0].model_copy(update={**medians, "memory_gb": None})


@dataclass(frozen=True)
class PlanTimes:
    """Predicted and measured times of the plans of one condition."""

    condition: str
    costs: Sequence[PlanCost]
    rounds: Sequence[Sequence[float]]
    """Median milliseconds of a token in each round, by plan."""

    @property
    def measured(self) -> list[float]:
        """Median milliseconds of a token, by plan."""
        return [statistics.median(one) for one in self.rounds]

    @property
    def errors(self) -> list[float]:
        """Relative errors of the predictions, by plan."""
        return [cost.ms_per_token / ms - 1 for cost, ms in zip(self.costs, self.measured, strict=True)]

    def regret(self, edge_bytes: float) -> float:
        """Time of the recommended plan over that of the best by measurement, minus 1.

        Args:
            edge_bytes: limit of the edge's memory.
        """
        fitting = [index for index, cost in enumerate(self.costs) if cost.edge_bytes <= edge_bytes]
        chosen = recommend([self.costs[index] for index in fitting])
        recommended = next(index for index in fitting if self.costs[index] is chosen)
        measured = self.measured
        best = min(fitting, key=lambda index: measured[index])
        ratios = (a / b for a, b in zip(self.rounds[recommended], self.rounds[best], strict=True))
        return statistics.median(ratios) - 1


def compare(whole: SplittableModel, rounds: int, tokens: int) -> tuple[list[PlanTimes], SplitProfile]:
    """Time the plans of all conditions in turn, and this device between them; predict the same plans."""
    samples, alone = ProfileSamples(), SplitPlan(whole.blocks, whole.blocks)
    plans = [*(SplitPlan(*cut) for cut in CUTS), alone]
    with conditions(whole) as found:
        sessions: dict[tuple[str, SplitPlan], TimedSession] = {
            (one.name, plan): open_session(whole, plan, one.connect) for one in found for plan in plans if plan != alone
        }
        # Everything at the edge is the same plan whatever the link.
        sessions["", alone] = open_session(whole, alone, found[0].connect)
        try:
            with timed("measuring"):
                for turn in range(rounds):
                    if turn % _ROUNDS_PER_PROFILE == 0:
                        samples.take()
                    for session in sessions.values():
                        session.step(tokens)
        finally:
            for session in sessions.values():
                session.close()
    sizes = sizes_of(whole.model.config)
    work = Workload(widest_codec(CODEC, sizes.width), context=PROMPT + rounds * (tokens + 1) // 2, prompt=PROMPT)
    results = []
    for one in found:
        rows = [sessions["" if plan == alone else one.name, plan].rounds for plan in plans]
        profile = samples.profile(one.network, one.cloud_threads)
        results.append(PlanTimes(one.name, plan_costs(sizes, profile, work, plans), rows))
    return results, profile


def plan_large() -> dict[str, float]:
    """Plan a model of the size of Llama 3 70B; return seconds and the growth of this process's peak memory in MB."""
    taken = 0.0

    def plan() -> None:
        nonlocal taken
        start = time.perf_counter()
        config = LlamaConfig(**LARGE)
        sizes = sizes_of(config, causal=structure_of(config).causal)
        recommend(plan_costs(sizes, SplitProfile(), Workload(widest_codec("int8", sizes.width))))
        taken = time.perf_counter() - start

    growth = peak_growth_mb(lambda: plan)
    return {"large_s": taken, "large_mb": growth}


def run(*, rounds: int = ROUNDS, tokens: int = TOKENS) -> Measured:
    """Measure ``rounds`` rounds in which each plan makes ``tokens`` tokens."""
    with torch_threads(EDGE_THREADS):
        whole = load_splittable(SMOLLM2, device="cpu", dtype="float32", notify=console.print)
        found, profile = compare(whole, rounds, tokens)
    least = edge_bytes(whole.model.config, PlanSet.of(SplitPlan(whole.blocks, whole.blocks)))
    limits = (float("inf"), 0.9 * least)  # without a limit, and too little for all blocks
    large = in_subprocess(__name__)
    distinct = {(one.condition * (cost.start_block < cost.end_block), cost.start_block, cost.end_block): abs(error)
                for one in found for cost, error in zip(one.costs, one.errors, strict=True)}  # fmt: skip
    result: dict[str, Any] = {
        "plans": [
            {
                "condition": one.condition,
                "start_block": cost.start_block,
                "end_block": cost.end_block,
                "predicted_ms": cost.ms_per_token,
                "measured_ms": ms,
                "limited_by": cost.limited_by,
            }
            for one in found
            for cost, ms in zip(one.costs, one.measured, strict=True)
        ],
        "profile": profile.model_dump(mode="json", exclude={"network": {"mbit_s", "rtt_ms"}}),
        "plan_error": statistics.median(distinct.values()),
        "plan_regret": max(one.regret(limit) for one in found for limit in limits),
        **large,
    }
    rows = [
        [
            f"{one.condition}: [{cost.start_block}, {cost.end_block})",
            *(f"{value:.1f}" for value in (cost.ms_per_token, ms)),
            f"{error:+.2f}",
        ]
        for one in found
        for cost, ms, error in zip(one.costs, one.measured, one.errors, strict=True)
    ]  # fmt: skip
    rows.append(["median error", "", "", f"{result['plan_error']:.3f}"])
    rows.append(["worst regret of a recommendation", "", "", f"{result['plan_regret']:+.3f}"])
    rows.append(["plans of 70B: seconds, MB", "", f"{large['large_s']:.1f} s", f"{large['large_mb']:.0f} MB"])
    title = f"SmolLM2, {CODEC}, {rounds} rounds of {tokens} tokens; ms per token"
    return Measured(title, ["blocks in the cloud", "predicted", "measured", "error"], rows, result)


if __name__ == "__main__":
    print(plain_json(plan_large()))
