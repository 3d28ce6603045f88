"""``raycloud split``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raycloud.cli.options import AsJson, Overwrite

app = typer.Typer(help="Cut a model between edge and cloud.", no_args_is_help=True)


@app.command("export")
def export(
    model: Annotated[str, typer.Option(help="A directory, GGUF file, hub id or builtin: name.")],
    first: Annotated[int, typer.Option(help="The first block that the cloud runs.")],
    second: Annotated[int, typer.Option(help="The first block after those that the cloud runs.")],
    out: Annotated[Path, typer.Option(help="Where the directories edge and cloud go.")] = Path("parts"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
) -> None:
    """Write the edge's and the cloud's parts as directories that hold only their own tensors."""
    from raycloud.report.console import console
    from raycloud.split.parts import export
    from raycloud.split.plan import PlanSet, SplitPlan

    sizes = export(model, PlanSet.of(SplitPlan(first, second)), out, overwrite=overwrite, notify=console.print)
    for side, size in sizes.items():
        console.print(f"{out / side}: {size / 1e6:,.1f} MB of tensors")


@app.command("calibrate")
def calibrate(
    model: Annotated[str, typer.Option(help="A directory, GGUF file, hub id or builtin: name.")],
    first: Annotated[int, typer.Option(help="The first block that the cloud runs.")],
    second: Annotated[int, typer.Option(help="The first block after those that the cloud runs.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("calibration.safetensors"),
    data: Annotated[list[str] | None, typer.Option(help="Texts to calibrate on; may be given several times.")] = None,
) -> None:
    """Fit the small codecs to the rows a model has at its cuts."""
    from raycloud.benchmarks.measure import show
    from raycloud.link.codecs.fitting import FITTED
    from raycloud.models.anatomy import blocks_of
    from raycloud.models.loading import load
    from raycloud.report.console import bars, console
    from raycloud.split.calibration import TOKENS, calibrate
    from raycloud.split.passages import passages
    from raycloud.split.plan import SplitPlan

    plan = SplitPlan(first, second)
    pretrained = load(model, notify=console.print)
    plan.check(len(blocks_of(pretrained.model)))
    sources = data or ["builtin:instruct", "builtin:reviews"]
    texts = passages(sources, "train", pretrained.tokenizer, TOKENS, console.print)
    cuts = {plan.first, plan.second}
    with bars(len(cuts)) as shown:
        made = calibrate(pretrained.model, texts, cuts, progress=lambda done: shown.move("cuts", done))
    made.save(out)
    rows = []
    for cut in made.cuts:
        choices = made.fitted[cut].choices
        for name in FITTED:
            code = made.boundary(name, cut)
            size = code.codec.bytes_per_row(code.width)
            error = f"{choices.errors[name]:.4f}"
            rows.append([f"{cut} {name}", str(size), f"{size / code.width:.3f}", error, str(choices.first)])
    header = ["cut and codec", "bytes per row", "per hidden unit", "relative error", "first positions in bfloat16"]
    show(f"{out}, fingerprint {made.fingerprint[:16]}", header, rows, {}, as_json=False)


@app.command("examine")
def examine(
    recipe: Annotated[Path, typer.Option(help="The recipe, a YAML file, such as a search leaves for every trial.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides, such as codec=int4.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Say what a split plan costs: perplexity, bytes and time of a token over a slow link, memory at the edge."""
    from raycloud.benchmarks.measure import show
    from raycloud.report.console import console
    from raycloud.split.examination import run
    from raycloud.split.recipe import SplitPlanRecipe

    checked = SplitPlanRecipe.load(recipe, overrides or ())
    summary = run(checked, "overwrite" if overwrite else "new")
    names = ["perplexity", "bytes_per_token", "ms_per_token", "edge_ms_per_token", "edge_mb"]
    whole = {name: summary.get(f"unsplit_{name}") for name in names}
    rows = [[name, f"{summary[name]:.5g}", "" if (of := whole[name]) is None else f"{of:.5g}"] for name in names]
    title = f"blocks [{checked.first}, {checked.second}) in the cloud, {checked.codec}, {summary['tokens']} tokens"
    show(title, ["", "split", "all at the edge"], rows, summary, as_json)
    console.print(f"results: {checked.output}")
