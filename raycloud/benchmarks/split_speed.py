"""Tokens per second of SmolLM2: stock ``generate``, three parts in one process, and split over a WebSocket."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from raycloud.benchmarks.local_cloud import TEXT, calibrated, scratch, served
from raycloud.benchmarks.measure import PAIRS, SMOLLM2, Measured, interleaved, median_ratio
from raycloud.edge.endpoint import CloudEndpoint, load_split
from raycloud.models.loading import load
from raycloud.report.console import timed
from raycloud.serving.split import SplitSettings, app
from raycloud.split.inference.generation import local_split_model, text_model
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan

FIRST, SECOND, NEW = 4, 26, 128
CODEC = "int8"
QUICK = {"new": 8, "pairs": 1, "text": 512}
_STOCK, _LOCAL, _REMOTE = "stock generate", "three parts, one process", f"edge and Serve, {CODEC}"
_TOKEN = "benchmark"
_PROMPT = "Write a long story about a lighthouse keeper and the sea."


def run(*, new: int = NEW, pairs: int = PAIRS, text: int = TEXT) -> Measured:
    """Measure side by side.

    Args:
        new: tokens to generate.
        pairs: number of interleaved measurements.
        text: number of tokens on which codecs are calibrated.
    """
    stock: Any = load(SMOLLM2, device="cpu", dtype="float32").model
    plans = PlanSet.of(SplitPlan(FIRST, SECOND))
    edge = load_edge(SMOLLM2, plans, device="cpu", dtype="float32")
    local = local_split_model(edge, load_cloud(SMOLLM2, plans, device="cpu", dtype="float32"))
    prompt = text_model(edge, local).chat_prompt([{"role": "user", "content": _PROMPT}])
    ids = torch.tensor([prompt])

    def unsplit() -> list[int]:
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        made = stock.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return list(made[0, len(prompt) :].tolist())

    # Before Serve is started, because its idle processes would slow both down.
    with timed("measuring in one process"):
        near = interleaved({_STOCK: unsplit, _LOCAL: lambda: list(local.stream(prompt, new))}, pairs)
    with scratch() as folder:
        settings = SplitSettings(
            model=SMOLLM2,
            start_block=FIRST,
            end_block=SECOND,
            calibration=str(calibrated(FIRST, SECOND, folder, text)),
            token=_TOKEN,
            threads=1,
        )
        with served(app(settings)) as running:
            cloud = CloudEndpoint(f"{running.url}/v1/split", _TOKEN)
            far = load_split(SMOLLM2, cloud, codec=CODEC, device="cpu", dtype="float32")
            with timed("measuring over the WebSocket"):
                wire = interleaved({_STOCK: unsplit, _REMOTE: lambda: list(far.source.stream(prompt, new))}, pairs)
    result = {
        "unsplit_tok_s": new / (statistics.median(near[_STOCK]) / 1e3),
        "local_ratio": median_ratio(near[_STOCK], near[_LOCAL]),
        "websocket_ratio": median_ratio(wire[_STOCK], wire[_REMOTE]),
    }
    rows = [
        [name, f"{new / (statistics.median(taken) / 1e3):.1f}", f"{median_ratio(times[_STOCK], taken):.3f}"]
        for times in (near, wire)
        for name, taken in times.items()
    ]
    title = f"SmolLM2, blocks [{FIRST}, {SECOND}) in the cloud, {new} new tokens, medians of {pairs} pairs"
    return Measured(title, ["", "tokens/s", "relative to stock"], rows, result)
