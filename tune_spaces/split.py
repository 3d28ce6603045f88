"""Search over the cuts and codec of SmolLM2: perplexity against bytes, time and edge memory at 10 Mbit/s and 50 ms.

Optuna draws pairs of cuts and codecs. There are four metrics, so no trial is stopped early: by perplexity alone, the
codecs with few bytes would always be stopped.
"""

from raycloud.search.domain import Choice, Range
from raycloud.search.space import Metric, Space

SPACE = Space(
    base={
        "job": "split_evaluate",
        "model": "builtin:smollm2-135m-instruct",
        "calibration": "results/split-search/calibration",
        "network": {"mbit_s": 10.0, "rtt_ms": 50.0},
        "tokens": 512,
        "threads": 1,
    },
    sample={
        "start_block": Range(low=2, high=14, step=4),
        "end_block": Range(low=16, high=28, step=4),
        "codec": Choice(values=["bfloat16", "int8", "int4"]),
    },
    trials=24,
    metrics=[
        Metric(name="perplexity", direction="min"),
        Metric(name="bytes_per_token", direction="min"),
        Metric(name="ms_per_token", direction="min"),
        Metric(name="edge_mb", direction="min"),
    ],
    references={
        "all at the edge": {
            "perplexity": "unsplit_perplexity",
            "bytes_per_token": "unsplit_bytes_per_token",
            "ms_per_token": "unsplit_ms_per_token",
            "edge_mb": "unsplit_edge_mb",
        },
    },
    output="results/split-search",
)
