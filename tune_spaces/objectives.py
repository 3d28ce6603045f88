"""Comparison of the objectives with one tokenizer: a student of six blocks learns from a fine-tuned SmolLM2.

The teacher is the result of ``jobs/recipes/sft_smollm2.yaml``.
"""

from raycloud.search.space import Metric, Space, Variant

SEEDS = [10, 20, 30]
TEACHER = {"teacher.model": "results/sft_smollm2/student", "teacher.signals": "results/objectives/signals"}


def objective(seeds: list[int] | None = None, **kd: object) -> Variant:
    """Make a variant with the base weights: half cross-entropy, half the distillation objective ``kd``."""
    return Variant(overrides={**TEACHER, "objective.kd": kd}, seeds=seeds)


SPACE = Space(
    base="objectives.yaml",
    variants={
        "supervised": Variant(
            overrides={**TEACHER, "objective.ce_weight": 1.0, "objective.kd_weight": 0.0}, seeds=SEEDS
        ),
        "forward_kl": objective(SEEDS, name="forward_kl"),
        "skewed_reverse_kl": objective(SEEDS, name="skewed_reverse_kl"),
        "dskd v2 ours": objective(SEEDS, name="dskd", version=2, compat="ours"),
        # The other rows are of a machine without native bfloat16, where `auto` is float32 as well.
        "dskd v2 published": Variant(
            overrides={
                **TEACHER,
                "objective.kd": {"name": "dskd", "version": 2, "compat": "published"},
                "dtype": "float32",
            },
            seeds=SEEDS,
        ),
        "adaptive_kl": objective(SEEDS, name="adaptive_kl"),
        "reverse_kl": objective(name="reverse_kl"),
        "js_divergence": objective(name="js_divergence"),
        "skewed_forward_kl": objective(name="skewed_forward_kl"),
        "dskd v1": objective(name="dskd", version=1),
        "dskd_cma": objective(name="dskd_cma"),
        "uld": objective(name="uld"),
        "multi_level_ot": objective(name="multi_level_ot"),
        "mcw_kd": objective(name="mcw_kd"),
    },
    seeds=SEEDS[:1],
    metrics=[
        Metric(name="kl_after", direction="min"),
        Metric(name="student_ppl_after", direction="min"),
        Metric(name="agreement_after", direction="max"),
        Metric(name="rouge_l_after", direction="max"),
    ],
    baseline="supervised",
    references={
        "no distillation": {
            "kl_after": "kl_before",
            "student_ppl_after": "student_ppl_before",
            "agreement_after": "agreement_before",
            "rouge_l_after": "rouge_l_before",
        },
        "teacher": {"student_ppl_after": "teacher_ppl", "rouge_l_after": "teacher_rouge_l"},
    },
    output="results/objectives",
)
