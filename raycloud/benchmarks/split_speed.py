"""Tokens per second of SmolLM2: stock ``generate``, three parts in one process, and edge and Serve over a WebSocket."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from raycloud.benchmarks.local_cloud import calibrated, local_cloud, scratch
from raycloud.benchmarks.measure import PAIRS, SMOLLM2, interleaved, median_ratio, show
from raycloud.edge.cloud import remote
from raycloud.models.loading import load
from raycloud.report.console import working
from raycloud.serving.split import SplitSettings
from raycloud.split.generation import in_process, text_model
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan

FIRST, SECOND, NEW = 4, 26, 128
CODEC = "int8"
_STOCK, _LOCAL, _REMOTE = "stock generate", "three parts, one process", f"edge and Serve, {CODEC}"
_PROMPT = "Write a long story about a lighthouse keeper and the sea."


def run(as_json: bool) -> dict[str, float]:
    """Measure side by side and print the table."""
    stock: Any = load(SMOLLM2, device="cpu", dtype="float32").model
    plans = PlanSet.of(SplitPlan(FIRST, SECOND))
    edge = load_edge(SMOLLM2, plans, device="cpu", dtype="float32")
    local = in_process(edge, load_cloud(SMOLLM2, plans, device="cpu", dtype="float32"))
    prompt = text_model(edge, local).chat_prompt([{"role": "user", "content": _PROMPT}])
    ids = torch.tensor([prompt])

    def unsplit() -> list[int]:
        options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
        made = stock.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return list(made[0, len(prompt) :].tolist())

    # First without Serve beside it, whose idle processes would take their share of both.
    with working("measuring in one process"):
        near = interleaved({_STOCK: unsplit, _LOCAL: lambda: list(local.stream(prompt, NEW))})
    with scratch() as folder:
        settings = SplitSettings(
            model=SMOLLM2,
            first=FIRST,
            second=SECOND,
            calibration=str(calibrated(FIRST, SECOND, folder)),
            token="benchmark",
            threads=1,
        )
        with local_cloud(settings) as cloud:
            far = remote(SMOLLM2, cloud, codec=CODEC, device="cpu", dtype="float32")
            with working("measuring over the WebSocket"):
                wire = interleaved({_STOCK: unsplit, _REMOTE: lambda: list(far.source.stream(prompt, NEW))})
    result = {
        "unsplit_tok_s": NEW / (statistics.median(near[_STOCK]) / 1e3),
        "local_ratio": median_ratio(near[_STOCK], near[_LOCAL]),
        "websocket_ratio": median_ratio(wire[_STOCK], wire[_REMOTE]),
    }
    rows = [
        [name, f"{NEW / (statistics.median(taken) / 1e3):.1f}", f"{median_ratio(times[_STOCK], taken):.3f}"]
        for times in (near, wire)
        for name, taken in times.items()
    ]
    title = f"SmolLM2, blocks [{FIRST}, {SECOND}) in the cloud, {NEW} new tokens, medians of {PAIRS} pairs"
    show(title, ["", "tokens/s", "against stock"], rows, result, as_json)
    return result
