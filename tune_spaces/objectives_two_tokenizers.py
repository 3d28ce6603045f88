"""The objectives beside each other with two tokenizers: a fine-tuned Gemma 3 teaches a student cut from SmolLM2.

Both are directories that other runs leave: the teacher ``results/gemma3-sft/student``, the student, some of SmolLM2's
blocks with SmolLM2's tokenizer, ``results/smollm2-cut/student``.
"""

from raycloud.search.space import Metric, Space, Variant

MODELS = {"teacher.model": "results/gemma3-sft/student", "student.model": "results/smollm2-cut/student"}


def objective(**kd: object) -> Variant:
    """Half cross-entropy, half an objective."""
    return Variant(overrides={**MODELS, "objective.kd": kd})


SPACE = Space(
    base="objectives.yaml",
    variants={
        "supervised": Variant(overrides={**MODELS, "objective.ce_weight": 1.0, "objective.kd_weight": 0.0}),
        "uld": objective(name="uld"),
        "mined": objective(name="mined"),
        "multi_level_ot": objective(name="multi_level_ot"),
        "dskd v1": objective(name="dskd", version=1),
        "dskd v2": objective(name="dskd", version=2),
        "dskd_cma": objective(name="dskd_cma"),
        "mcw_kd": objective(name="mcw_kd"),
    },
    seeds=[10],
    metrics=[
        Metric(name="student_ppl_after", direction="min"),
        Metric(name="agreement_after", direction="max"),
        Metric(name="rouge_l", direction="max"),
    ],
    baseline="supervised",
    references={
        "none": {"student_ppl_after": "student_ppl_before", "agreement_after": "agreement_before"},
        "teacher": {"student_ppl_after": "teacher_ppl"},
    },
    output="results/objectives-two-tokenizers",
)
