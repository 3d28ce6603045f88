"""Tokens per second of SmolLM2: stock ``generate``, three parts in one process, and edge and Serve over a WebSocket."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from raycloud.benchmarks.local_cloud import SMOLLM2, calibrated, local_cloud, scratch
from raycloud.benchmarks.measure import interleaved, median_ratio, show
from raycloud.edge.cloud import remote
from raycloud.models.loading import load
from raycloud.report.console import working
from raycloud.serving.split import SplitSettings
from raycloud.split.generation import in_process
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan

FIRST, SECOND, NEW = 4, 26, 128
CODEC = "int8"
_PROMPT = "Write a long story about a lighthouse keeper and the sea."


def run(as_json: bool) -> dict[str, float]:
    """Measure side by side and print the table."""
    loaded = load(SMOLLM2, device="cpu", dtype="float32")
    stock: Any = loaded.model
    plans = PlanSet.of(SplitPlan(FIRST, SECOND))
    local = in_process(
        load_edge(SMOLLM2, plans, device="cpu", dtype="float32"),
        load_cloud(SMOLLM2, plans, device="cpu", dtype="float32"),
    )
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
            prompt = far.chat_prompt([{"role": "user", "content": _PROMPT}])
            ids = torch.tensor([prompt])

            def unsplit() -> list[int]:
                options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
                made = stock.generate(ids, attention_mask=torch.ones_like(ids), **options)
                return list(made[0, len(prompt) :].tolist())

            candidates = {
                "stock generate": unsplit,
                "three parts, one process": lambda: list(local.stream(prompt, NEW)),
                f"edge and Serve, {CODEC}": lambda: list(far.source.stream(prompt, NEW)),
            }
            with working("measuring"):
                times = interleaved(candidates)
    whole, near, wire = times.values()
    result = {
        "unsplit_tok_s": NEW / (statistics.median(whole) / 1e3),
        "local_ratio": median_ratio(whole, near),
        "websocket_ratio": median_ratio(whole, wire),
    }
    rows = [
        [name, f"{NEW / (statistics.median(taken) / 1e3):.1f}", f"{median_ratio(whole, taken):.3f}"]
        for name, taken in times.items()
    ]
    title = f"SmolLM2, blocks [{FIRST}, {SECOND}) in the cloud, {NEW} new tokens, medians of {len(whole)} pairs"
    show(title, ["", "tokens/s", "against stock"], rows, result, as_json)
    return result
