"""``raycloud evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from raycloud.cli.options import AsJson, Overwrite, mode_of
from raycloud.errors import RecipeError
from raycloud.recipe import read_yaml


def evaluate(
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as max_prompt=128.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; may be given several times.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="A set of questions; may be given several times.")] = None,
    split: Annotated[str | None, typer.Option(help="test, valid, train or all rows.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many rows of each set, evenly spread over it; all if not given.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Answer every question once with each, such as 10,20,30.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Measure agreement with this model.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="alpaca, chat or plain prompts.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest tokens that reach this.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many; 0 for all.")] = None,
    no_repeat_ngram: Annotated[
        int | None, typer.Option(help="No sequence of so many tokens occurs twice; 0 for no rule.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers written together.")] = None,
    out: Annotated[Path | None, typer.Option(help="The result directory; without, nothing is kept.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file; options and overrides win over it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; finished seeds are kept.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Ask models questions: ROUGE-L and exact match over several seeds, perplexity, agreement with a teacher."""
    from raycloud.evaluation.protocol import run
    from raycloud.evaluation.recipe import EvaluateRecipe
    from raycloud.report.console import console
    from raycloud.report.evaluation import print_evaluation

    mode = mode_of(resume, overwrite)
    values = read_yaml(recipe) if recipe else {}
    given = {
        "models": model or None,
        "data": data or None,
        "split": split,
        "limit": limit,
        "seeds": seeds.split(",") if seeds is not None else None,
        "teacher": teacher,
        "format": form,
        "output": str(out) if out else None,
    }
    drawn = {
        "new_tokens": new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "no_repeat_ngram": no_repeat_ngram,
        "batch_size": batch_size,
    }
    values |= _said(given)
    if _said(drawn):
        values["generation"] = {**(values.get("generation") or {}), **_said(drawn)}
    checked = EvaluateRecipe.parse(values, overrides or (), source=str(recipe) if recipe else "evaluate")
    if checked.output is None and (resume or overwrite):
        raise RecipeError("--resume and --overwrite need a result directory: give --out")
    summary = run(checked, mode)
    print_evaluation(summary)
    if checked.output is not None:
        console.print(f"results: {checked.output}")
    if as_json:
        print(json.dumps(summary), flush=True)


def _said(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
