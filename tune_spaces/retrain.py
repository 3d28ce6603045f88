"""Search over the settings of block retraining: accuracy in the new domains and in the source against bytes sent.

Three edges meet changed digits; every window has the same budget of operations and memory. Which blocks are trained is
not searched: each plan chooses them exactly, within the bytes that a trial allows an update to have.
"""

from raycloud.search.domain import Choice, Range
from raycloud.search.space import Metric, Space

SPACE = Space(
    base="../jobs/recipes/retrain_digits.yaml",
    sample={
        "budget.bytes": Range(low=5e4, high=1e6, log=True),
        "training.lr": Range(low=1e-3, high=1e-2, log=True),
        "training.head_lr": Range(low=3e-3, high=3e-2, log=True),
        "training.head_share": Range(low=0.02, high=0.5, log=True),
        "training.replay": Choice(values=[0.0, 0.25, 0.5]),
        "drift.window": Choice(values=[32, 64, 100]),
        "drift.radius": Range(low=0.2, high=1.0),
    },
    trials=16,
    metrics=[
        Metric(name="accuracy_after", direction="max"),
        Metric(name="source_accuracy_after", direction="max"),
        Metric(name="bytes_up", direction="min"),
    ],
    references={
        "no retraining": {"accuracy_after": "accuracy_before", "source_accuracy_after": "source_accuracy_before"},
    },
    output="results/retrain-search",
)
