"""``raycloud evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from raycloud.cli.options import AsJson, Overwrite, Resume, mode_of, print_json
from raycloud.errors import RecipeError
from raycloud.recipe import read_yaml


def evaluate(
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as max_prompt_length=128.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model to evaluate; may be given several times.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Data set; may be given several times.")] = None,
    split: Annotated[str | None, typer.Option(help="Part of the data: test, valid, train or all.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Maximum samples of each set, evenly spread over it; default: all.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 10,20,30; one answer each.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model with which to measure agreement.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="Prompt format: alpaca, chat or plain.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Maximum tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the fewest tokens that sum to this.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many most likely tokens; 0 for all.")] = None,
    no_repeat_ngram: Annotated[
        int | None, typer.Option(help="Length of token sequences that must not repeat; 0 for no limit.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Answers generated at once.")] = None,
    out: Annotated[Path | None, typer.Option(help="The result directory; without it nothing is saved.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="The recipe, a YAML file; options replace its values.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate models: ROUGE-L and exact match over several seeds, perplexity, agreement with a teacher."""
    from raycloud.evaluation.recipe import EvaluateRecipe
    from raycloud.jobs.registry import JOBS
    from raycloud.report.console import console
    from raycloud.report.evaluate import print_evaluation

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
        "max_new_tokens": new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "no_repeat_ngram_size": no_repeat_ngram,
        "batch_size": batch_size,
    }
    values |= _given(given)
    if _given(drawn):
        values["generation"] = {**(values.get("generation") or {}), **_given(drawn)}
    if not values.get("models") and not any(one.startswith("models=") for one in overrides or ()):
        raise RecipeError("no model to evaluate; give --model, or models in the file of --recipe")
    checked = EvaluateRecipe.parse(values, overrides or (), source=str(recipe) if recipe else "evaluate")
    if checked.output is None and (resume or overwrite):
        raise RecipeError("--resume and --overwrite need a result directory: give --out")
    summary = JOBS["evaluate"].run(checked, mode).summary
    print_evaluation(summary)
    if checked.output is not None:
        console.print(f"results: {checked.output}")
    print_json(as_json, summary)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
