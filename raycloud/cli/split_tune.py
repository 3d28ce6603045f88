"""``raycloud split-tune``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, Overwrite, RecipeFile, mode_of


def split_tune(
    recipe: RecipeFile,
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as split=1 cut.rank=16.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model that is cut between edge and cloud: text, labels and loss stay at the edge."""
    from raycloud.split.finetune.recipe import SplitTuneRecipe
    from raycloud.split.finetune.run import run

    mode = mode_of(resume, overwrite)
    summary = run(SplitTuneRecipe.load(recipe, overrides or ()), mode)
    if as_json:
        print(json.dumps(summary), flush=True)
