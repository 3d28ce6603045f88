"""Distil a teacher into a smaller student on a local Ray cluster, then generate text with the student.

    python examples/distill.py [RECIPE]

Every override of the command line works here: ``rounds.count=1`` is ``raycloud.run(recipe, **{"rounds.count": 1})``.
"""

import sys
from pathlib import Path

import raycloud

DEMO = str(Path(__file__).parents[1] / "jobs" / "recipes" / "demo.yaml")


def main(recipe: str = DEMO) -> None:
    result = raycloud.run(recipe, mode="overwrite")
    before, after = result.summary["student_ppl_before"], result.summary["student_ppl_after"]
    print(f"perplexity {before:.1f} before, {after:.1f} after; model in {result.model_path}")
    blocks = raycloud.load(str(result.model_path)).model.config.num_hidden_layers
    student = raycloud.SplitModel.from_pretrained(str(result.model_path), start_block=1, end_block=blocks)
    print(student.generate("Once upon a time", max_new_tokens=16))


if __name__ == "__main__":
    main(*sys.argv[1:])
