"""Search for the cuts of SmolLM2 with the lowest perplexity under int4.

There is one metric, so ASHA stops the worse cuts after some of the held-out tokens.
"""

from raycloud.search.domain import Range
from raycloud.search.space import Metric, Space

SPACE = Space(
    base={
        "job": "split_evaluate",
        "model": "builtin:smollm2-135m-instruct",
        "codec": "int4",
        "calibration": "results/split-search/calibration",
        "network": {"mbit_s": 10.0, "rtt_ms": 50.0},
        "tokens": 2048,
        "threads": 1,
    },
    sample={"start_block": Range(low=2, high=14, step=4), "end_block": Range(low=16, high=28, step=4)},
    trials=12,
    metrics=[Metric(name="perplexity", direction="min")],
    stop_by="perplexity",
    references={"all at the edge": {"perplexity": "unsplit_perplexity"}},
    output="results/cuts-search",
)
