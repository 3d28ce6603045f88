"""Search over the student's number of blocks and objective: divergence from the teacher against the student's size.

The base recipe, teacher and budget are those of `objectives.py`. Optuna draws the number of blocks, the divergence, and
the weight of cross-entropy.
"""

from raycloud.search.domain import Choice, Range
from raycloud.search.space import Metric, Space

SPACE = Space(
    base="blocks.yaml",
    sample={
        "student.blocks": Range(low=4, high=20, step=2),
        "objective.ce_weight": Range(low=0.0, high=1.0),
        "objective.kd.name": Choice(values=["forward_kl", "skewed_reverse_kl"]),
    },
    trials=20,
    metrics=[
        Metric(name="kl_after", direction="min"),
        Metric(name="student_params", direction="min"),
    ],
    output="results/blocks-search",
)
