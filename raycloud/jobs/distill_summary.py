"""Headline numbers of a distillation, from its last checkpoint: the content of ``summary.json``.

:mod:`raycloud.report.distill` prints them as a table and writes them into the report page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raycloud.cluster.checkpoint import DistillCheckpoint
from raycloud.distill.evaluation import ALL, gap_closed
from raycloud.distill.recipe import ObjectiveRecipe


def summarise(
    run_id: str,
    checkpoint: DistillCheckpoint,
    teacher_parameters: int,
    parameters: dict[str, int],
    objectives: Mapping[str, ObjectiveRecipe],
) -> dict[str, Any]:
    """Return the headline numbers of a finished run, from the facts in its checkpoint.

    The numbers of each cohort are in ``students`` by name; those of the first cohort are also at the top level.
    """
    facts = checkpoint.facts
    students = {
        name: {
            **_headlines(found),
            "student_params": parameters[name],
            # With its defaults, such as the value of compat that was used.
            "objective": objectives[name].model_dump(mode="json"),
        }
        for name, found in facts["students"].items()
    }
    wire = facts["wire"]
    return {
        "run": run_id,
        **next(iter(students.values())),
        "teacher_params": teacher_parameters,
        # Traffic that grows with the text: ids up, signals down. Weights cross once a round, the head once a run.
        "wire_bytes_per_token": (wire.get("ids", 0) + wire.get("signals", 0)) / facts["tokens"],
        "wire_bytes": wire,
        "trained_tokens": facts["tokens"],
        "rounds": checkpoint.rounds,
        "seconds": facts["seconds"],
        "diagnostics": {
            name: {**known, "warnings": list(known["warnings"].values())}
            for name, known in facts["diagnostics"].items()
        },
        "students": students,
    }


def _headlines(found: dict[str, Any]) -> dict[str, Any]:
    """Return the headline numbers of one cohort."""
    teacher, before, after = (found[when]["scores"] for when in ("teacher", "before", "after"))
    groups = {
        group: {
            "teacher_ppl": teacher[group]["perplexity"],
            "student_ppl_before": before[group]["perplexity"],
            "student_ppl_after": after[group]["perplexity"],
            "agreement_before": before[group]["agreement"],
            "agreement_after": after[group]["agreement"],
            "kl_before": before[group]["kl"],
            "kl_after": after[group]["kl"],
            "gap_closed": gap_closed(
                before[group]["perplexity"], after[group]["perplexity"], teacher[group]["perplexity"]
            ),
            "tokens": after[group]["tokens"],
            "single_ppl": {name: scores[group]["perplexity"] for name, scores in found["singles"].items()},
        }
        for group in teacher
    }
    comparison = found["comparison"]
    return {
        **groups.pop(ALL),
        "teacher_rouge_l": found["teacher"]["rouge_l"],
        "rouge_l_before": found["before"]["rouge_l"],
        "rouge_l_after": found["after"]["rouge_l"],
        "student_blocks": found["blocks"],
        "student_tokens": found["tokens"],
        "teacher_tok_s": comparison["teacher_tok_s"],
        "student_tok_s": comparison["student_tok_s"],
        "groups": groups,
        "completions": [
            {"prompt": prompt, "teacher": teacher_text, "student": student_text}
            for prompt, teacher_text, student_text in zip(
                comparison["prompts"], comparison["teacher"], comparison["student"], strict=True
            )
        ],
    }
